"""A generator's card as a page for people: CARD.md."""

from __future__ import annotations

from typing import Any

HIDDEN = ("name", "description", "config", "config_sha256", "format")  # from CARD.md's entries


def readable_card(card: dict[str, Any]) -> str:
    """CARD.md of a card: a heading, a paragraph, single values, and a section for every other."""
    lines = [f"# {card['name']}", ""]
    if "description" in card:
        lines += [str(card["description"]), ""]
    shown = {k: v for k, v in card.items() if k not in HIDDEN}
    plain = {k: v for k, v in shown.items() if not isinstance(v, dict | list)}
    lines += [*_as_list(plain), ""] if plain else []
    for key, value in shown.items():
        if key not in plain:
            lines += _section(key, value, 2)
    return "\n".join(lines).rstrip() + "\n"


def _section(key: str, value: Any, level: int) -> list[str]:
    """Entries as a list, tables of figures as tables, anything deeper as sections of its own."""
    lines = ["#" * level + " " + key.replace("_", " "), ""]
    if isinstance(value, list):
        return lines + [f"- {item}" for item in value] + [""]
    deeper = {k: v for k, v in value.items() if isinstance(v, dict) or _wordy(v)}
    plain = {k: v for k, v in value.items() if k not in deeper}
    if plain:
        lines += [*_as_list(plain), ""]
    rows = {k: v for k, v in deeper.items() if isinstance(v, dict) and v}
    flat = not any(isinstance(cell, dict) for row in rows.values() for cell in row.values())
    if rows and flat and len(rows) == len(value):
        return lines + _as_table(rows) + [""]
    for name, entry in deeper.items():
        lines += _section(name, entry, level + 1)
    return lines


def _wordy(value: Any) -> bool:
    """A list of sentences, rather than of names or numbers."""
    return isinstance(value, list) and any(len(str(item)) > 60 for item in value)


def _as_list(entries: dict[str, Any]) -> list[str]:
    return [f"- {key.replace('_', ' ')}: {_words(value)}" for key, value in entries.items()]


def _as_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    heads = ["", *(column.replace("_", " ") for column in columns)]
    return [
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
        *(
            "| " + " | ".join([name, *(_words(row.get(c, "")) for c in columns)]) + " |"
            for name, row in rows.items()
        ),
    ]


def _words(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
