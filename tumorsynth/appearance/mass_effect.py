"""Mass effect: push the tissue around a growing tumour aside before the tumour is painted.

Seen from the tumour's centre every point has a direction and a level l (`Shape`: 1 on the tumour's
surface). Tissue moves along its direction. With the relative volume v = l^3,

    v before = v - share x c(v),

where c is v inside the tumour, 1 at its surface and 0 from MAX_LEVEL on. Between, c is a smooth
step in v: displacement decays slightly faster than 1 / r^2, that of an incompressible medium.
v before grows with v on every ray, independently of other rays, so the map is invertible and does
not fold. Rays end at bone, at other tumours and, if asked, at the organ's capsule; near these less
tissue is displaced.

All maps are backward: a voxel's value comes from a point nearer the centre, which is in the volume
wherever the centre is. Nothing here is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.along_axis import multiply_along
from tumorsynth.appearance.local_noise import separate_noise
from tumorsynth.arguments import is_bool, keywords_of
from tumorsynth.devices import onto
from tumorsynth.geometry import Box, Rows3
from tumorsynth.intensity import BONE_HU, Intensity
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.shape import Shape, fibonacci_sphere
from tumorsynth.placement.types import TumorParams

MAX_LEVEL = 2.2  # beyond this level nothing moves
MAX_SHARE = 0.9  # 1 would stretch a single point over the whole tumour
MAX_SQUEEZE_SHARE = 0.5  # of the volume up to a ray's end, that may be displaced on it
AUTO_FROM_MM, AUTO_TO_MM = 20.0, 50.0  # diameters between which "auto" grows from 0 ...
AUTO_MAX_SHARE = 0.6  # ... to this share
NODES_PER_SIDE = 14  # nodes of the displacement grid from the centre to MAX_LEVEL
NODE_MARGIN = 1.1  # nodes up to this factor beyond MAX_LEVEL are computed, others do not move
RAY_DIRECTIONS = fibonacci_sphere(384)
RAY_SPREAD_RAD = 0.15  # over this angle the ends of neighbouring rays are averaged
RAY_STEPS = 32  # levels at which a ray is tested for rigid tissue
SIGNAL_RATIO = 4.0  # for `separate_noise`
MIN_SHIFT_VOXELS = 0.01  # smaller displacements leave a voxel as it is


@keywords_of()
@dataclass(frozen=True)
class MassEffect:
    """How much of a tumour's volume pushes tissue aside; the rest replaces tissue.

    Args:
        share: of the tumour's volume, 0 to 0.9. "auto" is 0 below 20 mm and grows to 0.6 at 50 mm
            (an assumption, not measured).
        capsule: "free" lets the organ bulge, "fixed" keeps its surface in place.

    Raises:
        ValueError: for other values.

    Examples:
        >>> synth = ts.SynthesizeTumor(mass_effect=ts.MassEffect(0.5, capsule="fixed"))
    """

    share: float | str = "auto"
    capsule: str = "free"

    def __post_init__(self) -> None:
        if self.share != "auto" and not (
            isinstance(self.share, Real)
            and not is_bool(self.share)
            and 0 <= self.share <= MAX_SHARE
        ):
            raise ValueError(
                f"mass_effect must be a share of the tumour's volume from 0 to {MAX_SHARE}, or "
                f'"auto", got {self.share!r}; try 0.5'
            )
        if self.capsule not in ("free", "fixed"):
            raise ValueError(
                f'capsule must be "free" or "fixed", got {self.capsule!r}; "fixed" keeps the '
                "organ's surface in place"
            )

    def share_at(self, diameter_mm: float) -> float:
        """Return the share for a tumour of this equivalent diameter."""
        if isinstance(self.share, str):
            t = (diameter_mm - AUTO_FROM_MM) / (AUTO_TO_MM - AUTO_FROM_MM)
            t = min(max(t, 0.0), 1.0)
            return AUTO_MAX_SHARE * t * t * (3 - 2 * t)
        return float(self.share)


def check_mass_effect(mass_effect: float | str | MassEffect) -> MassEffect:
    """Return the `MassEffect` of a ``mass_effect=`` argument.

    Args:
        mass_effect: a share, "auto", or a `MassEffect` itself.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(mass_effect, MassEffect):
        return mass_effect
    return MassEffect(mass_effect)


