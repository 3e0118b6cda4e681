"""Where a synthetic tumour sits and which voxels it takes, in mm, on the label's own grid.

A tumour is a deformed ellipsoid: the level of a point x (mm from the centre) is
|x| / r(direction), r an ellipsoid's radius times a smooth random function of direction. Sets of
equal level are star-shaped. The tumour is the organ's n voxels of lowest level, n from the volume
asked for, so that its volume is right to half a voxel also where the organ's surface cuts it.

Nothing here costs more for a larger volume, except `organ_box`, which looks at every voxel once.
All random numbers come from CPU generators and levels are float64, so that a GPU draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth._arguments import any_bool, is_bool
from tumorsynth._room import Field, Ground, largest_part, lowest_connected, marked
from tumorsynth._room import dilate as dilate
from tumorsynth._room import is_organ as is_organ
from tumorsynth._tumor_shape import BALL, BALL_LEVEL, MAX_LEVEL, RIM, SPHERE, Shape
from tumorsynth._tumor_shape import TumorParams as TumorParams
from tumorsynth.bulge import Surroundings, draw_bulge, places
from tumorsynth.priors import SizePrior, get_prior

CENTRE_DRAWS = 1024  # random points in the organ's box; those in the organ are candidates
MAX_CANDIDATES = 256  # of these, how many are scored
TRIES_PER_SIZE = 4  # candidates drawn in full before the tumour is made smaller
HOPELESS = 8  # tumours in a row without room, after which no more are tried
SIZE_STEPS = 5  # sizes tried, from the one drawn down to the smallest allowed
FEW = 8  # tumours of fewer voxels than this have no shape to keep to
MIN_FLATNESS = (
    0.33  # shortest / longest axis once the organ has cut it: 95 % of real ones have more
)
OUTLINE_BEND = 0.06  # relative amplitude by which a real outline is bent, standard deviation
MAX_ORGAN_SHARE = 0.25  # of the organ, that a tumour of a prior's size may take
MARGIN_MM = 2.0  # a tumour that is not to touch the capsule stays this far from it
SLAB = 2**20  # voxels of a label that are looked at together on a CPU
# What may be asked for, so that no call takes the machine's memory or does not end
MAX_COUNT = 100
MAX_LABELS = 1000
SIZES_MM = (0.1, 200.0)
MAX_SIGMA_MM = 20.0
MAX_GAP_MM = 100.0
ADVICE = {
    "size_mm": 'pass for example size_mm=(5, 20), in mm, or a named prior: size_mm="liver"',
    "sigma_mm": "pass for example sigma_mm=(0.5, 1.5), in mm, or None",
}


@dataclass(frozen=True)
class Skip:
    """A tumour that was not made, and why."""

    reason: str
    drawn_mm: float | None = None


@dataclass(frozen=True)
class Box:
    """Voxels start <= index < stop along each axis."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    def grown(self, by_mm: float, spacing: Sequence[float]) -> tuple[slice, slice, slice]:
        """Slices of the box and at least this much and a voxel around it."""
        by = [math.ceil(by_mm / s) + 1 for s in spacing]
        x, y, z = (
            slice(max(0, a - n), b + n) for a, b, n in zip(self.start, self.stop, by, strict=True)
        )
        return x, y, z


