"""Where a tumour's centre may go: random voxels of the organ, judged a few at a time.

A tumour takes the first centre that suits it, so the rest are judged only where none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tumorsynth.placement.allowed import Field, Indices
from tumorsynth.placement.exophytic import Surroundings
from tumorsynth.placement.organ import Box
from tumorsynth.placement.rasterize import FEW
from tumorsynth.placement.shape import BALL_LEVEL, MAX_LEVEL, Bools, Floats, Shape

Single = NDArray[np.float32]

CENTRE_DRAWS = 1024  # random points in the organ's box; those in the organ are candidates
MAX_CANDIDATES = 256  # of these, how many are scored
FIRST = 8  # of which this many at once, to begin with, and then twice as many as so far
MARGIN_MM = 2.0  # a tumour that is not to touch the capsule stays this far from it
OFFSETS = 2  # places tried around each voxel of the organ for a tumour that bulges
LEAST_REACH = 0.9  # of its volume, that a tumour can have, or it is not tried
NEAR = 0.08  # how far the share of a place beyond the organ may be from the one drawn
BLOCKED = 0.05  # of its volume, that may lie where no tumour can be
IN_BALL = BALL_LEVEL.numpy()
# Levels of SPHERE's directions, uniform in volume: the bits of their numbers reversed, since the
# golden ratio is in the directions already
IN_SPHERE = np.array([int(f"{k:08b}"[::-1], 2) + 0.5 for k in range(256)]) / 256
IN_SPHERE = MAX_LEVEL * IN_SPHERE ** (1 / 3)


def candidates(field: Field, box: Box, rng: torch.Generator) -> Indices:
    """Up to MAX_CANDIDATES random voxels (M, 3) where a tumour may be, uniform in the organ."""
    start, stop = np.array([box.start, box.stop])
    u = torch.rand(CENTRE_DRAWS, 3, generator=rng, dtype=torch.float64).T.contiguous().numpy()
    index = start[:, None] + (u * (stop - start)[:, None]).astype(np.int64)
    hits = index[:, field.at(index)[0]].T
    if len(hits) < MAX_CANDIDATES // 8:  # the organ is a sliver of its box: look at every voxel
        free = np.stack(field.local(box.start, box.stop).nonzero(), 1)
        pick = (torch.rand(MAX_CANDIDATES, generator=rng) * len(free)).long().numpy()
        hits = free[pick] + start if len(free) else free
    return hits[:MAX_CANDIDATES]


def within(
    shape: Shape, field: Field, centres: Indices, touch: bool, keep: bool
) -> Iterator[Indices]:
    """Centres (M, 3) for a tumour in the organ, at its capsule or away from it, best first.

    Hopeless ones are left out, unless asked to keep the best of them: it tells what would fit.
    """
    # uniform in the volume of level <= MAX_LEVEL; then the rim, a margin around level 1
    rim = shape.rim * (1 + MARGIN_MM / np.linalg.norm(shape.rim, axis=1, keepdims=True))
    offsets = _offsets(shape, field, np.concatenate([shape.ball * IN_BALL[:, None], rim]))
    core = IN_BALL <= 1
    n = len(core)
    small = shape.volume_mm3 < FEW * field.voxel_mm3  # points say little about so few voxels

    def judge(index: Indices) -> tuple[Bools, Single, Single]:
        free, open_ = field.at(index)
        reach = _share(free[:, :n]) * MAX_LEVEL**3  # volume that could be had / asked for
        inside = _share(free[:, :n][:, core])
        # by the volume's border or another tumour, which are no capsule
        cut = ~open_.all(1)
        if touch:
            liked = (inside >= 0.75) & (inside <= 0.97) & ~cut
        else:
            liked = (inside == 1) & free[:, n:].all(1)
        return liked, inside - cut, reach

    return _best_first(judge, centres, offsets, -1.0 if small else LEAST_REACH, keep)


def beyond(
    shape: Shape,
    field: Field,
    organ: Indices,
    share: float,
    around: Surroundings,
    rng: torch.Generator,
) -> Iterator[Indices]:
    """Centres for a tumour of which this share is to lie beyond the organ, best first.

    organ: (M, 3), random voxels of it. Centres lie around them, also beyond the organ.
    """
    count = OFFSETS * len(organ)
    direction = F.normalize(torch.randn(count, 3, generator=rng, dtype=torch.float64), dim=1)
    radius = float(shape.half_axes.max()) * 1.3
    away = direction * radius * torch.rand(count, 1, generator=rng, dtype=torch.float64)
    steps = np.rint(away.numpy() / field.spacing).astype(np.int64)
    centres = np.concatenate([organ, np.tile(organ, (OFFSETS, 1)) + steps])
    centres = centres[((centres >= 0) & (centres < field.shape)).all(1)]
    core = IN_SPHERE <= 1

    def judge(index: Indices) -> tuple[Bools, Single, Single]:
        free, _ = field.at(index, around)
        blocked = 1 - _share(free[:, core])
        inside = _share((free & field.organ_at(index))[:, core])
        off = np.abs(1 - blocked - inside - share)
        score = np.maximum(off, NEAR) + np.maximum(blocked, BLOCKED)
        return (off <= NEAR) & (blocked <= BLOCKED), -score, _share(free) * MAX_LEVEL**3

    offsets = _offsets(shape, field, shape.sphere * IN_SPHERE[:, None])
    return _best_first(judge, centres, offsets, LEAST_REACH, keep=False)


def _offsets(shape: Shape, field: Field, points: Floats) -> Indices:
    """Voxels (3, N) from the centre's, in which points (N, 3), mm from the centre, lie."""
    found = np.rint(points / field.spacing + shape.offset.numpy())
    return np.ascontiguousarray(found.T, dtype=np.int64)


def _share(found: Bools) -> Single:
    return found.mean(1, dtype=np.float32)


def _best_first(
    judge: Callable[[Indices], tuple[Bools, Single, Single]],
    centres: Indices,
    offsets: Indices,
    least: float,
    keep: bool,
) -> Iterator[Indices]:
    """Those of centres (M, 3) that are liked, in their order, then the others by score.

    judge: from the voxels (3, M, N) around centres, for each whether it is liked, its score and its
    reach. Centres of less reach than ``least`` are left out; ``keep`` keeps the furthest reaching
    if all are.
    """
    found, first, stop = [], 0, FIRST
    while first < len(centres):
        part = centres[first:stop]
        liked, score, reach = judge(part.T[:, :, None] + offsets[:, None])
        yield from part[liked & (reach >= least)]
        found.append((liked, score, reach))
        first, stop = stop, 3 * stop
    liked, score, reach = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(-np.where(liked, np.inf, score), kind="stable")
    fits = order[reach[order] >= least]
    yield from centres[fits[~liked[fits]]]
    if keep and len(fits) == 0:
        yield centres[order[reach[order].argmax()]]
