"""Growth: the voxels of a tumour that was smaller, or larger, in its first phase.

A tumour takes voxels one after the other, each time the lowest in level of those that touch it
(levels are those of its first shape, `Shape`). Which voxels it may take does not depend on how far
it grows. Its masks at two sizes are therefore the beginnings of one sequence, and the smaller lies
within the larger, whatever the organ's surface cuts off. A shrinking tumour gives voxels back in
the same way.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tumorsynth.geometry import Box, Floats3, Rows3
from tumorsynth.placement.allowed import AllowedVoxels, dilate, gap_voxels
from tumorsynth.placement.components import flood, over_neighbours
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.rasterize import (
    MIN_SMOOTH_VOXELS,
    LevelGrid,
    box_around,
    grid_mm,
    least_label_share,
    local_mask,
    voxel_count,
)
from tumorsynth.placement.shape import MAX_LEVEL, Shape
from tumorsynth.placement.types import (
    Bools,
    Floats,
    GrowthRegion,
    LocalMask,
    Skip,
    TumorParams,
)
from tumorsynth.subvoxels import ONE, average_subvoxels, refine_box, repeat_voxels

MAX_TINY_LEVEL = 3.0  # instead of MAX_LEVEL, of tumours that had few voxels
Room = Callable[[Box], Bools]  # which voxels of a box in the sample a tumour may grow into


class GrowingTumor:
    """A tumour of the first phase, and what others need to know to stay clear of it.

    Args:
        params: as it is now.
        first: its voxels in the first phase.
        shear: of the sample's axes; see `tumorsynth.geometry.Frame`.
    """

    def __init__(self, params: TumorParams, first: LocalMask, shear: Rows3 | None = None) -> None:
        self.params, self.first = params, first
        self.shape = Shape(params.first, shear)

    def box(self, allowed: AllowedVoxels) -> Box:
        """Return the part of the sample that it may take."""
        return Box.hull([self.first.box, reach_of(self.params, self.shape, allowed)])

    def level_in(self, box: Box, spacing: Floats3) -> Floats:
        """Return the level of each voxel of a box."""
        grid = LevelGrid(self.shape, grid_mm(box, self.params.centre, self.shape, spacing, ONE))
        return grid.at(np.ones(box.shape, bool))

    def mask_in(self, box: Box) -> Tensor:
        """Return which voxels of a box it filled, at least in part, in the first phase."""
        inside = torch.zeros(box.shape, dtype=torch.bool)
        common = box.within(self.first.box)
        if not common.is_empty:
            filled = self.first.share > 0
            inside[common.relative_to(box).slices] = filled[
                common.relative_to(self.first.box).slices
            ]
        return inside


def max_level(params: TumorParams, voxel_mm3: float) -> float:
    """Return the highest level, of its first shape, that a tumour may grow to."""
    first_voxels = voxel_count(params.first.diameter_mm, voxel_mm3)
    highest = MAX_LEVEL if first_voxels >= MIN_SMOOTH_VOXELS else MAX_TINY_LEVEL
    return highest * params.growth_factor


def reach_of(params: TumorParams, first_shape: Shape, allowed: AllowedVoxels) -> Box:
    """Return the part of the sample that a tumour may grow into."""
    level = max_level(params, allowed.voxel_mm3)
    return box_around(params.centre, first_shape, allowed, level)


def grow_in_organ(
    params: Sequence[TumorParams],
    firsts: Sequence[LocalMask | Skip],
    region: OrganRegion,
    spacing: Floats3,
    *,
    gap_mm: float,
    merge: bool,
    growth: GrowthRegion | None = None,
    shear: Rows3 | None = None,
) -> list[LocalMask | Skip]:
    """Return the voxels of a sample's tumours as they are now.

    Args:
        params: of the tumours.
        firsts: their voxels in the first phase, or why one has none.
        region: the organ.
        spacing: mm per voxel.
        gap_mm: organ left between two tumours.
        merge: whether tumours may touch.
        growth: where tumours may grow beyond the organ.
        shear: of the sample's axes.
    """
    allowed = AllowedVoxels(region.to_cpu(), spacing, gap_mm, shear)
    tumors = [
        first if isinstance(first, Skip) else GrowingTumor(one, first, shear)
        for one, first in zip(params, firsts, strict=True)
    ]
    rooms = [partial(allowed.mask_in, growth=growth if one.bulge > 0 else None) for one in params]
    return grow_all(tumors, allowed, rooms, merge=merge)


def grow_all(
    tumors: Sequence[GrowingTumor | Skip],
    allowed: AllowedVoxels,
    rooms: Sequence[Room],
    *,
    merge: bool,
) -> list[LocalMask | Skip]:
    """Return the voxels of a sample's tumours as they are now.

    Args:
        tumors: of the sample, in order.
        allowed: the organ, for its grid and the gap between tumours.
        rooms: for each tumour, where it may grow if there were no others.
        merge: whether tumours may touch.
    """
    results: list[LocalMask | Skip] = []
    for number, (tumor, room) in enumerate(zip(tumors, rooms, strict=True)):
        if isinstance(tumor, Skip):
            results.append(tumor)
        else:
            if not merge:
                room = partial(_room_beside, tumors, number, allowed, room)
            results.append(grow(tumor, allowed, room))
    return results


def _room_beside(
    tumors: Sequence[GrowingTumor | Skip],
    number: int,
    allowed: AllowedVoxels,
    room: Room,
    box: Box,
) -> Bools:
    """Return where in a box a tumour may grow beside the others.

    Tumours share the organ by level: a voxel is for the one whose surface would reach it first, and
    the later one of two keeps the gap. This holds for all sizes.
    """
    spacing, gap_mm, planes = allowed.spacing, allowed.gap_mm, allowed.plane_distance
    free, wide = room(box), box.grown(gap_voxels(gap_mm, planes)).within(allowed.sample_box)
    inner = box.relative_to(wide).slices
    own = tumors[number]
    assert isinstance(own, GrowingTumor)
    if len(tumors) == 1:
        return free
    own_level = own.level_in(wide, spacing)
    for k, other in enumerate(tumors):
        if k == number or isinstance(other, Skip):
            continue
        nearer = torch.from_numpy(other.level_in(wide, spacing) <= own_level)
        if k < number:
            nearer = dilate(nearer, gap_mm, planes)
        nearer |= dilate(other.mask_in(wide), gap_mm, planes)
        free &= ~nearer[inner].numpy()
    return free


def grow(tumor: GrowingTumor, allowed: AllowedVoxels, room: Room) -> LocalMask:
    """Return a tumour's voxels as they are now; fewer than its size asks for if there is no room.

    Args:
        tumor: the tumour in the first phase.
        allowed: the organ, for its grid.
        room: where the tumour may grow beyond its voxels of the first phase.
    """
    params, first, factors = tumor.params, tumor.first, tumor.first.factors
    if params.first_mm is None:
        return first
    n = voxel_count(params.diameter_mm, allowed.voxel_mm3 / np.prod(factors))
    grows = n > first.fine_voxels
    box = tumor.box(allowed) if grows else first.box
    held = np.zeros(refine_box(box, factors).shape, dtype=bool)
    held[refine_box(first.box.relative_to(box), factors).slices] = first.fine_mask.numpy()
    grid = LevelGrid(
        tumor.shape, grid_mm(box, params.centre, tumor.shape, allowed.spacing, factors)
    )
    in_label = _labelled(first, box) & held
    seed = int(np.where(in_label, grid.at(held), np.inf).argmin())
    if grows:
        free = repeat_voxels(torch.from_numpy(room(box)), factors).numpy()
        highest = max_level(params, allowed.voxel_mm3)
        free &= tumor.shape.may_reach(grid.squares, highest) & ~held
        level = grid.at(free)
        level = np.where(free & (level <= highest), level, np.inf)
        mask = take_lowest(level, held, n)
    else:
        start = np.zeros_like(held)
        start.flat[seed] = True
        mask = take_lowest(np.where(held & ~start, grid.at(held), np.inf), start, n)
    label = _label(first, mask, seed)
    grown = local_mask(params, mask, box, factors, allowed.voxel_mm3, label=label)
    return replace(grown, first=first)


def take_lowest(level: Floats, start: Bools, n: int) -> Bools:
    """Add voxels to a mask, each time the lowest of those that touch it, until it has n.

    Args:
        level: (X, Y, Z), infinite in the mask and where no voxel may be taken.
        start: bool, same shape: the mask, connected.
        n: voxels in all. Fewer come back if no more can be reached.
    """
    wanted = n - int(start.sum())
    finite = np.isfinite(level)
    if wanted <= 0 or not finite.any():
        return start
    lowest = finite
    if int(finite.sum()) > wanted:
        limit = np.partition(level[finite], wanted - 1)[wanted - 1]
        lowest = level < limit
        ties = np.flatnonzero(level == limit)[: wanted - int(lowest.sum())]
        lowest.flat[ties] = True
    # each voxel with a lower neighbour leads down to the mask; without any other minimum all do
    grid = np.where(start, -np.inf, np.where(lowest, level, np.inf))
    if not (lowest & (grid <= over_neighbours(grid, np.minimum))).any():
        return start | lowest
    return _take_one_by_one(level, start, wanted)


def _take_one_by_one(level: Floats, start: Bools, wanted: int) -> Bools:
    """`take_lowest` where the lowest voxels are not all connected."""
    padded = np.pad(level, 1, constant_values=np.inf)
    _, rows, columns = padded.shape
    steps = [
        (x * rows + y) * columns + z
        for x, y, z in itertools.product((-1, 0, 1), repeat=3)
        if (x, y, z) != (0, 0, 0)
    ]
    values = padded.ravel()
    mask = np.pad(start, 1)
    border = over_neighbours(mask, np.logical_or) & np.isfinite(padded)
    queue = [(float(values[at]), int(at)) for at in np.flatnonzero(border)]
    heapq.heapify(queue)
    waiting = np.isfinite(values) & ~border.ravel()
    while queue and wanted:
        _, at = heapq.heappop(queue)
        mask.flat[at] = True
        wanted -= 1
        for step in steps:
            if waiting[at + step]:
                waiting[at + step] = False
                heapq.heappush(queue, (float(values[at + step]), at + step))
    return mask[1:-1, 1:-1, 1:-1]


def _labelled(first: LocalMask, box: Box) -> Bools:
    """Return which subvoxels of a box lie in labelled voxels of the first phase."""
    labelled = np.zeros(refine_box(box, first.factors).shape, dtype=bool)
    part = refine_box(first.box.relative_to(box), first.factors)
    labelled[part.slices] = repeat_voxels(first.mask, first.factors).numpy()
    return labelled


def _label(first: LocalMask, mask: Bools, centre: int) -> Bools | None:
    """Return the voxels to label; None where voxels are fine, for all of the tumour's.

    They are those of which the tumour fills as much as counted in the first phase. With the share
    that suits each size, a voxel could be labelled that the label of a larger size leaves out.

    Args:
        first: the tumour in the first phase.
        mask: the tumour, on subvoxels.
        centre: a subvoxel that belongs to the tumour at any size.
    """
    factors = first.factors
    if factors == ONE:
        return None
    at_first = average_subvoxels(first.fine_mask.double(), factors).numpy()
    least = least_label_share(first.fine_mask, at_first, factors)
    share = average_subvoxels(torch.from_numpy(mask).double(), factors).numpy()
    place = np.unravel_index(centre, mask.shape)
    voxel = np.ravel_multi_index([i // k for i, k in zip(place, factors, strict=True)], share.shape)
    labelled = share >= least
    labelled.flat[voxel] = True
    return flood(labelled, int(voxel))
