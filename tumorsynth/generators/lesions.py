"""Real lesions, cut out of annotated scans: voxels, outline, and contrast to the organ around."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.appearance.tissue import AIR_HU, SOFT_TISSUE
from tumorsynth.arguments import format_beside
from tumorsynth.geometry import THICK_SLICES, Box, Frame, Rows3, bounding_box
from tumorsynth.placement.allowed import dilate
from tumorsynth.placement.components import flood
from tumorsynth.placement.rasterize import equivalent_diameter
from tumorsynth.placement.user_shapes import MIN_MASK_VOXELS, measure_outline

FIRST_REACH_VOXELS = 16  # from a voxel, within which its lesion is looked for; doubled as needed
MARGIN_MM = 10.0  # around a lesion, in which it is measured
SHELL_MM = (2.0, 8.0)  # from the lesion, between which the organ is measured
MIN_LEVEL_VOXELS = 50  # of the organ in the shell
EDGES_MM = (0.4, 0.7, 1.0, 1.5, 2.0, 2.5)  # widths of edges that are tried
MIN_CORE_VOXELS = 20  # a smaller core is that of the whole lesion
HU_RANGE = (-3000.0, 3000.0)  # of a lesion's voxels; metal is brighter
TEXTURE_SIGMA_MM = 1.0  # finer texture is the noise of the lesion's own scan, and left there
FILL_SIGMA_MM = 4.0  # of the filter that continues the texture beyond the lesion
MIN_FILTER_WEIGHT = 0.02  # of a filter's weights that must lie in the lesion
MIN_TISSUE_SHARE = 0.5  # of a lesion's voxels that must be tissue, no gas or metal or next to it
BONE_HU = 1500.0  # the densest bone, for lesions in an organ that is brighter than soft tissue


@dataclass(frozen=True)
class Lesion:
    """One real lesion. Its axes run towards right, anterior and superior, as near as they can.

    Args:
        hu: int16 (X, Y, Z), the box around it, with one voxel more on each side.
        mask: bool, same shape.
        to_mm: float64 (3, 3), from voxels to mm along the axes in which its outline was measured.
        centre: voxel (3,), float64, that the outline starts from.
        outline: see `tumorsynth.placement.user_shapes`.
        diameter_mm: equivalent diameter.
        level_hu: median of the organ around.
        contrast_hu: mean of its core minus ``level_hu``.
        edge_mm: standard deviation of the Gaussian that makes its mask as soft as its edge.
        source: name of the scan.
    """

    hu: Tensor
    mask: Tensor
    to_mm: Tensor
    centre: Tensor
    outline: str
    diameter_mm: float
    level_hu: float
    contrast_hu: float
    edge_mm: float
    source: str

    @property
    def has_thick_slices(self) -> bool:
        """Whether it is known in slices, across its third axis, much thicker than their pixels."""
        x, y, z = self.to_mm.norm(dim=0).tolist()
        return z > THICK_SLICES * max(x, y)

    def texture(self) -> Tensor:
        """Return HU above the organ, filtered, continued beyond the lesion: float32 (X, Y, Z).

        Voxels at the lesion's surface, which show part of the organ, do not count.
        """
        voxel_mm = self.to_mm.norm(dim=0).tolist()
        values, counted = self.deviation(), core_of(self.mask).float()
        fine, weight = (
            gaussian_filter(field, [TEXTURE_SIGMA_MM / s for s in voxel_mm])
            for field in (values * counted, counted)
        )
        wide, wide_weight = (
            gaussian_filter(field, [max(FILL_SIGMA_MM / s, 1.0) for s in voxel_mm])
            for field in (values * counted, counted)
        )
        mean = (values * counted).sum() / counted.sum()
        filled = torch.where(
            wide_weight > MIN_FILTER_WEIGHT, wide / wide_weight.clamp(min=MIN_FILTER_WEIGHT), mean
        )
        return torch.where(
            weight > MIN_FILTER_WEIGHT, fine / weight.clamp(min=MIN_FILTER_WEIGHT), filled
        )

    def deviation(self) -> Tensor:
        """Return HU above the organ around, as they are: float32 (X, Y, Z)."""
        return self.hu.float() - self.level_hu


class NoTissue(str):
    """Why a lesion is left out whose label must be wrong: it lies on what is no tumour's tissue."""


class CutScan(NamedTuple):
    """The lesions of one scan, and why others of it were left out."""

    lesions: list[Lesion]
    left_out: list[str]


