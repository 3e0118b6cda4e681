"""For the API page: "name: meaning" lines of our docstrings become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth):(`[^`]+`)")
ITEM = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ")


class Fields(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """Markdown of a docstring: each item with its indented lines, a blank line around the list."""
    lines: list[str] = []
    inside = False
    for line in ROLE.sub(r"\1", text).splitlines():
        if ITEM.match(line):
            if not inside and lines and lines[-1]:
                lines.append("")
            line, inside = ITEM.sub(r"- **\1**: ", line), True
        elif inside and not line.startswith(" "):
            if line:
                lines.append("")
            inside = False
        lines.append(line)
    return "\n".join(lines)