class PushedTissue(NamedTuple):
    """The part of a sample that `push_aside` changes, with the tissue displaced.

    Args:
        region: part of the sample.
        image: what it becomes there.
        label: what it becomes there.
        largest_mm: largest displacement.
    """

    region: Box
    image: Tensor
    label: Tensor
    largest_mm: float


class DisplacementField(NamedTuple):
    """Where the tissue of a part of a sample comes from.

    Args:
        region: part of the sample.
        source_mm: (3, X, Y, Z), mm from each of its voxels to where its value comes from.
    """

    region: Box
    source_mm: Tensor


class RigidTissue(NamedTuple):
    """What does not move: bone outside the organ, present tumours, voxels that are not finite.

    With a fixed capsule, nothing outside the organ moves.
    """

    organ_labels: tuple[int, ...]
    tumor_label: int
    intensity: Intensity
    fixed_capsule: bool

    def bone_hu(self) -> float:
        """HU from which tissue is bone; a scale that clips below shows bone as its upper end."""
        if self.intensity.limits is None:
            return BONE_HU
        end = torch.tensor(self.intensity.limits[1], dtype=torch.float32)
        return min(BONE_HU, float(self.intensity.to_hu(end)) - 1)

    def where(self, values: Tensor, labels: Tensor) -> Tensor:
        """Return which voxels are rigid, for their values and labels of any shape."""
        organ, hu = is_organ(labels, self.organ_labels), self.intensity.to_hu(values.float())
        bone = (hu >= self.bone_hu()) & ~organ
        rigid = bone | ~hu.isfinite() | (labels == self.tumor_label)
        return rigid | ~organ if self.fixed_capsule else rigid


def push_aside(
    image: Tensor,
    label: Tensor,
    params: TumorParams,
    spacing: Sequence[float],
    organ_labels: tuple[int, ...],
    tumor_label: int,
    intensity: Intensity,
    shear: Rows3 | None = None,
    first_phase: Tensor | None = None,
) -> PushedTissue:
    """Displace the tissue around one tumour, in image and label by the same field.

    Bone outside the organ, tumours that are present and voxels that are not finite stay in place.
    The tumour itself is not painted.

    Args:
        image: (X, Y, Z), stays as it is.
        label: (X, Y, Z), stays as it is.
        params: the tumour.
        spacing: mm per voxel.
        organ_labels: label values of the organ.
        tumor_label: label value of tumours.
        intensity: scale of the image.
        shear: of the sample's axes; see `tumorsynth.geometry.Frame`.
        first_phase: (X, Y, Z), the image that shows what is rigid; None for ``image``.
    """
    shown = image if first_phase is None else first_phase
    tissue = RigidTissue(organ_labels, tumor_label, intensity, params.fixed_capsule)

    def rigid(index: Tensor) -> Tensor:
        x, y, z = (
            onto(i.clamp(0, n - 1), image.device) for i, n in zip(index, image.shape, strict=True)
        )
        return tissue.where(shown[x, y, z], label[x, y, z])

    region, source_mm = displacement(params, image.shape, spacing, rigid, shear)
    source_mm = onto(source_mm, image.device)
    before, label_before = image[region.slices], label[region.slices]
    voxel_mm = onto(torch.tensor(spacing, dtype=torch.float32), image.device)
    along = source_mm
    if shear is not None:
        to_axes = onto(torch.linalg.inv(torch.tensor(shear)), image.device)
        along = torch.tensordot(to_axes, source_mm, dims=1)
    shift = along / voxel_mm[:, None, None, None]
    shown_before = shown[region.slices]
    moved = (shift.abs() > MIN_SHIFT_VOXELS).any(0) & ~tissue.where(shown_before, label_before)
    source = moved.nonzero().T + shift[:, moved]
    new = _displaced_values(before, is_organ(label_before, organ_labels), spacing, moved, source)
    if intensity.limits is not None:
        new = new.clamp(*intensity.limits)
    x, y, z = source.round().long().unbind()
    valid = new.isfinite() & ~tissue.where(shown_before[x, y, z], label_before[x, y, z])
    after, label_after = before.clone(), label_before.clone()
    after[moved] = torch.where(valid, new.to(after.dtype), before[moved])
    label_after[moved] = torch.where(valid, label_before[x, y, z], label_before[moved])
    return PushedTissue(region, after, label_after, float(source_mm.square().sum(0).max().sqrt()))