@dataclass(frozen=True)
class LocalMask:
    """The voxels of one tumour: a bool tensor, tight around them, and where it starts."""

    params: TumorParams
    start: tuple[int, int, int]
    mask: Tensor
    voxels: int
    diameter_mm: float  # of what was drawn, exact

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the box in the sample: label[t.slices][t.mask] = tumor_label."""
        x, y, z = (slice(s, s + n) for s, n in zip(self.start, self.mask.shape, strict=True))
        return x, y, z


def organ_box(label: Tensor, organ_labels: int | Iterable[int]) -> Box | None:
    """The tight box around all voxels (X, Y, Z) carrying one of the labels; None if none does."""
    if label.ndim != 3:
        raise ValueError(f"label must be (X, Y, Z), got shape {tuple(label.shape)}")
    labels = check_organ_labels(organ_labels)
    # In the order of memory (a NIfTI's is the reverse), and on a CPU by slabs that fit a cache:
    # fresh memory as large as the label would cost more than the looking.
    order = sorted(range(3), key=label.stride, reverse=True)
    label = label.permute(order)
    length, wide, deep = label.shape
    slab = max(1, SLAB // max(1, wide * deep)) if label.device.type == "cpu" else max(1, length)
    line: list[Tensor] = []
    plane: Tensor | None = None
    for part in label.split(slab):
        organ = marked(part, labels)
        line.append(organ.amax((1, 2)))
        seen = organ.amax(0)
        plane = seen if plane is None else torch.maximum(plane, seen)
    assert plane is not None
    lines = torch.cat([*line, plane.amax(1), plane.amax(0)]).cpu()  # one wait for a GPU
    start, stop = [0, 0, 0], [0, 0, 0]
    for axis, line_of in zip(order, lines.split([length, wide, deep]), strict=True):
        hits = line_of.nonzero()
        if len(hits) == 0:
            return None
        start[axis] = int(hits[0])
        stop[axis] = int(hits[-1]) + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


@torch.no_grad()
def place(
    label: Tensor | Ground,
    organ_labels: int | Iterable[int],
    box: Box | None,
    spacing: Sequence[float],
    *,
    size_mm: float | Sequence[float] | str | SizePrior,
    count: int | Sequence[int] | None = 1,
    rng: torch.Generator,
    sigma_mm: float | Sequence[float] = 1.0,
    contrast_hu: tuple[float, float] | None = None,
    gap_mm: float = 2.0,
    merge: bool = False,
    prior: str | SizePrior | None = None,
    forbid: Tensor | None = None,
    outlines: Sequence[str] = (),
    bulge: SizePrior | tuple[float, float] | None = None,
    around: Surroundings | None = None,
) -> list[LocalMask | Skip]:
    """Draw `count` tumours inside the organ, or, with `bulge`, partly beyond it.

    label: (X, Y, Z), whole numbers of any dtype, any device; or a `Ground`, which has organ_labels
        and forbid in it. box: from `organ_box`. spacing: mm.
    size_mm: equivalent diameter: a number, (lo, hi) drawn log-uniformly, or a named prior, whose
        tumours take at most a quarter of the organ's largest connected part, or are its smallest.
    count: a number, (lo, hi) inclusive, or None for the prior's own counts per case.
    rng: CPU generator of this sample; one seed per tumour is taken from it.
    sigma_mm: feather, a number or (lo, hi) drawn uniformly. It is only carried in the params.
    contrast_hu: (lo, hi) drawn uniformly; carried likewise, and no other draw depends on it.
    gap_mm: at least this much organ between two tumours, and always a voxel; merge: they may touch.
    prior: shapes and capsule contact; by default the one named in size_mm, else "liver".
    forbid: bool (X, Y, Z), voxels no tumour may take.
    outlines: of real masks (`mask_shapes`), one of which each tumour has, turned, mirrored or not,
        slightly bent and brought to its size, instead of the prior's shapes.
    bulge: what the share beyond the organ is drawn from (`bulge.check_bulge`); no other draw
        depends on it. around: where that may be, needed with it.

    Returns one LocalMask (with its params) or Skip (with a reason) per tumour asked for. A tumour
    for which there is no room is made smaller, down to lo, before it is given up; the number of
    attempts is bounded (TRIES_PER_SIZE x SIZE_STEPS).
    """
    spacing = check_spacing(spacing)
    ground = _ground(label, organ_labels, forbid)
    lo, hi, size_prior, shape_prior = _size(size_mm, prior)
    sigma = check_range("sigma_mm", sigma_mm, 0.0, MAX_SIGMA_MM)
    gap = check_range("gap_mm", gap_mm, 0.0, MAX_GAP_MM)[0]
    wanted = _count(count, shape_prior, rng)
    seeds = torch.randint(1 << 48, (wanted,), generator=rng).tolist()
    if box is None:
        return [Skip(f"no organ: the label has no voxel of {list(ground.labels)}")] * wanted

    if size_prior is not None:
        # priors know nothing of how small an organ, or the part of it in a patch, may be
        organ_mm3 = largest_part(ground, box.grown(0, spacing)) * math.prod(spacing)
        hi = min(hi, max(lo, equivalent_diameter(MAX_ORGAN_SHARE * organ_mm3)))
    placed: list[LocalMask] = []
    results: list[LocalMask | Skip] = []
    in_vain = 0
    for seed in seeds:
        if in_vain == HOPELESS:  # each try costs as much as the organ is large
            reason = f"no room for a tumour of {lo:.3g} mm or more in the organ"
            results.append(Skip(f"{reason}: none of the {HOPELESS} before it found any"))
            continue
        child = torch.Generator().manual_seed(seed)
        if size_prior is None:
            drawn = lo * (hi / lo) ** float(torch.rand((), generator=child, dtype=torch.float64))
        else:
            drawn = size_prior.draw_diameter(lo, hi, child)
        axes, roughness = shape_prior.draw_shape(drawn, child)
        quaternion = F.normalize(torch.randn(4, generator=child, dtype=torch.float64), dim=0)
        u_sigma, u_touch = torch.rand(2, generator=child, dtype=torch.float64).tolist()
        shape_seed, noise_seed = torch.randint(1 << 48, (2,), generator=child).tolist()
        w, x, y, z = quaternion.tolist()
        params = TumorParams(
            centre=(0, 0, 0),
            diameter_mm=drawn,
            axes=axes,
            rotation=(w, x, y, z),
            roughness=roughness,
            shape_seed=shape_seed,
            seed=noise_seed,
            sigma_mm=sigma[0] + (sigma[1] - sigma[0]) * u_sigma,
            drawn_mm=drawn,
            contrast_hu=draw_contrast_hu(contrast_hu, noise_seed),
            bulge=draw_bulge(bulge, drawn, noise_seed) if around is not None else 0.0,
        )
        if outlines:
            chosen = int(torch.randint(len(outlines), (), generator=child))
            params = replace(
                params, axes=(1.0, 1.0, 1.0), roughness=OUTLINE_BEND, outline=outlines[chosen]
            )
        touch = u_touch < shape_prior.touch_probability(drawn)
        beyond = around if params.bulge > 0 else None
        field = Field(ground, spacing, [] if merge else placed, gap, beyond)
        result = _fit(params, field, box, lo, hi, touch, child)
        if isinstance(result, LocalMask):
            placed.append(result)
        in_vain = 0 if isinstance(result, LocalMask) else in_vain + 1
        results.append(result)
    return results


@torch.no_grad()
def draw(
    params: TumorParams,
    label: Tensor | Ground,
    organ_labels: int | Iterable[int],
    spacing: Sequence[float],
    *,
    others: Sequence[LocalMask] = (),
    gap_mm: float = 2.0,
    forbid: Tensor | None = None,
    around: Surroundings | None = None,
) -> LocalMask | Skip:
    """The voxels of one tumour, from its params alone: what `place` drew, drawn again.

    others: the tumours placed before it, in order (none if merging was allowed); label, gap_mm,
    forbid and around as given to `place`.
    """
    ground = _ground(label, organ_labels, forbid)
    if not all(0 <= c < n for c, n in zip(params.centre, ground.shape, strict=True)):
        raise ValueError(
            f"the tumour's centre {params.centre} lies outside the label {ground.shape}; "
            "params replay only on a label of the shape they were drawn for"
        )
    beyond = around if params.bulge > 0 else None
    field = Field(ground, check_spacing(spacing), others, gap_mm, beyond)
    result = _voxels(params, Shape(params), field)
    if isinstance(result, LocalMask):
        return result
    return Skip(f"the organ leaves no room for the tumour of {params.diameter_mm:.1f} mm here")


def _ground(
    label: Tensor | Ground, organ_labels: int | Iterable[int], forbid: Tensor | None
) -> Ground:
    labels = check_organ_labels(organ_labels)
    if isinstance(label, Ground):
        return label
    if label.ndim != 3:
        raise ValueError(f"label must be (X, Y, Z), got shape {tuple(label.shape)}")
    if forbid is not None and (forbid.shape != label.shape or forbid.dtype != torch.bool):
        raise ValueError(
            f"forbid must be bool and shaped like label {tuple(label.shape)}, "
            f"got {forbid.dtype} {tuple(forbid.shape)}"
        )
    return Ground.whole(label, labels, forbid)


def _fit(
    params: TumorParams,
    field: Field,
    box: Box,
    lo: float,
    hi: float,
    touch: bool,
    rng: torch.Generator,
) -> LocalMask | Skip:
    """Find a centre for the shape, making it smaller if need be."""
    centres = _candidates(field.of_organ(), box, rng)
    if len(centres) == 0:
        return Skip("no room: other tumours or forbidden voxels fill the organ", params.drawn_mm)
    best = 0
    drawn = params.drawn_mm
    # A shape may be flat by itself; what the organ leaves of it must not be a sliver.
    flattest = min(MIN_FLATNESS, 0.7 * Shape(params).flatness())
    steps = SIZE_STEPS if drawn > lo * 1.01 else 1
    for step in range(steps):
        wanted = drawn * (lo / drawn) ** (step / max(steps - 1, 1))
        diameter = _on_grid(wanted, lo, hi, field.voxel_mm3)
        params = replace(params, diameter_mm=diameter)
        shape = Shape(params)
        if field.around is None:
            ranked = _ranked(shape, field, centres, touch, keep=step == steps - 1)
        else:
            ranked = places(shape, field, centres, params.bulge, rng)
        for x, y, z in ranked[:TRIES_PER_SIZE]:
            result = _voxels(replace(params, centre=(x, y, z)), shape, field)
            if isinstance(result, int):
                best = max(best, result)
            elif result.voxels < 4 * FEW or flatness(result.mask, field.spacing) >= flattest:
                return result
    reason = f"no room for a tumour of {lo:.3g} mm or more in the organ"
    largest = equivalent_diameter(best * field.voxel_mm3)
    if 0 < largest < lo:
        reason += f"; largest that fits: {largest:.1f} mm"
    return Skip(reason, params.drawn_mm)


def _candidates(field: Field, box: Box, rng: torch.Generator) -> Tensor:
    """Up to MAX_CANDIDATES random voxels (M, 3) where a tumour may be, uniform in the organ."""
    start, stop = torch.tensor(box.start), torch.tensor(box.stop)
    u = torch.rand(CENTRE_DRAWS, 3, generator=rng, dtype=torch.float64)
    index = (start + (u * (stop - start)).long()).to(field.device)
    hits = index[field.at(index.T)[0]]
    if len(hits) < MAX_CANDIDATES // 8:  # the organ is a sliver of its box: look at every voxel
        free = field.local(box.start, box.stop).nonzero()
        pick = (torch.rand(MAX_CANDIDATES, generator=rng) * len(free)).long()
        hits = free[pick.to(free.device)] + start.to(free.device) if len(free) else free
    return hits[:MAX_CANDIDATES]


def _ranked(
    shape: Shape, field: Field, centres: Tensor, touch: bool, keep: bool
) -> list[list[int]]:
    """Centres, best first, judged by points in and around the shape.

    Hopeless ones are left out, unless asked to keep the best of them: it tells what would fit.
    """
    inner = shape.points(BALL, BALL_LEVEL)  # uniform in the volume of level <= MAX_LEVEL
    outer = shape.points(RIM, 1.0, MARGIN_MM)
    voxel = torch.tensor(field.spacing, dtype=torch.float64)
    offsets = (torch.cat([inner, outer]) / voxel + shape.offset).round().long()
    offsets = offsets.to(centres.device)
    free, open_ = field.at(centres.T[:, :, None] + offsets.T[:, None])
    core = (BALL_LEVEL <= 1).to(free.device)
    n = len(BALL)
    reach = free[:, :n].float().mean(1) * MAX_LEVEL**3  # volume that could be had / asked for
    inside = free[:, :n][:, core].float().mean(1)
    clear = free[:, n:].float().mean(1)
    # by the volume's border or another tumour, which are no capsule; as bytes: faster than all()
    cut = open_.view(torch.uint8).amin(1) == 0
    reach, inside, clear, cut = (t.cpu() for t in (reach, inside, clear, cut))
    alone = (inside == 1) & (clear == 1)
    at_capsule = (inside >= 0.75) & (inside <= 0.97) & ~cut
    liked = at_capsule if touch else alone
    # Candidates are in random order and the sort is stable: the first liked one is a random one.
    score = inside + 2.0 * liked - 1.0 * cut
    score = torch.where(liked, torch.full_like(score, 3.0), score)
    order = torch.argsort(score, descending=True, stable=True)
    if shape.volume_mm3 >= FEW * field.voxel_mm3:  # else the points say little about voxels
        fits = order[reach[order] >= 0.9]
        order = order[reach[order].argmax()][None] if keep and len(fits) == 0 else fits
    return centres[order.to(centres.device)].tolist()


def _voxels(params: TumorParams, shape: Shape, field: Field) -> LocalMask | int:
    """The tumour's voxels, or how many voxels there was room for."""
    n = max(1, round(math.pi / 6 * params.diameter_mm**3 / field.voxel_mm3))
    voxel = torch.tensor(field.spacing, dtype=torch.float64)
    reach = shape.points(SPHERE, MAX_LEVEL * 1.05) / voxel + shape.offset
    low, high = reach.min(0).values.floor().tolist(), reach.max(0).values.ceil().tolist()
    size = field.shape
    centre = params.centre
    start = [max(0, c + min(int(v), -1)) for c, v in zip(centre, low, strict=True)]
    stop = [min(m, c + max(int(v), 1) + 1) for c, v, m in zip(centre, high, size, strict=True)]
    device = field.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    millimetres = [
        ((torch.arange(a, b, dtype=torch.float64) - c - o) * s).to(device, dtype)
        for a, b, c, o, s in zip(
            start, stop, centre, shape.offset.tolist(), field.spacing, strict=True
        )
    ]
    level, where = shape.level(millimetres, n)
    if len(level) == 0:  # a centre between slices too far apart
        return 0
    # On a coarse grid even the nearest n voxels may lie beyond MAX_LEVEL; a few count wherever.
    limit = math.inf
    if n >= FEW:
        limit = MAX_LEVEL * max(1.0, float(level.kthvalue(min(n, len(level))).values))
    level.masked_fill_(~field.local(start, stop)[where] | (level > limit), math.inf)
    mask = lowest_connected(level, where, n)
    if isinstance(mask, int):
        return mask
    index = mask.nonzero()
    first, last = index.min(0).values, index.max(0).values + 1
    x, y, z = (round(total / n) for total in index.sum(0).tolist())
    if not bool(mask[x, y, z]):
        return 0  # a sickle
    (x0, y0, z0), (x1, y1, z1) = first.tolist(), last.tolist()
    return LocalMask(
        params=params,
        start=(start[0] + x0, start[1] + y0, start[2] + z0),
        mask=mask[x0:x1, y0:y1, z0:z1].clone(),
        voxels=n,
        diameter_mm=equivalent_diameter(n * field.voxel_mm3),
    )


