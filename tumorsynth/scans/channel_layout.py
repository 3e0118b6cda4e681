"""nnU-Net raw: imagesTr/NAME_0000, NAME_0001, ... are the channels of labelsTr/NAME."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from tumorsynth.scans import dataset_json
from tumorsynth.scans.pairing import Pair, find_files, match_names, missing
from tumorsynth.scans.places import folder_names, places_in, written_name

CHANNEL = re.compile(r"_(\d{4})$")


def by_channels(
    cts: Path, labels: Path, dataset: Path | None, channel: str | None = None
) -> list[Pair]:
    """Pair the CTs of two folders, of which the other channels are copied.

    Args:
        cts: imagesTr.
        labels: labelsTr.
        dataset: the dataset.json beside them; None without one.
        channel: number or name of the CT's channel; None where there is one CT.

    Raises:
        ValueError: if it cannot be told which channel is the CT.
    """
    channels: dict[str, dict[int, Path]] = {}
    for stem, path in find_files(cts, "").items():
        if match := CHANNEL.search(stem):
            channels.setdefault(stem[: match.start()], {})[int(match[1])] = path
    firsts = {name: held[min(held)] for name, held in channels.items()}
    known = match_names(firsts, find_files(labels, ""))
    if not known:
        return []
    names = {} if dataset is None else dataset_json.channel_names(dataset)
    numbers = {number for held in channels.values() for number in held}
    which = choose_channel(numbers, names, channel)
    needed = set(names) or numbers
    pairs = []
    for name, held in channels.items():
        first = firsts[name]
        ct = held.get(which) or missing(cts, f"{name}_{which:04d}", first)
        pair = Pair(name, ct, known.get(name) or missing(labels, name, first))
        places = places_in(pair, folder_names(cts, labels))
        # a channel that is not there is listed with its path, so that the caller reports it
        others = [
            held.get(number) or missing(cts, f"{name}_{number:04d}", first)
            for number in sorted({*needed, *held} - {which})
        ]
        folder = PurePosixPath(places.ct).parent
        copies = tuple((path, str(folder / written_name(path))) for path in others)
        pairs.append(replace(pair, places=replace(places, copies=copies)))
    return pairs


def check_channels(pair: Pair) -> None:
    """Raise FileNotFoundError if a case lacks a channel that the others or dataset.json have."""
    copies = () if pair.places is None else pair.places.copies
    lacking = [path.name for path, _ in copies if not path.exists()]
    if lacking:
        raise FileNotFoundError(
            f"every case must have all channels of its data set, but {pair.name} has no "
            f"{' and no '.join(lacking)}; add the files, or take the channels out of dataset.json "
            "and the other cases"
        )


def choose_channel(numbers: Iterable[int], names: dict[int, str], wanted: str | None) -> int:
    """Return the number of the channel that gets the tumours.

    Args:
        numbers: those of the files.
        names: from dataset.json, by number; {} without it.
        wanted: number or name that the user gave; None for the one that is named CT.

    Raises:
        ValueError: if it is none of them, or cannot be told.
    """
    found = sorted(numbers)
    listed = ", ".join(f"{n} ({names[n]})" if n in names else f"{n}" for n in found)
    if wanted is not None:
        word = wanted.strip().lower()
        named = [n for n in found if names.get(n, "").lower() == word]
        if word.isdigit() and int(word) in found and not named:
            return int(word)
        if len(named) != 1:
            what = ", the name of several; give a number" if named else "; give one of them"
            raise ValueError(
                f"--channel must be the number or the name of one of the channels {listed}, got "
                f"{wanted!r}{what}"
            )
        return named[0]
    cts = [n for n in found if re.search(r"\bct\b", names.get(n, ""), re.I)]
    if len(found) == 1 or len(cts) == 1:
        return (cts or found)[0]
    if names:
        why = f"dataset.json calls {len(cts) or 'none'} of them CT"
    else:
        why = "there is no dataset.json to name them"
    raise ValueError(
        f"one of the channels {listed} must be the CT, but {why}; give its number or name, for "
        f"example --channel {(cts or found)[0]}"
    )
