"""From the name of an organ to its values in a label map, by the words of `spelling`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tumorsynth.label_maps.spelling import SUBSTRUCTURE, TUMOR_NAME, matching_names, suggest

LabelMapLike = str | os.PathLike[str] | Mapping[Any, Any] | None
MAX_LISTED = 30  # values of a label, in a message


@dataclass(frozen=True)
class LabelMap:
    """Which values of a label stand for which names.

    Args:
        source: what the user calls it, for messages.
        values: the values of each name; background 0 may be among them.
        is_complete: whether a label of this map holds no other values: that of a published set.
    """

    source: str
    values: Mapping[str, tuple[int, ...]]
    is_complete: bool = False

    def find(self, name: str) -> tuple[int, ...]:
        """Return the values of a structure, or of a group: "kidney" is left and right.

        Spelling does not matter, see `spelling`.

        Args:
            name: of the structure.

        Raises:
            ValueError: for a name that the map does not have, or that may mean several structures;
                with the near ones.
        """
        values = {v for one in self.names_of(name) for v in self.values[one]}
        return tuple(sorted(values))

    def names_of(self, name: str) -> list[str]:
        """Return the map's own names of a structure or a group."""
        found = matching_names(name, self.values)
        if not found.names:
            raise ValueError(
                f"organ_labels must be names of label_map {self.source!r}, got {name!r}; "
                f"{suggest(name, self.values)}"
            )
        if found.is_one and len({self.values[one] for one in found.names}) > 1:
            listed = ", ".join(f"{one!r} with {self.values[one]}" for one in found.names)
            raise ValueError(
                f"names of label_map {self.source!r} must differ by more than spelling, got "
                f"{listed} for {name!r}; rename one"
            )
        if found.other_side:
            listed = ", ".join(map(repr, [*found.names, *found.other_side]))
            raise ValueError(
                f"organ_labels must name all structures that they mean, got {name!r}, which is "
                f"{' and '.join(map(repr, found.names))} in label_map {self.source!r} and perhaps "
                f"others; pass those that you mean of {listed}"
            )
        return list(found.names)

    def describe(self, values: Iterable[int]) -> str:
        """Return values with their names: "2 (kidney_right), 3 (kidney_left)"."""
        names = {v: name for name, held in self.values.items() if len(held) == 1 for v in held}
        words = [f"{v} ({names[v]})" if v in names else str(v) for v in values]
        return ", ".join(words[:MAX_LISTED]) + (", ..." if len(words) > MAX_LISTED else "")

    def name_of(self, value: int) -> str | None:
        """Return the name that has one value, and no other; None if there is none."""
        return next((name for name, held in self.values.items() if held == (value,)), None)

    @staticmethod
    def is_tumor(name: str) -> bool:
        """Return whether a name is that of tumours."""
        return TUMOR_NAME.search(name) is not None

    def tumor_value(self) -> int | None:
        """Return the value of the one name that is a tumour's; None if there is no such name."""
        found = [held for name, held in self.values.items() if self.is_tumor(name)]
        return found[0][0] if len(found) == 1 and len(found[0]) == 1 else None

    def organ_names(self) -> list[str]:
        """Return the names of organs: not of their tumours and cysts, nor of the background."""
        return [
            name
            for name, held in self.values.items()
            if held != (0,) and not SUBSTRUCTURE.search(name)
        ]

    def without(self, tumor_label: Any) -> LabelMap:
        """Return the map in which regions, names with several values, leave out the tumours'.

        Args:
            tumor_label: the tumours' value.
        """
        values = {
            name: tuple(v for v in held if v != tumor_label) if len(held) > 1 else held
            for name, held in self.values.items()
        }
        return replace(self, values=values)

    def free_value(self) -> int:
        """Return the value after the map's largest."""
        return max(v for held in self.values.values() for v in held) + 1

    def foreign(self, found: Iterable[int], tumor_label: int) -> list[int]:
        """Return values of a label that contradict the map: those above 0 that it does not have.

        Args:
            found: the label's values.
            tumor_label: the tumours' value, which need not be in the map.
        """
        if not self.is_complete:
            return []
        known = {tumor_label, *(v for held in self.values.values() for v in held)}
        return sorted(v for v in found if v > 0 and v not in known)

    def check(self, found: Iterable[int], tumor_label: int, label: str = "the label") -> None:
        """Raise ValueError if a label contradicts the map.

        Args:
            found: the label's values.
            tumor_label: the tumours' value.
            label: what the label is called, for the message.
        """
        listed = sorted(found)
        foreign = self.foreign(listed, tumor_label)
        if foreign:
            beyond, held = (
                ", ".join(map(str, values[:MAX_LISTED])) for values in (foreign, listed)
            )
            raise ValueError(
                f"label_map {self.source!r} must be that of {label}, but it ends at "
                f"{self.free_value() - 1} and {label} holds {beyond} (of {held}); give the map "
                "that it was made with, or your own, as in label_map={'liver': 6}"
            )


def has_names(organ_labels: Any) -> bool:
    """Return whether organ_labels hold a name, and so need a label map."""
    if isinstance(organ_labels, str):
        return True
    is_list = isinstance(organ_labels, list | tuple | set | frozenset)
    return is_list and any(isinstance(one, str) for one in organ_labels)


def organ_values(organ_labels: Any, label_map: LabelMap | None) -> Any:
    """Return organ labels with values in place of names; what holds no name, as it is.

    Args:
        organ_labels: a name, a value, or several.
        label_map: which values the names have.

    Raises:
        ValueError: for an unknown name, names without a map, or a map without names.
    """
    if not has_names(organ_labels):
        if label_map is not None:
            raise ValueError(
                f"label_map is for names, but organ_labels hold none, got {organ_labels!r}; pass "
                "for example organ_labels='liver', or leave label_map out"
            )
        return organ_labels
    if label_map is None:
        raise ValueError(
            f"organ_labels by name need a label_map, which says what values the names have, got "
            f"{organ_labels!r} alone; pass for example label_map='totalsegmentator' or "
            "{'liver': 1}, or look up the value and pass organ_labels=1"
        )
    given: Sequence[Any] = [organ_labels] if isinstance(organ_labels, str) else list(organ_labels)
    found: list[Any] = []
    for one in given:
        if isinstance(one, Iterable) and not isinstance(one, str):
            raise ValueError(
                "organ_labels must be names or whole numbers, one list of them, got "
                f"{str(one)[:80]!r} in it; pass for example organ_labels=['liver', 'spleen']"
            )
        found += label_map.find(one) if isinstance(one, str) else [one]
    return tuple(dict.fromkeys(found))