def flatness(mask: Tensor, spacing: Sequence[float]) -> float:
    """Shortest over longest axis (standard deviation in mm) of a bool mask (X, Y, Z)."""
    voxel = torch.tensor(spacing, dtype=torch.float64)
    at = mask.nonzero().cpu() * voxel
    variance = torch.linalg.eigvalsh(at.T.cov(correction=0) + torch.diag(voxel.square() / 12))
    return float((variance[0] / variance[-1]).sqrt())


def equivalent_diameter(volume_mm3: float) -> float:
    """Equivalent diameter: of the sphere of this volume."""
    return (6 * volume_mm3 / math.pi) ** (1 / 3)


def _on_grid(diameter_mm: float, lo: float, hi: float, voxel_mm3: float) -> float:
    """The diameter, moved if whole voxels would otherwise round it out of [lo, hi]."""
    n = max(1, round(math.pi / 6 * diameter_mm**3 / voxel_mm3))
    for better in (n, n + 1, n - 1):
        d = equivalent_diameter(better * voxel_mm3)
        if better >= 1 and lo - 1e-9 <= d <= hi + 1e-9:
            return diameter_mm if better == n else d
    return diameter_mm  # a coarse grid has no size in the range: the nearest one


def check_organ_labels(labels: int | Iterable[int]) -> tuple[int, ...]:
    """One whole number or several, of any number type, as a tuple; ValueError if they are not."""
    found: tuple[int, ...] = ()
    try:
        given: list[Any] = (
            list(islice(labels, MAX_LABELS + 1)) if isinstance(labels, Iterable) else [labels]
        )
    except TypeError:  # a 0-d array says it can be iterated over
        given = [labels]
    try:
        if (
            not isinstance(labels, str)
            and len(given) <= MAX_LABELS
            and all(not is_bool(v) and int(v) == v and -(2**63) <= int(v) < 2**63 for v in given)
        ):
            found = tuple(int(v) for v in given)
    except (TypeError, ValueError, OverflowError):
        pass
    if not found:
        raise ValueError(
            f"organ_labels must be a whole number or at most {MAX_LABELS}, of at most 64 bits, got "
            f"{repr(labels)[:200]}; try organ_labels=(1,)"
        )
    return found


