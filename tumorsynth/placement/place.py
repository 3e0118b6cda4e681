"""Where a synthetic tumour sits and which voxels it takes, in mm, on the label's own grid.

A tumour is a deformed ellipsoid: the level of a point x (mm from the centre) is
|x| / r(direction), r an ellipsoid's radius times a smooth random function of direction. Sets of
equal level are star-shaped. The tumour is the organ's n voxels of lowest level, n from the volume
asked for, so that its volume is right to half a voxel also where the organ's surface cuts it.

Nothing here costs more for a larger volume, except `organ_box`, which looks at every voxel once.
It is done on the CPU, where a label on a GPU is copied to, and levels are float64: the same tumours
everywhere. numpy works on what is small: there torch takes longer to begin than to finish.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.devices import on_cpu
from tumorsynth.placement import centres as _centres
from tumorsynth.placement.allowed import Field, Ground
from tumorsynth.placement.allowed import dilate as dilate
from tumorsynth.placement.arguments import MAX_COUNT as MAX_COUNT
from tumorsynth.placement.arguments import (
    MAX_GAP_MM,
    MAX_SIGMA_MM,
    check_organ_labels,
    check_range,
    check_spacing,
    draw_count,
    sizes,
)
from tumorsynth.placement.arguments import check_count as check_count
from tumorsynth.placement.arguments import check_size as check_size
from tumorsynth.placement.components import largest_part
from tumorsynth.placement.exophytic import Surroundings, draw_bulge
from tumorsynth.placement.organ import Box as Box
from tumorsynth.placement.organ import is_organ as is_organ
from tumorsynth.placement.organ import organ_box as organ_box
from tumorsynth.placement.rasterize import FEW, equivalent_diameter, flatness, on_grid, voxels
from tumorsynth.placement.rasterize import LocalMask as LocalMask
from tumorsynth.placement.shape import Shape
from tumorsynth.placement.shape import TumorParams as TumorParams
from tumorsynth.placement.size_priors import SizePrior

TRIES_PER_SIZE = 4  # candidates drawn in full before the tumour is made smaller
HOPELESS = 8  # tumours in a row without room, after which no more are tried
SIZE_STEPS = 5  # sizes tried, from the one drawn down to the smallest allowed
MIN_FLATNESS = (
    0.33  # shortest / longest axis once the organ has cut it: 95 % of real ones have more
)
OUTLINE_BEND = 0.06  # relative amplitude by which a real outline is bent, standard deviation
MAX_ORGAN_SHARE = 0.25  # of the organ, that a tumour of a prior's size may take


@dataclass(frozen=True)
class Skip:
    """A tumour that was not made, and why."""

    reason: str
    drawn_mm: float | None = None


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
    lo, hi, size_prior, shape_prior = sizes(size_mm, prior)
    sigma = check_range("sigma_mm", sigma_mm, 0.0, MAX_SIGMA_MM)
    gap = check_range("gap_mm", gap_mm, 0.0, MAX_GAP_MM)[0]
    wanted = draw_count(count, shape_prior, rng)
    seeds = torch.randint(1 << 48, (wanted,), generator=rng).tolist()
    if box is None:
        return [Skip(f"no organ: the label has no voxel of {list(ground.labels)}")] * wanted

    field = Field(ground, spacing, gap)
    if size_prior is not None:
        # priors know nothing of how small an organ, or the part of it in a patch, may be
        organ_mm3 = _largest_organ(field, box) * field.voxel_mm3
        hi = min(hi, max(lo, equivalent_diameter(MAX_ORGAN_SHARE * organ_mm3)))
    results: list[LocalMask | Skip] = []
    in_vain = 0
    for seed in seeds:
        if in_vain == HOPELESS:  # each try costs as much as the organ is large
            reason = f"no room for a tumour of {lo:.3g} mm or more in the organ"
            results.append(Skip(f"{reason}: none of the {HOPELESS} before it found any"))
            continue
        if results and isinstance(results[-1], LocalMask) and not merge:
            field.take(results[-1])
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
        result = _fit(params, field, box, lo, hi, touch, beyond, child)
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
    field = Field(ground, check_spacing(spacing), gap_mm)
    for other in others:
        field.take(other)
    result = voxels(params, Shape(params), field, around if params.bulge > 0 else None)
    if isinstance(result, LocalMask):
        return result
    return Skip(f"the organ leaves no room for the tumour of {params.diameter_mm:.1f} mm here")


def _ground(
    label: Tensor | Ground, organ_labels: int | Iterable[int], forbid: Tensor | None
) -> Ground:
    labels = check_organ_labels(organ_labels)
    if isinstance(label, Ground):
        return label if on_cpu(label.label) else label.on_cpu()
    if label.ndim != 3:
        raise ValueError(f"label must be (X, Y, Z), got shape {tuple(label.shape)}")
    if forbid is not None and (forbid.shape != label.shape or forbid.dtype != torch.bool):
        raise ValueError(
            f"forbid must be bool and shaped like label {tuple(label.shape)}, "
            f"got {forbid.dtype} {tuple(forbid.shape)}"
        )
    ground = Ground.whole(label, labels, forbid)
    return ground if on_cpu(label) else ground.on_cpu()


def _fit(
    params: TumorParams,
    field: Field,
    box: Box,
    lo: float,
    hi: float,
    touch: bool,
    around: Surroundings | None,
    rng: torch.Generator,
) -> LocalMask | Skip:
    """Find a centre for the shape, making it smaller if need be."""
    organ = _centres.candidates(field, box, rng)
    if len(organ) == 0:
        return Skip("no room: other tumours or forbidden voxels fill the organ", params.drawn_mm)
    best = 0
    drawn = params.drawn_mm
    steps = SIZE_STEPS if drawn > lo * 1.01 else 1
    for step in range(steps):
        wanted = drawn * (lo / drawn) ** (step / max(steps - 1, 1))
        params = replace(params, diameter_mm=on_grid(wanted, lo, hi, field.voxel_mm3))
        shape = Shape(params)
        # A shape may be flat by itself; what the organ leaves of it must not be a sliver.
        flattest = min(MIN_FLATNESS, 0.7 * shape.flatness())
        if around is None:
            ranked = _centres.within(shape, field, organ, touch, keep=step == steps - 1)
        else:
            ranked = _centres.beyond(shape, field, organ, params.bulge, around, rng)
        for centre in islice(ranked, TRIES_PER_SIZE):
            x, y, z = centre.tolist()
            result = voxels(replace(params, centre=(x, y, z)), shape, field, around)
            if isinstance(result, int):
                best = max(best, result)
            elif result.voxels < 4 * FEW or flatness(result.mask, field.spacing) >= flattest:
                return result
    reason = f"no room for a tumour of {lo:.3g} mm or more in the organ"
    largest = equivalent_diameter(best * field.voxel_mm3)
    if 0 < largest < lo:
        reason += f"; largest that fits: {largest:.1f} mm"
    return Skip(reason, params.drawn_mm)


def _largest_organ(field: Field, box: Box) -> int:
    """Voxels of the organ's largest connected part (one kidney of two), to a few per cent: it is
    looked at on a grid of at most 24 points along each axis."""
    where = box.grown(0, field.spacing)
    steps = [max(1, math.ceil((s.stop - s.start) / 24)) for s in where]
    coarse = [slice(s.start + n // 2, s.stop, n) for s, n in zip(where, steps, strict=True)]
    return largest_part(field.organ(coarse)) * math.prod(steps)


def draw_contrast_hu(range_hu: tuple[float, float] | None, seed: int) -> float | None:
    """HU asked of the tumour of this noise seed, uniform in the range; None without one."""
    if range_hu is None:
        return None
    rng = torch.Generator().manual_seed(seed ^ 0x6875)  # a stream apart from the noise
    return range_hu[0] + (range_hu[1] - range_hu[0]) * float(torch.rand((), generator=rng))