def cut_lesions(
    hu: Tensor,
    label: Tensor,
    frame: Frame,
    tumor_label: int,
    organ_labels: Sequence[int],
    source: str,
) -> CutScan:
    """Cut the lesions out of a scan.

    Args:
        hu: (X, Y, Z), on the CPU.
        label: the same shape, whole numbers.
        frame: how the axes lie in the patient.
        tumor_label: value of the lesions.
        organ_labels: values of the organ around them.
        source: name of the scan.
    """
    lesions: list[Lesion] = []
    left_out: list[str] = []
    whole = Box.whole(label.shape)
    for mask, box in _components(label == tumor_label):
        where = f"the lesion of {source} at voxel {tuple(box.start)}"
        if int(mask.sum()) < MIN_MASK_VOXELS:
            left_out.append(f"{where} has fewer than {MIN_MASK_VOXELS} voxels")
            continue
        if box.grown(1).within(whole) != box.grown(1):
            left_out.append(f"{where} touches the scan's border")
            continue
        region = box.grown_mm(MARGIN_MM, frame.plane_distance).within(whole)
        found = _measure(hu[region.slices], label[region.slices], mask, box.relative_to(region))
        lesion = found.lesion(frame, tumor_label, organ_labels, source)
        if isinstance(lesion, Lesion):
            lesions.append(lesion)
        else:
            left_out.append(type(lesion)(f"{where} {lesion}"))
    return CutScan(lesions, left_out)


def core_of(mask: Tensor) -> Tensor:
    """Return a mask without the voxels that touch another outside it by a face.

    Of a flat mask that would leave too little of, only voxels at the rim of its slices count as
    outermost; of a tiny one none do.
    """
    for axes in ((0, 1, 2), (0, 1), ()):
        core = mask.clone()
        for axis in axes:
            for step in (-1, 1):
                core &= mask.roll(step, axis)
        if int(core.sum()) >= MIN_CORE_VOXELS:
            return core
    return mask


@dataclass(frozen=True)
class _Found:
    """A lesion with its surroundings; ``mask`` has their shape."""

    hu: Tensor
    label: Tensor
    mask: Tensor

    def lesion(
        self, frame: Frame, tumor_label: int, organ_labels: Sequence[int], source: str
    ) -> Lesion | str:
        """Measure the lesion, or return what is wrong with it."""
        hu, label, mask = (_to_ras(x, frame) for x in (self.hu, self.label, self.mask))
        spacing = [frame.spacing[axis] for axis in frame.axes]
        shear = _shear_to_ras(frame)
        if not bool(hu[mask].isfinite().all()):
            return "holds NaN or infinite values"
        organ = torch.isin(label, torch.tensor(list(organ_labels))) & hu.isfinite()
        inner, outer = (dilate(mask, mm, spacing) for mm in SHELL_MM)
        shell = organ & outer & ~inner
        if int(shell.sum()) < MIN_LEVEL_VOXELS:
            shell = organ & outer & ~mask
        if int(shell.sum()) < MIN_LEVEL_VOXELS:
            return f"has fewer than {MIN_LEVEL_VOXELS} voxels of the organ around it"
        level = float(hu[shell].median())
        objection = _tissue_objection(hu[mask], level)
        if objection is not None:
            return objection
        tissue = mask & ~_near_gas_or_metal(hu, mask, level)
        if int(tissue.sum()) < MIN_TISSUE_SHARE * int(mask.sum()):
            low, high = _voxel_range(level)
            return NoTissue(
                f"lies for more than half in or next to gas, padding or metal (below {low:g} or "
                f"above {high:g} HU, median of the lesion {float(hu[mask].median()):.0f} HU)"
            )
        hu = torch.where(mask & ~tissue, hu[tissue].median(), hu)
        core = core_of(mask)
        box = bounding_box(mask, 1)
        assert box is not None
        outline = measure_outline(mask, spacing, source, shear)
        to_mm = torch.diag(torch.tensor(spacing, dtype=torch.float64))
        if shear is not None:
            to_mm = torch.tensor(shear, dtype=torch.float64) @ to_mm
        volume = int(mask.sum()) * float(torch.linalg.det(to_mm))
        nearby = (organ | mask) & outer
        low, high = HU_RANGE
        return Lesion(
            hu=hu[box.slices].nan_to_num(level, high, low).clamp(low, high).round().short(),
            mask=mask[box.slices].contiguous(),
            to_mm=to_mm,
            centre=outline.centre - torch.tensor(box.start),
            outline=outline.text,
            diameter_mm=equivalent_diameter(volume),
            level_hu=level,
            contrast_hu=float(hu[core].mean()) - level,
            edge_mm=_edge_mm(hu - level, mask, nearby, spacing),
            source=source,
        )


