"""Write the reference in docs/cli.md from the commands themselves: `python docs/_cli.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).with_name("cli.md")
MARKER = "<!-- Written by docs/_cli.py from here on; a test compares it with the commands. -->"
VALUES = {
    int: "INT",
    float: "FLOAT",
    str: "TEXT",
    Path: "PATH",
    list[int]: "INT",
    list[str]: "TEXT",
    list[float]: "FLOAT",
}
# the names that typer before 0.20 has for the same types
OLD_VALUES = {"integer": "INT", "float": "FLOAT", "text": "TEXT", "path": "PATH"}


def page() -> str:
    """The page as it should be: its hand-written top, and the reference."""
    top, _, _ = PAGE.read_text(encoding="utf-8").partition(MARKER)
    return f"{top}{MARKER}\n\n{reference()}"


def reference() -> str:
    sections = [_section(words, command) for words, command in _commands()]
    return "\n".join(sections)


def _commands() -> Iterator[tuple[str, Any]]:
    from tumorsynth.commands import main, train

    for name, command in typer.main.get_command(main.app).commands.items():  # type: ignore[attr-defined]
        group = typer.main.get_command(train.app) if name == "train" else command
        yield f"tumorsynth {name}", group
        for below, subcommand in getattr(group, "commands", {}).items():
            yield f"tumorsynth {name} {below}", subcommand


def _section(words: str, command: Any) -> str:
    level = "#" * words.count(" ")
    lines = [f"#{level} {words}", ""]
    if hasattr(command, "commands"):
        lines += [_escape(command.help), ""]
        return "\n".join(lines)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = [a.name.upper() if a.required else f"[{a.name.upper()}]" for a in arguments]
    required = [f"{o.opts[0]} {_value(o)}" for o in options if o.required]
    lines += [
        "```",
        " ".join([words, *usage, *required, *(["[OPTIONS]"] if options else [])]),
        "```",
        "",
    ]
    lines += [*_paragraphs(command.help), ""]
    if arguments:
        lines += ["| argument | meaning |", "| --- | --- |"]
        lines += [f"| `{a.name.upper()}` | {_escape(a.help)} |" for a in arguments]
        lines += [""]
    if options:
        lines += ["| option | default | meaning |", "| --- | --- | --- |", *map(_row, options), ""]
    return "\n".join(lines)


def _row(option: Any) -> str:
    help_text, default = option.help or "", ""
    if found := re.search(r" ?\[(default|light): ([^\]]+)\]", help_text):
        preset = " (light)" if found[1] == "light" else ""
        help_text, default = help_text.replace(found[0], ""), found[2] + preset
    elif option.required:
        default = "required"
    elif not option.is_flag and option.default not in (None, [], ()):
        values = option.default if isinstance(option.default, list | tuple) else [option.default]
        default = " ".join(f"`{value}`" for value in values)
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    value = "" if option.is_flag else f" {_value(option)}"
    return f"| {names}{value} | {_escape(default)} | {_escape(help_text)} |"


def _value(option: Any) -> str:
    if option.metavar:
        return option.metavar
    if hasattr(option, "type_descriptor"):
        return VALUES[option.type_descriptor.annotation]
    return OLD_VALUES[option.type.name.removesuffix(" range")]


def _paragraphs(text: str) -> Iterator[str]:
    """Help as Markdown. Paragraphs that the terminal shows as they are become code."""
    for k, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if k:
            yield ""
        if paragraph.lstrip().startswith("\b"):
            yield from ["```text", paragraph.replace("\b", "").strip("\n"), "```"]
        else:
            yield _escape(" ".join(paragraph.split()))


def _escape(text: str) -> str:
    return re.sub(r"(?<!`)([<>|*_\[\]])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
