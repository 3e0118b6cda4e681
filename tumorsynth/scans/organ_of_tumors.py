"""Which organ each voxel of a tumour belongs to, where there is one file per organ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np


def organ_of_tumors(
    tumor: np.ndarray, before: np.ndarray, after: np.ndarray, organs: Sequence[int]
) -> np.ndarray:
    """Return the organ that each voxel of the tumours grew from.

    A voxel that an organ held before belongs to that organ. Tumours carry it on to the voxels that
    they took beyond: outside the organ, or where tissue was pushed aside.

    Args:
        tumor: (X, Y, Z), bool.
        before: the same shape, values of the organs before; others mean none.
        after: the same afterwards, for tumours that lie beyond their organ altogether.
        organs: the organs' values.

    Returns:
        Their values in the tumours' voxels, 0 elsewhere.
    """
    found = np.zeros(tumor.shape, np.int16)
    if not tumor.any():
        return found
    corners = [np.flatnonzero(tumor.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(max(int(c[0]) - 1, 0), int(c[-1]) + 2) for c in corners)
    inside, seeds = tumor[box], before[box]
    owner = np.where(inside & np.isin(seeds, organs), seeds, 0).astype(np.int16)
    _spread(owner, inside)
    if (inside & (owner == 0)).any():
        around = after[box]
        owner = np.where(~inside & np.isin(around, organs), around, owner).astype(np.int16)
        _spread(owner, inside)
    owner[inside & (owner == 0)] = organs[0]
    found[box] = np.where(inside, owner, 0)
    return found


def _spread(owner: np.ndarray, inside: np.ndarray) -> None:
    """Spread the values to the voxels inside that have none, in place, from neighbour to neighbour.

    Faces come before edges and corners, by which tumours hang together as well.
    """
    steps = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
    steps.sort(key=lambda step: sum(map(abs, step)))
    while (inside & (owner == 0)).any():
        earlier = owner.copy()
        for step in steps:
            part = owner[tuple(_shifted(s) for s in step)]
            source = earlier[tuple(_shifted(-s) for s in step)]
            free = inside[tuple(_shifted(s) for s in step)] & (part == 0)
            part[free] = source[free]
        if (owner == earlier).all():
            return


def _shifted(step: int) -> slice:
    """Return the part of an axis whose voxels have a neighbour ``step`` before them."""
    return slice(max(step, 0), min(step, 0) or None)
