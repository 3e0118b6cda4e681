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
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.priors import SizePrior, get_prior

CENTRE_DRAWS = 1024  # random points in the organ's box; those in the organ are candidates
MAX_CANDIDATES = 256  # of these, how many are scored
TRIES_PER_SIZE = 4  # candidates drawn in full before the tumour is made smaller
SIZE_STEPS = 5  # sizes tried, from the one drawn down to the smallest allowed
MAX_LEVEL = 1.2  # a tumour cut by the organ's surface grows elsewhere by this factor at most
MARGIN_MM = 2.0  # a tumour that is not to touch the capsule stays this far from it
WAVES = 16  # terms of the random surface function
_CHUNK = 1 << 18  # voxels whose surface function is evaluated at once: bounds the memory


@dataclass(frozen=True)
class TumorParams:
    """Everything random about one tumour; with the label and spacing it fixes every voxel."""

    centre: tuple[int, int, int]  # voxel in the sample's grid
    diameter_mm: float  # equivalent diameter asked for: volume = pi / 6 d^3
    axes: tuple[float, float, float]  # relative half-axes, product 1
    rotation: tuple[float, float, float, float]  # unit quaternion (w, x, y, z)
    roughness: float  # relative amplitude of the surface, standard deviation
    shape_seed: int  # seeds the surface and the centre's place within its voxel
    seed: int  # seeds the generator's noise
    sigma_mm: float  # feather
    drawn_mm: float  # diameter drawn, before any shrinking to fit

    def to_dict(self) -> dict[str, Any]:
        """A dict of numbers and tuples of numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TumorParams:
        """The inverse of `to_dict`, also after JSON made lists of the tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


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
    organ = _is_organ(label, _organ_labels(organ_labels))
    plane = organ.any(2)
    start, stop = [], []
    for line in (plane.any(1), plane.any(0), organ.any(0).any(0)):
        hits = line.nonzero()
        if len(hits) == 0:
            return None
        start.append(int(hits[0]))
        stop.append(int(hits[-1]) + 1)
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


@torch.no_grad()
def place(
    label: Tensor,
    organ_labels: int | Iterable[int],
    box: Box | None,
    spacing: Sequence[float],
    *,
    size_mm: float | Sequence[float] | str | SizePrior,
    count: int | Sequence[int] | None = 1,
    rng: torch.Generator,
    sigma_mm: float | Sequence[float] = 1.0,
    gap_mm: float = 2.0,
    merge: bool = False,
    prior: str | SizePrior | None = None,
    forbid: Tensor | None = None,
) -> list[LocalMask | Skip]:
    """Draw `count` tumours inside the organ.

    label: (X, Y, Z), whole numbers of any dtype, any device. box: from `organ_box`. spacing: mm.
    size_mm: equivalent diameter: a number, (lo, hi) drawn log-uniformly, or a named prior.
    count: a number, (lo, hi) inclusive, or None for the prior's own counts per case.
    rng: CPU generator of this sample; one seed per tumour is taken from it.
    sigma_mm: feather, a number or (lo, hi) drawn uniformly. It is only carried in the params.
    gap_mm: at least this much organ between two tumours, and always a voxel; merge: they may touch.
    prior: shapes and capsule contact; by default the one named in size_mm, else "liver".
    forbid: bool (X, Y, Z), voxels no tumour may take.

    Returns one LocalMask (with its params) or Skip (with a reason) per tumour asked for. A tumour
    for which there is no room is made smaller, down to lo, before it is given up; the number of
    attempts is bounded (TRIES_PER_SIZE x SIZE_STEPS).
    """
    spacing = _spacing(spacing)
    labels = _organ_labels(organ_labels)
    lo, hi, size_prior, shape_prior = _size(size_mm, prior)
    sigma = _range("sigma_mm", sigma_mm, least=0.0)
    gap = _range("gap_mm", gap_mm, least=0.0)[0]
    if label.ndim != 3:
        raise ValueError(f"label must be (X, Y, Z), got shape {tuple(label.shape)}")
    if forbid is not None and (forbid.shape != label.shape or forbid.dtype != torch.bool):
        raise ValueError(
            f"forbid must be bool and shaped like label {tuple(label.shape)}, "
            f"got {forbid.dtype} {tuple(forbid.shape)}"
        )
    wanted = _count(count, shape_prior, rng)
    seeds = torch.randint(1 << 48, (wanted,), generator=rng).tolist()
    if box is None:
        return [Skip(f"no organ: the label has no voxel of {list(labels)}")] * wanted

    placed: list[LocalMask] = []
    results: list[LocalMask | Skip] = []
    for seed in seeds:
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
        )
        touch = u_touch < shape_prior.touch_probability(drawn)
        field = _Field(label, labels, spacing, forbid, [] if merge else placed, gap)
        result = _fit(params, field, box, lo, hi, touch, child)
        if isinstance(result, LocalMask):
            placed.append(result)
        results.append(result)
    return results


