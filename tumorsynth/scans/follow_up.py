"""A series of one patient: the same tumours at several points in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tumorsynth.scans.pairing import Pair, Places


@dataclass(frozen=True)
class FollowUp:
    """One point in time.

    Attributes:
        scan: name of the scan.
        number: of the point, from 0.
        factor: diameter of the tumours over that of the seed's own.
    """

    scan: str
    number: int
    factor: float

    @property
    def name(self) -> str:
        """What the names of the point's files start with."""
        return _name(self.scan, self.number)

    @property
    def folder(self) -> str:
        """Where the point's files go, in their layout, if the scans came in one."""
        return f"t{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the report: which series it belongs to, and what it follows."""
        previous = None if self.number == 0 else f"{_name(self.scan, self.number - 1)}_report.json"
        return {
            "scan": self.scan,
            "number": self.number,
            "requested_factor": self.factor,
            "first": f"{_name(self.scan, 0)}_report.json",
            "previous": previous,
        }


def _name(scan: str, number: int) -> str:
    return f"{scan}_t{number}"


def expand(pairs: Sequence[Pair], factors: Sequence[float]) -> list[tuple[Pair, FollowUp | None]]:
    """Return each scan once for every point in time, renamed; once without factors."""
    if not factors:
        return [(pair, None) for pair in pairs]
    expanded: list[tuple[Pair, FollowUp | None]] = []
    for pair in pairs:
        for number, factor in enumerate(factors):
            point = FollowUp(pair.name, number, factor)
            places = None if pair.places is None else _beneath(point.folder, pair.places)
            expanded.append((replace(pair, name=point.name, places=places), point))
    return expanded


def _beneath(folder: str, places: Places) -> Places:
    copies = tuple((source, f"{folder}/{place}") for source, place in places.copies)
    return Places(f"{folder}/{places.ct}", f"{folder}/{places.label}", copies)


def results_by_folder(
    pairs: Sequence[Pair], series: Sequence[tuple[Pair, FollowUp | None]]
) -> list[tuple[str, list[tuple[Pair, str]]]]:
    """Return each folder of the results that holds a data set, with its scans.

    Args:
        pairs: the scans, with their places in the layout that they came in.
        series: what `expand` made of them.

    Returns:
        Folders beneath that of the results, "" for itself; and scans, each with the name of its
        report.
    """
    places_of = {pair.name: pair for pair in pairs}
    folders: dict[str, list[tuple[Pair, str]]] = {}
    for pair, point in series:
        folder, scan = ("", pair.name) if point is None else (point.folder, point.scan)
        folders.setdefault(folder, []).append((places_of[scan], pair.name))
    return list(folders.items())
