"""Render a generator's card as Markdown: CARD.md."""

from __future__ import annotations

from typing import Any

HIDDEN = ("name", "description", "config", "config_sha256", "format")  # not listed as entries
SENTENCE_CHARACTERS = 60  # longer strings in a list count as sentences


def readable_card(card: dict[str, Any]) -> str:
    """Render a card.

    Args:
        card: the card, with at least ``name``.

    Returns:
        Markdown: a heading, the description, the single values as a list, and a section for each
        dict or list.
    """
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
    """Render entries as a list, dicts of dicts as a table, anything deeper as subsections."""
    lines = ["#" * level + " " + key.replace("_", " "), ""]
    if isinstance(value, list):
        return lines + [f"- {item}" for item in value] + [""]
    deeper = {k: v for k, v in value.items() if isinstance(v, dict) or _has_sentences(v)}
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


def _has_sentences(value: Any) -> bool:
    """Whether this is a list of sentences, rather than of names or numbers."""
    return isinstance(value, list) and any(len(str(item)) > SENTENCE_CHARACTERS for item in value)


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
