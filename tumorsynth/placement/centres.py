"""Candidate centres: random voxels of the organ, ranked a few at a time.

Placement takes the first centre that fits, so most candidates are never ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tumorsynth.placement.allowed import AllowedVoxels
from tumorsynth.placement.rasterize import MIN_SHAPED_VOXELS
from tumorsynth.placement.shape import BALL_LEVEL, MAX_LEVEL, Shape
from tumorsynth.placement.types import Bools, Floats, GrowthRegion, Indices

Shares = NDArray[np.float32]

BOX_SAMPLES = 1024  # random points in the organ's box; those in the organ are candidates
MAX_CANDIDATES = 256
FIRST_BATCH = 8  # candidates ranked in the first batch; each later one is twice all before it
# A tumour at the capsule: share of its inner sample points that are allowed
CAPSULE_SHARE_RANGE = (0.75, 0.97)
CAPSULE_MARGIN_MM = 2.0  # distance from the capsule of tumours that must not touch it
MIN_REACHABLE_SHARE = 0.9  # of a tumour's volume that must be reachable, or the centre is left out
OFFSETS_PER_VOXEL = 2  # centres tried around each candidate for an exophytic tumour
MAX_OFFSET = 1.3  # of such a centre from its candidate, in largest half-axes
EXOPHYTIC_TOLERANCE = 0.08  # accepted error of the share beyond the organ
MAX_BLOCKED_SHARE = 0.05  # of an exophytic tumour's volume
BALL_LEVELS = BALL_LEVEL.numpy()
# Levels for SPHERE's directions, uniform in volume. Bit reversal, since the golden ratio is in the
# directions already.
SPHERE_LEVELS = np.array([int(f"{k:08b}"[::-1], 2) + 0.5 for k in range(256)]) / 256
SPHERE_LEVELS = MAX_LEVEL * SPHERE_LEVELS ** (1 / 3)


def sample_candidates(allowed: AllowedVoxels, rng: torch.Generator) -> Indices:
    """Sample up to MAX_CANDIDATES allowed voxels (M, 3), uniform in the organ."""
    box = allowed.organ_box
    if box is None:
        return np.zeros((0, 3), dtype=np.int64)
    start, stop = np.array([box.start, box.stop])
    u = torch.rand(BOX_SAMPLES, 3, generator=rng, dtype=torch.float64).T.contiguous().numpy()
    index = start[:, None] + (u * (stop - start)[:, None]).astype(np.int64)
    hits = index[:, allowed.lookup(index).allowed].T
    if len(hits) < MAX_CANDIDATES // 8:  # the organ fills little of its box: search all of it
        free = np.stack(allowed.mask_in(box).nonzero(), 1)
        pick = (torch.rand(MAX_CANDIDATES, generator=rng) * len(free)).long().numpy()
        hits = free[pick] + start if len(free) else free
    return hits[:MAX_CANDIDATES]


def rank_inside(
    shape: Shape,
    allowed: AllowedVoxels,
    candidates: Indices,
    *,
    touches_capsule: bool,
    keep_best: bool,
) -> Iterator[Indices]:
    """Rank centres for a tumour inside the organ.

    Args:
        shape: the tumour's shape.
        allowed: where it may be.
        candidates: (M, 3), voxels of the organ.
        touches_capsule: whether the organ's surface should cut it, or stay clear of it.
        keep_best: whether to yield the best centre if all are left out; rasterising there tells
            which size would fit.

    Yields:
        Centres (3,), best first, without those that leave too little room.
    """
    # a ball of points uniform in the volume up to MAX_LEVEL, and a rim just outside level 1
    rim = shape.rim * (1 + CAPSULE_MARGIN_MM / np.linalg.norm(shape.rim, axis=1, keepdims=True))
    offsets = _voxel_offsets(
        shape, allowed, np.concatenate([shape.ball * BALL_LEVELS[:, None], rim])
    )
    core = BALL_LEVELS <= 1
    n = len(core)

    def judge(index: Indices) -> _Verdict:
        free, unobstructed = allowed.lookup(index)
        inside = _share(free[:, :n][:, core])
        # the sample's border and other tumours are no capsule
        cut = ~unobstructed.all(1)
        if touches_capsule:
            low, high = CAPSULE_SHARE_RANGE
            suitable = (inside >= low) & (inside <= high) & ~cut
        else:
            suitable = (inside == 1) & free[:, n:].all(1)
        return _Verdict(suitable, inside - cut, _share(free[:, :n]) * MAX_LEVEL**3)

    # sample points say little about a tumour of few voxels
    tiny = shape.volume_mm3 < MIN_SHAPED_VOXELS * allowed.voxel_mm3
    min_reachable = -1.0 if tiny else MIN_REACHABLE_SHARE
    return _best_first(judge, candidates, offsets, min_reachable, keep_best)


def rank_exophytic(
    shape: Shape,
    allowed: AllowedVoxels,
    candidates: Indices,
    share: float,
    growth: GrowthRegion,
    rng: torch.Generator,
) -> Iterator[Indices]:
    """Rank centres for a tumour that lies partly beyond the organ.

    Args:
        shape: the tumour's shape.
        allowed: where it may be.
        candidates: (M, 3), voxels of the organ. Centres lie at and around them.
        share: of the tumour's volume that should lie beyond the organ.
        growth: where it may grow to.
        rng: the tumour's own generator.

    Yields:
        Centres (3,), best first.
    """
    centres = _around_candidates(shape, allowed, candidates, rng)
    core = SPHERE_LEVELS <= 1

    def judge(index: Indices) -> _Verdict:
        free = allowed.lookup(index, growth).allowed
        blocked = 1 - _share(free[:, core])
        inside = _share((free & allowed.is_organ_at(index))[:, core])
        error = np.abs(1 - blocked - inside - share)
        suitable = (error <= EXOPHYTIC_TOLERANCE) & (blocked <= MAX_BLOCKED_SHARE)
        penalty = np.maximum(error, EXOPHYTIC_TOLERANCE) + np.maximum(blocked, MAX_BLOCKED_SHARE)
        return _Verdict(suitable, -penalty, _share(free) * MAX_LEVEL**3)

    offsets = _voxel_offsets(shape, allowed, shape.sphere * SPHERE_LEVELS[:, None])
    return _best_first(judge, centres, offsets, MIN_REACHABLE_SHARE, keep_best=False)


def _around_candidates(
    shape: Shape, allowed: AllowedVoxels, candidates: Indices, rng: torch.Generator
) -> Indices:
    """Return the candidates and OFFSETS_PER_VOXEL random voxels around each, within the sample."""
    count = OFFSETS_PER_VOXEL * len(candidates)
    direction = F.normalize(torch.randn(count, 3, generator=rng, dtype=torch.float64), dim=1)
    radius = float(shape.half_axes.max()) * MAX_OFFSET
    away = direction * radius * torch.rand(count, 1, generator=rng, dtype=torch.float64)
    steps = np.rint(allowed.along_axes(away.numpy()) / allowed.spacing).astype(np.int64)
    centres = np.concatenate([candidates, np.tile(candidates, (OFFSETS_PER_VOXEL, 1)) + steps])
    return centres[((centres >= 0) & (centres < allowed.sample_box.stop)).all(1)]


def _voxel_offsets(shape: Shape, allowed: AllowedVoxels, points: Floats) -> Indices:
    """Return the voxels (3, N) of points (N, 3), counted from the centre voxel.

    points: in mm from the true centre.
    """
    offsets = np.rint(allowed.along_axes(points) / allowed.spacing + shape.offset.numpy())
    return np.ascontiguousarray(offsets.T, dtype=np.int64)


def _share(hits: Bools) -> Shares:
    return hits.mean(1, dtype=np.float32)


class _Verdict(NamedTuple):
    """What some centres (M,) are worth."""

    suitable: Bools
    score: Shares
    reachable: Shares  # volume within reach over the volume needed


def _best_first(
    judge: Callable[[Indices], _Verdict],
    centres: Indices,
    offsets: Indices,
    min_reachable: float,
    keep_best: bool,
) -> Iterator[Indices]:
    """Yield suitable centres in their order, then the others by score.

    Args:
        judge: rates centres by the voxels (3, M, N) around them.
        centres: (M, 3).
        offsets: (3, N), the voxels around a centre to look at.
        min_reachable: centres that reach less are left out.
        keep_best: whether to yield the farthest-reaching centre if all are left out.
    """
    verdicts, first, stop = [], 0, FIRST_BATCH
    while first < len(centres):
        batch = centres[first:stop]
        verdict = judge(batch.T[:, :, None] + offsets[:, None])
        yield from batch[verdict.suitable & (verdict.reachable >= min_reachable)]
        verdicts.append(verdict)
        first, stop = stop, 3 * stop
    suitable, score, reachable = (np.concatenate(parts) for parts in zip(*verdicts, strict=True))
    order = np.argsort(-np.where(suitable, np.inf, score), kind="stable")
    fits = order[reachable[order] >= min_reachable]
    yield from centres[fits[~suitable[fits]]]
    if keep_best and len(fits) == 0:
        yield centres[order[reachable[order].argmax()]]