def check_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """mm per voxel along X, Y, Z; ValueError unless three positive finite numbers."""
    values = tuple(float(s) for s in spacing)
    if len(values) != 3 or not all(math.isfinite(s) and s > 0 for s in values):
        raise ValueError(
            f"spacing must be three positive numbers in mm, got {values}; "
            "pass spacing=(dx, dy, dz) or affine=..."
        )
    return values[0], values[1], values[2]


def check_range(
    name: str, value: float | Sequence[float], least: float, most: float
) -> tuple[float, float]:
    """(lo, hi) from a number or a pair, lo >= least, hi <= most."""
    try:
        pair = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * 2
    except (TypeError, ValueError, OverflowError):
        pair = []
    if len(pair) != 2 or any_bool(value) or not least <= pair[0] <= pair[1] <= most:  # NaN included
        raise ValueError(
            f"{name} must be a number or (lo, hi) with {least:g} <= lo <= hi <= {most:g}, "
            f"got {value!r}; {ADVICE.get(name, f'pass {name}=1')}"
        )
    return pair[0], pair[1]


def _size(
    size_mm: float | Sequence[float] | str | SizePrior, prior: str | SizePrior | None
) -> tuple[float, float, SizePrior | None, SizePrior]:
    """lo, hi, the prior that sizes come from (None: log-uniform), the prior of the shapes."""
    if isinstance(size_mm, (str, SizePrior)):
        sizes = get_prior(size_mm)
        return *sizes.range_mm, sizes, get_prior(prior or sizes)
    lo, hi = check_range("size_mm", size_mm, *SIZES_MM)
    return lo, hi, None, get_prior(prior or "liver")