def _displaced_values(
    before: Tensor, organ: Tensor, spacing: Sequence[float], moved: Tensor, source: Tensor
) -> Tensor:
    """Values (N,) of the voxels that move: their tissue comes from ``source``, their noise stays.

    Args:
        before: (X, Y, Z), the image.
        organ: bool, same shape.
        spacing: mm per voxel.
        moved: bool, same shape, with N voxels.
        source: (3, N), fractional voxels.
    """
    values = before.float()
    mean, structure = separate_noise(values, organ, spacing, SIGNAL_RATIO)
    tissue = mean + structure * (values - mean)
    stacked = torch.stack([tissue, values - mean, structure])
    new_tissue, new_deviation, new_structure = _interpolate(stacked, source)
    # at an old edge noise is unknown: there it comes from the source, along with the tissue
    missing = (structure * (2 - structure)).sqrt()[moved] * (1 - new_structure) ** 4
    return new_tissue + (values - tissue)[moved] + missing * new_deviation


def displacement(
    params: TumorParams,
    size: Sequence[int],
    spacing: Sequence[float],
    rigid: Callable[[Tensor], Tensor] | None = None,
    shear: Rows3 | None = None,
) -> DisplacementField:
    """Compute how the tissue around one tumour moves.

    The field is computed on a coarse grid of nodes and interpolated to voxels.

    Args:
        params: the tumour.
        size: voxels of the sample.
        spacing: mm per voxel.
        rigid: called with voxel indices (3, N); returns which of them (N,) do not move.
        shear: of the sample's axes.
    """
    shape = Shape(params)
    axes = _Axes(torch.tensor(spacing, dtype=torch.float64), shear)
    region, nodes, matrices = _displacement_grid(params, shape, size, axes)
    grid = torch.stack(torch.meshgrid(*nodes, indexing="ij"), -1)
    field = _node_displacement(params, shape, axes, axes.to_mm(grid), rigid)
    for axis, matrix in enumerate(matrices, start=1):
        field = multiply_along(matrix, field, axis)
    return DisplacementField(region, field.float())


class _Axes:
    """A sample's axes: mm per voxel along each, and how they are sheared.

    The last dimension of points is x, y, z.
    """

    def __init__(self, voxel_mm: Tensor, shear: Rows3 | None) -> None:
        self.voxel_mm = voxel_mm
        self._shear = None if shear is None else voxel_mm.new_tensor(shear)

    def to_mm(self, along: Tensor) -> Tensor:
        """Return points at right angles, given mm along the axes."""
        return along if self._shear is None else along @ self._shear

    def along(self, points: Tensor) -> Tensor:
        """Return mm along the axes, given points at right angles."""
        return points if self._shear is None else points @ torch.linalg.inv(self._shear)


def _displacement_grid(
    params: TumorParams, shape: Shape, size: Sequence[int], axes: _Axes
) -> tuple[Box, list[Tensor], list[Tensor]]:
    """The part of the sample that may move; along each axis, nodes in mm from the centre, and the
    matrix that interpolates from nodes to voxels."""
    voxel_mm = axes.voxel_mm
    surface = axes.along(shape.points(RAY_DIRECTIONS, MAX_LEVEL))
    first = (surface.amin(0) / voxel_mm + shape.offset).floor().tolist()
    last = (surface.amax(0) / voxel_mm + shape.offset).ceil().tolist()
    # nodes are as far apart along each axis as suits the tumour, but not closer than voxels
    extent = surface.amax(0) - surface.amin(0)
    steps = torch.maximum(extent / (2 * NODES_PER_SIDE), voxel_mm).tolist()
    start, stop, nodes, matrices = [], [], [], []
    for axis, (centre, spacing) in enumerate(zip(params.centre, voxel_mm.tolist(), strict=True)):
        start.append(max(0, centre + int(first[axis])))
        stop.append(min(size[axis], centre + int(last[axis]) + 1))
        at = torch.arange(start[-1] - centre, stop[-1] - centre, dtype=torch.float64)
        at = (at - float(shape.offset[axis])) * spacing
        count = max(2, math.ceil(float(at[-1] - at[0]) / steps[axis]) + 1)
        nodes.append(torch.linspace(float(at[0]), float(at[-1]), count, dtype=torch.float64))
        matrices.append(_linear_weights(at, nodes[-1]))
    region = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return region, nodes, matrices