def _tissue_objection(values: Tensor, level: float) -> NoTissue | None:
    """Return why most of a lesion's voxels are no tumour's tissue, or None.

    Args:
        values: HU of its voxels.
        level: median of the organ around, which may be lung or bone.
    """
    low, high = SOFT_TISSUE.local_hu
    if level < SOFT_TISSUE.level_hu[0]:  # ground glass in a lung; a solid nodule is soft tissue
        low = min(low, level)
    if level > SOFT_TISSUE.level_hu[1]:
        high = BONE_HU
    median = float(values.median())
    if low <= median <= high:
        return None
    found = format_beside(median, (low, high), ".0f")
    return NoTissue(
        f"has a median of {found} HU, where tumours have {low:.0f} to {high:.0f} HU in an "
        f"organ of {level:.0f} HU: its label lies on air, padding, gas, bone or metal"
    )


def _voxel_range(level: float) -> tuple[float, float]:
    """Return between which HU a lesion's voxels are pasted, in an organ of this level."""
    low, high = SOFT_TISSUE.voxel_hu
    return (AIR_HU if level < low else low), (BONE_HU if level > SOFT_TISSUE.level_hu[1] else high)


def _near_gas_or_metal(hu: Tensor, mask: Tensor, level: float) -> Tensor:
    """Return the voxels that hold gas, padding or metal of a lesion, or a part of it, as a mask."""
    low, high = _voxel_range(level)
    foreign = mask & ((hu < low) | (hu > high))
    if not bool(foreign.any()):
        return foreign
    return F.max_pool3d(foreign[None].float(), 3, stride=1, padding=1)[0] > 0


def _measure(hu: Tensor, label: Tensor, mask: Tensor, box: Box) -> _Found:
    whole = torch.zeros(hu.shape, dtype=torch.bool)
    whole[box.slices] = mask
    return _Found(hu.float(), label, whole)


def _edge_mm(deviation: Tensor, mask: Tensor, nearby: Tensor, spacing: Sequence[float]) -> float:
    """Return the width of the edge, of those in EDGES_MM, that explains the voxels nearby best."""
    values, best = deviation[nearby], (math.inf, EDGES_MM[0])
    for sigma in EDGES_MM:
        soft = gaussian_filter(mask.float(), [sigma / s for s in spacing])[nearby]
        height = (soft * values).sum() / soft.square().sum()
        best = min(best, (float((values - height * soft).square().sum()), sigma))
    return best[1]


def _components(mask: Tensor) -> list[tuple[Tensor, Box]]:
    """Return the 26-connected components of a mask, each in the box around it."""
    found = []
    left, whole = mask.clone(), Box.whole(mask.shape)
    for seed in mask.nonzero():
        if not bool(left[tuple(seed.tolist())]):
            continue
        reach = FIRST_REACH_VOXELS
        while True:
            around = Box.at(seed.tolist(), (1, 1, 1)).grown(reach).within(whole)
            part = left[around.slices].contiguous()
            at = [int(s) - a for s, a in zip(seed, around.start, strict=True)]
            flat = (at[0] * part.shape[1] + at[1]) * part.shape[2] + at[2]
            component = torch.from_numpy(flood(part.numpy(), flat))
            inner = bounding_box(component)
            assert inner is not None
            if around == whole or not _touches_cut(inner, around, whole):
                break
            reach *= 2
        left[around.slices] &= ~component
        start = [a + b for a, b in zip(around.start, inner.start, strict=True)]
        found.append((component[inner.slices].contiguous(), Box.at(start, inner.shape)))
    return found


def _touches_cut(inner: Box, around: Box, whole: Box) -> bool:
    """Whether a component may go on beyond the box in which it was looked for."""
    return any(
        (a == 0 and low > 0) or (b == high - low and high < end)
        for a, b, low, high, end in zip(
            inner.start, inner.stop, around.start, around.stop, whole.stop, strict=True
        )
    )


def _to_ras(volume: Tensor, frame: Frame) -> Tensor:
    flipped = [axis for axis in range(3) if frame.flips[axis]]
    return volume.permute(frame.axes).flip(flipped).contiguous()


def _shear_to_ras(frame: Frame) -> Rows3 | None:
    if frame.shear is None:
        return None
    signs = torch.tensor([-1.0 if flip else 1.0 for flip in frame.flips], dtype=torch.float64)
    shear = torch.tensor(frame.shear, dtype=torch.float64)[list(frame.axes)][:, list(frame.axes)]
    turned = signs[:, None] * shear * signs
    a, b, c = ((float(x), float(y), float(z)) for x, y, z in turned.tolist())
    return a, b, c