def draw_contrast_hu(range_hu: tuple[float, float] | None, seed: int) -> float | None:
    """HU asked of the tumour of this noise seed, uniform in the range; None without one."""
    if range_hu is None:
        return None
    rng = torch.Generator().manual_seed(seed ^ 0x6875)  # a stream apart from the noise
    return range_hu[0] + (range_hu[1] - range_hu[0]) * float(torch.rand((), generator=rng))


def _count(count: int | Sequence[int] | None, prior: SizePrior, rng: torch.Generator) -> int:
    if count is None:
        return prior.draw_count(rng)
    pair = tuple(count) if isinstance(count, Sequence) else (count, count)
    whole = len(pair) == 2 and all(isinstance(c, Integral) and not is_bool(c) for c in pair)
    if not whole or not 0 <= pair[0] <= pair[1] <= MAX_COUNT:
        raise ValueError(
            f"count must be a whole number or (lo, hi) with 0 <= lo <= hi <= {MAX_COUNT}, "
            f"got {count!r}; pass count=1, count=(1, 3), or None for as many as the prior's cases "
            "have"
        )
    return int(torch.randint(int(pair[0]), int(pair[1]) + 1, (), generator=rng))


def check_size(size_mm: float | Sequence[float] | str | SizePrior) -> None:
    """Raise ValueError where `place` would."""
    _size(size_mm, None)


def check_count(count: int | Sequence[int] | None) -> None:
    """Raise ValueError where `place` would."""
    _count(count, get_prior("liver"), torch.Generator())