def _node_displacement(
    params: TumorParams,
    shape: Shape,
    axes: _Axes,
    grid: Tensor,
    rigid: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Displacement in mm (3, X, Y, Z) of nodes (X, Y, Z, 3), by the formula at the top."""
    flat = grid.reshape(-1, 3)
    unit = flat @ (shape.rotation / shape.half_axes)  # the tumour's ellipsoid as unit sphere
    length = unit.norm(dim=1).clamp_min(1e-9)
    near = length < MAX_LEVEL * NODE_MARGIN * float(shape.radius(RAY_DIRECTIONS).max())
    points, unit, length = flat[near], unit[near], length[near]
    volume = (length / shape.radius(unit / length[:, None])) ** 3  # v of the formula
    end, share = _ray_ends(params, shape, axes, points, rigid)
    t = ((volume - 1) / (end - 1).clamp_min(1e-9)).clamp(0, 1)
    c = torch.where(volume < 1, volume, 1 - t * t * (3 - 2 * t))
    factor = (1 - share * c / volume.clamp_min(1e-12)).clamp_min(0) ** (1 / 3) - 1
    moves = torch.zeros_like(flat)
    moves[near] = points * factor[:, None]
    return moves.T.reshape(3, *grid.shape[:3])


def _ray_ends(
    params: TumorParams,
    shape: Shape,
    axes: _Axes,
    points: Tensor,
    rigid: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """v at which each point's ray (N,) ends, and the share of the tumour displaced on it."""
    end = torch.full((len(points),), MAX_LEVEL**3, dtype=points.dtype)
    share = torch.full_like(end, params.displaced)
    if rigid is None:
        return end, share
    levels = torch.linspace(1.0, MAX_LEVEL, RAY_STEPS, dtype=points.dtype)
    surface = shape.points(RAY_DIRECTIONS, 1.0)
    along = axes.along(surface)[:, None]
    index = (along * levels[:, None] / axes.voxel_mm + shape.offset).round().long()
    index = index + torch.tensor(params.centre)
    hit = rigid(index.reshape(-1, 3).T).reshape(len(RAY_DIRECTIONS), len(levels)).cpu()
    if not bool(hit.any()):
        return end, share
    before = (hit.to(torch.uint8).argmax(1) - 1).clamp_min(0)
    ray_ends = torch.where(hit.any(1), levels[before], MAX_LEVEL) ** 3
    # the nearest end among neighbours protects what is rigid; averaging keeps rays consistent
    direction = F.normalize(surface, dim=1)
    neighbours = direction @ direction.T > math.cos(2 * RAY_SPREAD_RAD)
    ray_ends = torch.where(neighbours, ray_ends, math.inf).amin(1)
    weight = F.normalize(points, dim=1).float() @ direction.T.float()
    weight = weight.sub_(math.cos(2.5 * RAY_SPREAD_RAD)).clamp_min_(0).square_()
    end = (weight @ ray_ends.float()) / weight.sum(1).clamp_min(1e-30)
    end = end.to(points.dtype)
    return end, (MAX_SQUEEZE_SHARE * (end - 1)).clamp(0, params.displaced)


def _interpolate(values: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of (C, X, Y, Z) at fractional voxels (3, N); the border is repeated."""
    last = onto(torch.tensor(values.shape[1:], dtype=at.dtype), at.device)[:, None] - 1
    unit = (2 * at / last.clamp_min(1) - 1).flip(0).T
    sampled = F.grid_sample(
        values[None], unit[None, None, None], padding_mode="border", align_corners=True
    )
    return sampled.reshape(len(values), -1)


def _linear_weights(at: Tensor, nodes: Tensor) -> Tensor:
    """(len(at), len(nodes)): weights of linear interpolation from evenly spaced nodes."""
    step = float(nodes[-1] - nodes[0]) / (len(nodes) - 1)
    if step <= 0:  # one voxel
        return torch.full((len(at), len(nodes)), 1 / len(nodes), dtype=at.dtype)
    return (1 - ((at[:, None] - nodes) / step).abs()).clamp_min(0)