@torch.no_grad()
def draw(
    params: TumorParams,
    label: Tensor,
    organ_labels: int | Iterable[int],
    spacing: Sequence[float],
    *,
    others: Sequence[LocalMask] = (),
    gap_mm: float = 2.0,
    forbid: Tensor | None = None,
) -> LocalMask | Skip:
    """The voxels of one tumour, from its params alone: what `place` drew, drawn again.

    others: the tumours placed before it, in order (none if merging was allowed); gap_mm and
    forbid as given to `place`.
    """
    if not all(0 <= c < n for c, n in zip(params.centre, label.shape, strict=True)):
        raise ValueError(
            f"the tumour's centre {params.centre} lies outside the label {tuple(label.shape)}; "
            "params replay only on a label of the shape they were drawn for"
        )
    field = _Field(label, _organ_labels(organ_labels), _spacing(spacing), forbid, others, gap_mm)
    result = _voxels(params, _Shape(params), field)
    if isinstance(result, LocalMask):
        return result
    return Skip(f"the organ leaves no room for the tumour of {params.diameter_mm:.1f} mm here")


class _Shape:
    """The surface of one tumour. Lengths in mm; everything on the CPU until `level` is called."""

    def __init__(self, params: TumorParams) -> None:
        rng = torch.Generator().manual_seed(params.shape_seed)
        f64 = torch.float64
        # Plane waves seen on the unit sphere: wave number k has features of about pi / k radians.
        # Range and slope give the angular spectrum measured on real tumours (power ~ degree^-3).
        number = 3.5 * (12.0 / 3.5) ** torch.rand(WAVES, 1, generator=rng, dtype=f64)
        direction = F.normalize(torch.randn(WAVES, 3, generator=rng, dtype=f64), dim=1)
        self.waves = number * direction
        self.phases = 2 * math.pi * torch.rand(WAVES, generator=rng, dtype=f64)
        amplitude = number[:, 0] ** -2.0
        self.amplitudes = params.roughness * amplitude * (2 / (amplitude**2).sum()) ** 0.5
        self.offset = torch.rand(3, generator=rng, dtype=f64) - 0.5  # of the centre, in voxels
        self.half_axes = torch.tensor(params.axes, dtype=f64) * params.diameter_mm / 2
        self.turn = _rotation(params.rotation)
        self.scale = 1.0
        mean_cube = float((self.radius(_SPHERE) ** 3).mean())
        self.scale = mean_cube ** (-1.0 / 3.0)  # so that level 1 encloses the volume asked for

    def radius(self, unit: Tensor) -> Tensor:
        """Relative radius (N,) in unit directions (N, 3) of the ellipsoid's own frame."""
        device, dtype = unit.device, unit.dtype
        waves, phases = self.waves.to(device, dtype), self.phases.to(device, dtype)
        amplitudes = self.amplitudes.to(device, dtype)
        parts = [
            torch.addmm(phases, part, waves.T).cos_() @ amplitudes for part in unit.split(_CHUNK)
        ]
        return torch.cat(parts).exp_() * self.scale

    def points(self, unit: Tensor, level: Tensor | float, margin_mm: float = 0.0) -> Tensor:
        """Points (N, 3) in mm from the centre, at a level, in given directions of the own frame."""
        surface = unit * self.radius(unit)[:, None] * self.half_axes
        surface = surface * (level[:, None] if isinstance(level, Tensor) else level)
        if margin_mm:
            surface = surface + margin_mm * F.normalize(surface, dim=1)
        return surface @ self.turn.T

    def level(self, millimetres: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
        """Level of the grid points that may be among the n lowest, and where these are (bool).

        millimetres: the grid's coordinate vectors, mm from the centre. Returns level (N,) in the
        order of where (X, Y, Z). Points certainly beyond MAX_LEVEL are left out, unless n is small.
        """
        to_own = (self.turn / self.half_axes).to(millimetres[0])  # own = x @ to_own
        x, y, z = (m[:, None] * to_own[i] for i, m in enumerate(millimetres))
        own = x[:, None, None] + y[None, :, None] + z[None, None, :]
        length = own.square().sum(-1).sqrt_()
        most = math.inf if n < 32 else 1.03 * MAX_LEVEL * float(self.radius(_SPHERE).max())
        where = length <= most
        length = length[where].clamp_min_(1e-9)
        return length / self.radius(own[where] / length[:, None]), where


class _Field:
    """Where a tumour may be: organ, less forbidden voxels, less other tumours and their gap."""

    def __init__(
        self,
        label: Tensor,
        labels: tuple[int, ...],
        spacing: tuple[float, float, float],
        forbid: Tensor | None,
        others: Sequence[LocalMask],
        gap_mm: float,
    ) -> None:
        self.label, self.labels, self.spacing, self.forbid = label, labels, spacing, forbid
        self.voxel_mm3 = math.prod(spacing)
        # A box-shaped dilation by ceil(gap / spacing): whatever is left is more than gap away.
        self.gap = [max(1, math.ceil(gap_mm / s - 1e-6)) for s in spacing]
        self.others = [_dilated(other, self.gap) for other in others]

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """For voxel indices (3, ...): may a tumour be there (bool), and is it in the volume."""
        clamped = torch.stack(
            [i.clamp(0, n - 1) for i, n in zip(index, self.label.shape, strict=True)]
        )
        x, y, z = clamped
        within = (clamped == index).all(0)
        free = _is_organ(self.label[x, y, z], self.labels).logical_and_(within)
        if self.forbid is not None:
            free &= ~self.forbid[x, y, z]
        for start, mask in self.others:
            local = [i - s for i, s in zip(index, start, strict=True)]
            i, j, k = (t.clamp(0, n - 1) for t, n in zip(local, mask.shape, strict=True))
            near = (i == local[0]) & (j == local[1]) & (k == local[2])
            free &= ~(near & mask[i, j, k])
        return free, within

    def local(self, start: Sequence[int], stop: Sequence[int]) -> Tensor:
        """The same for a whole box, which must lie in the volume."""
        where = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        free = _is_organ(self.label[where], self.labels)
        if self.forbid is not None:
            free &= ~self.forbid[where]
        for other_start, mask in self.others:
            here, there = [], []
            for a, b, s, n in zip(start, stop, other_start, mask.shape, strict=True):
                first, last = max(a, s), min(b, s + n)
                here.append(slice(first - a, max(last, first) - a))
                there.append(slice(first - s, max(last, first) - s))
            free[tuple(here)] &= ~mask[tuple(there)]
        return free


def _fit(
    params: TumorParams,
    field: _Field,
    box: Box,
    lo: float,
    hi: float,
    touch: bool,
    rng: torch.Generator,
) -> LocalMask | Skip:
    """Find a centre for the shape, making it smaller if need be."""
    centres = _candidates(field, box, rng)
    if len(centres) == 0:
        return Skip("no room: other tumours or forbidden voxels fill the organ", params.drawn_mm)
    best = 0
    drawn = params.drawn_mm
    steps = SIZE_STEPS if drawn > lo * 1.01 else 1
    for step in range(steps):
        wanted = drawn * (lo / drawn) ** (step / max(steps - 1, 1))
        diameter = _on_grid(wanted, lo, hi, field.voxel_mm3)
        params = replace(params, diameter_mm=diameter)
        shape = _Shape(params)
        for centre in _ranked(shape, field, centres, touch)[:TRIES_PER_SIZE]:
            x, y, z = centre
            result = _voxels(replace(params, centre=(x, y, z)), shape, field)
            if isinstance(result, LocalMask):
                return result
            best = max(best, result)
    fits = f"; largest that fits: {_diameter(best * field.voxel_mm3):.1f} mm" if best else ""
    return Skip(f"no room for a tumour of {lo:.3g} mm or more in the organ{fits}", params.drawn_mm)


def _candidates(field: _Field, box: Box, rng: torch.Generator) -> Tensor:
    """Up to MAX_CANDIDATES random voxels (M, 3) where a tumour may be, uniform in the organ."""
    start, stop = torch.tensor(box.start), torch.tensor(box.stop)
    u = torch.rand(CENTRE_DRAWS, 3, generator=rng, dtype=torch.float64)
    index = (start + (u * (stop - start)).long()).to(field.label.device)
    hits = index[field.at(index.T)[0]]
    if len(hits) < MAX_CANDIDATES // 8:  # the organ is a sliver of its box: look at every voxel
        free = field.local(box.start, box.stop).nonzero()
        pick = (torch.rand(MAX_CANDIDATES, generator=rng) * len(free)).long()
        hits = free[pick.to(free.device)] + start.to(free.device) if len(free) else free
    return hits[:MAX_CANDIDATES]


def _ranked(shape: _Shape, field: _Field, centres: Tensor, touch: bool) -> list[list[int]]:
    """Centres, best first, judged by points in and around the shape; hopeless ones left out."""
    inner = shape.points(_BALL, _BALL_LEVEL)  # uniform in the volume of level <= MAX_LEVEL
    outer = shape.points(_SPHERE, 1.0, MARGIN_MM)
    voxel = torch.tensor(field.spacing, dtype=torch.float64)
    offsets = (torch.cat([inner, outer]) / voxel + shape.offset).round().long()
    offsets = offsets.to(centres.device)
    free, within = field.at(centres.T[:, :, None] + offsets.T[:, None])
    core = (_BALL_LEVEL <= 1).to(free.device)
    n = len(_BALL)
    reach = free[:, :n].double().mean(1) * MAX_LEVEL**3  # volume that could be had / asked for
    inside = free[:, :n][:, core].double().mean(1)
    clear = free[:, n:].double().mean(1)
    cut = ~within.all(1)  # by the volume's border, which is no capsule
    reach, inside, clear, cut = (t.cpu() for t in (reach, inside, clear, cut))
    alone = (inside == 1) & (clear == 1)
    at_capsule = (inside >= 0.75) & (inside <= 0.97) & ~cut
    liked = at_capsule if touch else alone
    # Candidates are in random order and the sort is stable: the first liked one is a random one.
    score = inside + 2.0 * liked - 1.0 * cut
    score = torch.where(liked, torch.full_like(score, 3.0), score)
    order = torch.argsort(score, descending=True, stable=True)
    order = order[reach[order] >= 0.9]
    return centres[order.to(centres.device)].tolist()


def _voxels(params: TumorParams, shape: _Shape, field: _Field) -> LocalMask | int:
    """The tumour's voxels, or how many voxels there was room for."""
    n = max(1, round(math.pi / 6 * params.diameter_mm**3 / field.voxel_mm3))
    voxel = torch.tensor(field.spacing, dtype=torch.float64)
    reach = shape.points(_SPHERE, MAX_LEVEL * 1.05) / voxel + shape.offset
    low, high = reach.min(0).values.floor().tolist(), reach.max(0).values.ceil().tolist()
    size = field.label.shape
    start = [max(0, c + min(int(v), -1)) for c, v in zip(params.centre, low, strict=True)]
    stop = [min(m, c + max(int(v), 1) + 1) for c, v, m in zip(params.centre, high, size, strict=True)]
    device = field.label.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    millimetres = [
        ((torch.arange(a, b, dtype=torch.float64) - c - o) * s).to(device, dtype)
        for a, b, c, o, s in zip(
            start, stop, params.centre, shape.offset.tolist(), field.spacing, strict=True
        )
    ]
    level, where = shape.level(millimetres, n)
    # On a coarse grid a small tumour's few voxels may lie beyond MAX_LEVEL: the nearest count.
    limit = max(MAX_LEVEL, float(level.kthvalue(min(n, len(level))).values))
    level.masked_fill_(~field.local(start, stop)[where] | (level > limit), math.inf)
    mask = _lowest_connected(level, where, n)
    if isinstance(mask, int):
        return mask
    index = mask.nonzero()
    first, last = index.min(0).values, index.max(0).values + 1
    middle = index.double().mean(0).round().long().tolist()
    if not bool(mask[middle[0], middle[1], middle[2]]):
        return 0  # a sickle
    (x0, y0, z0), (x1, y1, z1) = first.tolist(), last.tolist()
    return LocalMask(
        params=params,
        start=(start[0] + x0, start[1] + y0, start[2] + z0),
        mask=mask[x0:x1, y0:y1, z0:z1].clone(),
        voxels=n,
        diameter_mm=_diameter(n * field.voxel_mm3),
    )


def _lowest_connected(level: Tensor, where: Tensor, n: int) -> Tensor | int:
    """The n voxels of lowest level that hang together (X, Y, Z), or how many if there are fewer.

    Every connected part of a sublevel set has a lowest voxel. So one local minimum means one
    part, which is the rule; the flood is for shapes that the organ's surface cuts apart.
    level: (N,), infinite where no tumour may be. where: (X, Y, Z) bool, the voxels of level.
    """
    found = 0
    for _ in range(3):
        if int(level.isfinite().sum()) < n:
            break
        lowest = level <= level.kthvalue(n).values
        grid = level.new_full(where.shape, math.inf)
        grid[where] = level.masked_fill(~lowest, math.inf)
        mask = grid.isfinite()
        lowest_near = -F.max_pool3d(-grid[None, None], 3, 1, 1)[0, 0]
        if int((mask & (grid <= lowest_near)).sum()) == 1:
            return mask
        part = _flood(mask, int(grid.argmin()))
        found = int(part.sum())
        if found == n:
            return part
        level = level.masked_fill(lowest & ~part[where], math.inf)
    return max(found, 1) if bool(level.isfinite().any()) else 0


def _flood(mask: Tensor, seed: int) -> Tensor:
    """The 26-connected part of a bool mask (X, Y, Z) that holds the voxel of flat index seed."""
    part = torch.zeros(mask.numel(), dtype=torch.float32, device=mask.device)
    part[seed] = 1.0
    allowed = mask.float()[None, None]
    part = part.view_as(allowed)
    size = 1
    for _ in range(sum(mask.shape)):  # a path that winds more than this is not followed
        for _ in range(4):
            part = F.max_pool3d(part, 3, 1, 1) * allowed
        grown = int(part.sum())
        if grown == size:
            break
        size = grown
    return part[0, 0] > 0


def _dilated(other: LocalMask, gap: list[int]) -> tuple[list[int], Tensor]:
    """Start and mask of a tumour grown by a box of `gap` voxels to each side."""
    x, y, z = gap
    padded = F.pad(other.mask.float(), (z, z, y, y, x, x))[None, None]
    grown = F.max_pool3d(padded, (2 * x + 1, 2 * y + 1, 2 * z + 1), 1, (x, y, z))[0, 0] > 0
    return [s - g for s, g in zip(other.start, gap, strict=True)], grown


def _is_organ(label: Tensor, labels: tuple[int, ...]) -> Tensor:
    if label.dtype == torch.bool:
        return label.clone() if 1 in labels else torch.zeros_like(label)
    organ = label == labels[0]
    for value in labels[1:]:
        organ |= label == value
    return organ


def _rotation(quaternion: tuple[float, float, float, float]) -> Tensor:
    """Rotation matrix (3, 3) of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


def _fibonacci(n: int) -> Tensor:
    """n unit vectors (n, 3) spread evenly over the sphere."""
    k = torch.arange(n, dtype=torch.float64) + 0.5
    z = 1 - 2 * k / n
    turn = math.pi * (1 + 5**0.5) * k
    ring = (1 - z * z).sqrt()
    return torch.stack([ring * turn.cos(), ring * turn.sin(), z], dim=1)


_SPHERE = _fibonacci(96)
_BALL = _fibonacci(160)
# Radii in an order unrelated to the direction (golden ratio), uniform in volume.
_BALL_LEVEL = MAX_LEVEL * ((torch.arange(160, dtype=torch.float64) * 0.6180339887) % 1) ** (1 / 3)


def _diameter(volume_mm3: float) -> float:
    """Equivalent diameter: of the sphere of this volume."""
    return (6 * volume_mm3 / math.pi) ** (1 / 3)


def _on_grid(diameter_mm: float, lo: float, hi: float, voxel_mm3: float) -> float:
    """The diameter, moved if whole voxels would otherwise round it out of [lo, hi]."""
    n = max(1, round(math.pi / 6 * diameter_mm**3 / voxel_mm3))
    for better in (n, n + 1, n - 1):
        d = _diameter(better * voxel_mm3)
        if better >= 1 and lo - 1e-9 <= d <= hi + 1e-9:
            return diameter_mm if better == n else d
    return diameter_mm  # a coarse grid has no size in the range: the nearest one


def _organ_labels(labels: int | Iterable[int]) -> tuple[int, ...]:
    try:
        found = (labels,) if isinstance(labels, int) else tuple(int(v) for v in labels)
    except TypeError:
        found = ()
    if not found:
        raise ValueError(f"organ_labels must be an int or a sequence of ints, got {labels!r}")
    return found


def _spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    values = tuple(float(s) for s in spacing)
    if len(values) != 3 or not all(math.isfinite(s) and s > 0 for s in values):
        raise ValueError(
            f"spacing must be three positive numbers in mm, got {values}; "
            "pass spacing=(dx, dy, dz) or affine=..."
        )
    return values[0], values[1], values[2]


def _range(name: str, value: float | Sequence[float], least: float) -> tuple[float, float]:
    """(lo, hi) from a number or a pair, lo >= least."""
    try:
        pair = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * 2
    except (TypeError, ValueError):
        pair = []
    if len(pair) != 2 or not all(math.isfinite(v) and v >= least for v in pair) or pair[0] > pair[1]:
        raise ValueError(
            f"{name} must be a number or (lo, hi) with {least:g} <= lo <= hi, got {value!r}"
        )
    return pair[0], pair[1]


def _size(
    size_mm: float | Sequence[float] | str | SizePrior, prior: str | SizePrior | None
) -> tuple[float, float, SizePrior | None, SizePrior]:
    """lo, hi, the prior that sizes come from (None: log-uniform), the prior of the shapes."""
    if isinstance(size_mm, (str, SizePrior)):
        sizes = get_prior(size_mm)
        return *sizes.range_mm, sizes, get_prior(prior or sizes)
    lo, hi = _range("size_mm", size_mm, least=0.0)
    if lo <= 0:
        raise ValueError(f"size_mm must be above 0 mm, got {size_mm!r}; try (5, 20)")
    return lo, hi, None, get_prior(prior or "liver")


def _count(count: int | Sequence[int] | None, prior: SizePrior, rng: torch.Generator) -> int:
    if count is None:
        return prior.draw_count(rng)
    pair = (count, count) if isinstance(count, int) else tuple(count)
    if len(pair) != 2 or not all(isinstance(c, int) for c in pair) or not 0 <= pair[0] <= pair[1]:
        raise ValueError(
            f"count must be a whole number or (lo, hi) with 0 <= lo <= hi, got {count!r}"
        )
    return int(torch.randint(pair[0], pair[1] + 1, (), generator=rng))


def dilate(mask: Tensor, gap_mm: float, spacing: Sequence[float]) -> Tensor:
    """A bool mask (X, Y, Z) grown by gap_mm, at least one voxel, along each axis."""
    out = mask.clone()
    for axis, s in enumerate(spacing):
        size = out.shape[axis]
        for _ in range(max(1, math.ceil(gap_mm / s - 1e-6)) if size > 1 else 0):
            before = out.clone()
            out.narrow(axis, 1, size - 1).logical_or_(before.narrow(axis, 0, size - 1))
            out.narrow(axis, 0, size - 1).logical_or_(before.narrow(axis, 1, size - 1))
    return out


# TEMPORARY public names, the lead renames the functions themselves later
check_organ_labels = _organ_labels
check_range = _range


def check_size(size_mm: float | Sequence[float] | str | SizePrior) -> None:
    _size(size_mm, None)


def check_count(count: int | Sequence[int] | None) -> None:
    _count(count, get_prior("liver"), torch.Generator())
