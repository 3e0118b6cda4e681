"""The generators of a comparison, and the patients that each has learned from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tumorsynth as ts

# patients whose tumours a generator of this name and version was trained on
TRAINED_ON: dict[tuple[str, str], tuple[str, ...]] = {
    ("hu2023", "1"): (),
    ("liver-early", "4"): ("ircadb_p01",),
    ("liver-early", "5"): ("crlm_1006", "crlm_1100", "hcc_015"),
    ("liver-early", "6"): ("crlm_1006", "crlm_1100", "hcc_015"),
}


@dataclass(frozen=True)
class Entry:
    """A generator under the name that its column gets."""

    label: str
    generator: Any
    trained_on: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """What the JSON says of it."""
        card = self.generator.card
        known = {key: card[key] for key in ("name", "version", "sha256") if key in card}
        return {**known, "trained_on": list(self.trained_on)}


def load(given: list[str], trained_on: list[str]) -> list[Entry]:
    """Load generators.

    Args:
        given: NAME or FOLDER, or LABEL=NAME or LABEL=FOLDER.
        trained_on: LABEL=PATIENT,... or LABEL=none, of those that TRAINED_ON does not know.
    """
    told = dict(_parted(text, "--trained-on") for text in trained_on)
    entries: list[Entry] = []
    for text in given:
        label, _, source = text.rpartition("=")
        label = label or Path(source).name
        if label in {entry.label for entry in entries} | {"real", "sham"}:
            raise SystemExit(
                f"two columns would be called {label}; pass --generator LABEL={source}"
            )
        generator = ts.load_generator(source)
        kind = str(generator.card.get("name")), str(generator.card.get("version"))
        if label in told:
            names = told.pop(label)
            seen = () if names == "none" else tuple(names.split(","))
        elif kind in TRAINED_ON:
            seen = TRAINED_ON[kind]
        else:
            raise SystemExit(
                f"nothing is known of the patients that {source} learned from; pass --trained-on "
                f"{label}=PATIENT,... or --trained-on {label}=none"
            )
        entries.append(Entry(label, generator, seen))
    if told:
        raise SystemExit(f"--trained-on names {', '.join(told)}, which no --generator is called")
    return entries


def _parted(text: str, option: str) -> tuple[str, str]:
    label, _, value = text.partition("=")
    if not value:
        raise SystemExit(f"{option} must be LABEL=PATIENT,... or LABEL=none, got {text}")
    return label, value
