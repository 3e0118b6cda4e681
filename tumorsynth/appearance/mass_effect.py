"""Mass effect: the tissue around a growing tumour is pushed aside before the tumour is painted.

Seen from the tumour's centre every point has a direction and a level l (`Shape`: 1 on the tumour's
surface). Tissue moves along its direction, so that with v = l^3, a volume,

    v before = v - share x c(v);   c = v inside the tumour, 1 at its surface, 0 from REACH on.

Between, c is a smooth step in v, so that displacement falls off as that of an incompressible
medium, 1 / r^2, and a little faster. v before grows with v on every ray, whatever the rays beside
it do: the map is invertible and nothing folds. Rays end at bone, at other tumours and, if asked, at
the organ's capsule; near these less room is made.

Backward maps throughout: the value of a voxel comes from a point nearer the centre, which is in the
volume wherever the centre is. No random number is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.arguments import is_bool
from tumorsynth.devices import onto
from tumorsynth.intensity import BONE_HU, Intensity
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.shape import Shape, fibonacci_sphere
from tumorsynth.placement.types import TumorParams

REACH = 2.2  # level beyond which nothing moves
MAX_SHARE = 0.9  # 1 would draw the tumour's whole inside out of one point
SQUEEZE = 0.5  # room made on a ray, at most this much of what is left up to the next stop
FROM_MM, TO_MM, AUTO_SHARE = 20.0, 50.0, 0.6  # "auto": none up to FROM_MM, AUTO_SHARE from TO_MM
NODES = 14  # points from the centre to the reach where the displacement is computed, on each side
RAYS = fibonacci_sphere(384)
SPREAD = 0.15  # radians over which neighbouring rays are averaged
WINDOW_MM = 2.0  # to each side, where a voxel's surroundings are told from noise
EVEN = 0.1  # the part of an organ that is taken to show nothing but noise
SIGNAL = 4.0  # variance, over that of this part, from which on surroundings are more than noise


@dataclass(frozen=True)
class MassEffect:
    """How much of a tumour's volume makes its room by pushing tissue aside.

    share: of the tumour's volume, 0 to 0.9; the rest takes the place of tissue. "auto": none below
        20 mm, growing to 0.6 at 50 mm (an assumption, not measured).
    capsule: "free": the organ bulges; "fixed": its surface stays where it is.
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
                f'capsule must be "free" or "fixed", got {self.capsule!r}; "fixed" holds the '
                "organ's surface where it is"
            )

    def share_at(self, diameter_mm: float) -> float:
        """The share of a tumour of this equivalent diameter."""
        if isinstance(self.share, str):
            t = min(max((diameter_mm - FROM_MM) / (TO_MM - FROM_MM), 0.0), 1.0)
            return AUTO_SHARE * t * t * (3 - 2 * t)
        return float(self.share)


def check_mass_effect(mass_effect: float | str | MassEffect) -> MassEffect:
    """The MassEffect of a ``mass_effect=`` argument."""
    if isinstance(mass_effect, MassEffect):
        return mass_effect
    return MassEffect(mass_effect)


def push_aside(
    image: Tensor,
    label: Tensor,
    params: TumorParams,
    spacing: Sequence[float],
    organ_labels: tuple[int, ...],
    tumor_label: int,
    intensity: Intensity,
) -> tuple[tuple[slice, slice, slice], Tensor, Tensor, float]:
    """A sample (X, Y, Z) with the tissue around one tumour displaced, the tumour not yet painted.

    Bone (BONE_HU and more, outside of the organ), tumours that are there and what is not finite
    stay in place, the rest moves, image and label by the same field.

    Returns the part of the sample that may have changed, what image and label are there, and the
    largest displacement in mm.
    """
    bone = BONE_HU
    if intensity.limits is not None:  # a scale that ends below shows bone as its end
        end = torch.tensor(intensity.limits[1], dtype=torch.float32)
        bone = min(bone, float(intensity.to_hu(end)) - 1)

    def stays(values: Tensor, labels: Tensor) -> Tensor:
        organ, hu = is_organ(labels, organ_labels), intensity.to_hu(values.float())
        still = ((hu >= bone) & ~organ) | ~hu.isfinite() | (labels == tumor_label)
        return still | ~organ if params.fixed_capsule else still

    def rigid(index: Tensor) -> Tensor:
        x, y, z = (
            onto(i.clamp(0, n - 1), image.device) for i, n in zip(index, image.shape, strict=True)
        )
        return stays(image[x, y, z], label[x, y, z])

    where, source = displacement(params, image.shape, spacing, rigid)
    source = onto(source, image.device)
    before, there = image[where], label[where]
    voxel = onto(torch.tensor(spacing, dtype=torch.float32), image.device)
    shift = source / voxel[:, None, None, None]
    moved = (shift.abs() > 0.01).any(0) & ~stays(before, there)
    grid = moved.nonzero().T
    at = grid + shift[:, moved]
    values = before.float()
    mean, gain = evenness(values, is_organ(there, organ_labels), spacing)
    tissue = mean + gain * (values - mean)  # the rest is noise, and stays where it is
    after = before.clone()
    came, rough, edge = _between(torch.stack([tissue, values - mean, gain]), at)
    # where the noise that stays could not be told, by an old edge, it comes along with the tissue
    missing = (gain * (2 - gain)).sqrt()[moved] * (1 - edge) ** 4
    new = came + (values - tissue)[moved] + missing * rough
    if intensity.limits is not None:
        new = new.clamp(*intensity.limits)
    x, y, z = at.round().long().unbind()
    fine = new.isfinite() & ~stays(before[x, y, z], there[x, y, z])
    after[moved] = torch.where(fine, new.to(after.dtype), before[moved])
    after_label = there.clone()
    after_label[moved] = torch.where(fine, there[x, y, z], there[moved])
    return where, after, after_label, float(source.square().sum(0).max().sqrt())


def displacement(
    params: TumorParams,
    size: Sequence[int],
    spacing: Sequence[float],
    rigid: Callable[[Tensor], Tensor] | None = None,
) -> tuple[tuple[slice, slice, slice], Tensor]:
    """The part of a sample where tissue moves, and (3, X, Y, Z): mm from each of its voxels to
    where its value comes from.

    size, spacing: of the sample, voxels and mm. rigid: for voxel indices (3, N), which of them
    (N,) do not move.
    """
    shape = Shape(params)
    voxel = torch.tensor(spacing, dtype=torch.float64)
    far = shape.points(RAYS, REACH)
    first = (far.amin(0) / voxel + shape.offset).floor().tolist()
    last = (far.amax(0) / voxel + shape.offset).ceil().tolist()
    # points as far apart along each axis as suits the tumour, but no closer than voxels
    steps = torch.maximum((far.amax(0) - far.amin(0)) / (2 * NODES), voxel).tolist()
    part, nodes, matrices = [], [], []
    for axis, centre in enumerate(params.centre):
        low = max(0, centre + int(first[axis]))
        high = min(size[axis], centre + int(last[axis]) + 1)
        at = torch.arange(low - centre, high - centre, dtype=torch.float64)
        at = (at - float(shape.offset[axis])) * spacing[axis]
        count = max(2, math.ceil(float(at[-1] - at[0]) / steps[axis]) + 1)
        nodes.append(torch.linspace(float(at[0]), float(at[-1]), count, dtype=torch.float64))
        matrices.append(_linear(at, nodes[-1]))
        part.append(slice(low, high))
    grid = torch.stack(torch.meshgrid(*nodes, indexing="ij"), -1)
    flat = grid.reshape(-1, 3)
    own = flat @ (shape.rotation / shape.half_axes)
    length = own.norm(dim=1).clamp_min(1e-9)
    near = length < REACH * 1.1 * float(shape.radius(RAYS).max())
    points, own, length = flat[near], own[near], length[near]
    volume = (length / shape.radius(own / length[:, None])) ** 3  # v of the text above
    end, share = _ends(params, shape, voxel, points, rigid)
    t = ((volume - 1) / (end - 1).clamp_min(1e-9)).clamp(0, 1)
    c = torch.where(volume < 1, volume, 1 - t * t * (3 - 2 * t))
    factor = (1 - share * c / volume.clamp_min(1e-12)).clamp_min(0) ** (1 / 3) - 1
    moves = torch.zeros_like(flat)
    moves[near] = points * factor[:, None]
    field = moves.T.reshape(3, *grid.shape[:3])
    for axis, matrix in enumerate(matrices, start=1):
        field = torch.movedim(torch.tensordot(matrix, field, dims=([1], [axis])), 0, axis)
    return (part[0], part[1], part[2]), field.float()


def _ends(
    params: TumorParams,
    shape: Shape,
    voxel: Tensor,
    points: Tensor,
    rigid: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """v at which each point's ray (N,) ends, and the share of the tumour's volume made there."""
    free = torch.full((len(points),), REACH**3, dtype=points.dtype)
    share = torch.full_like(free, params.displaced)
    if rigid is None:
        return free, share
    levels = torch.linspace(1.0, REACH, 32, dtype=points.dtype)
    out = shape.points(RAYS, 1.0)
    index = (out[:, None] * levels[:, None] / voxel + shape.offset).round().long()
    index = index + torch.tensor(params.centre)
    hit = rigid(index.reshape(-1, 3).T).reshape(len(RAYS), len(levels)).cpu()
    if not bool(hit.any()):
        return free, share
    before = (hit.to(torch.uint8).argmax(1) - 1).clamp_min(0)
    ends = torch.where(hit.any(1), levels[before], REACH) ** 3
    # the nearest of the neighbours' ends, then a mean: what is rigid stays, and rays agree
    direction = F.normalize(out, dim=1)
    near = direction @ direction.T > math.cos(2 * SPREAD)
    ends = torch.where(near, ends, math.inf).amin(1)
    weight = F.normalize(points, dim=1).float() @ direction.T.float()
    weight = weight.sub_(math.cos(2.5 * SPREAD)).clamp_min_(0).square_()
    end = ((weight @ ends.float()) / weight.sum(1).clamp_min(1e-30)).to(points.dtype)
    return end, (SQUEEZE * (end - 1)).clamp(0, params.displaced)


def evenness(
    values: Tensor, organ: Tensor, spacing: Sequence[float], signal: float = SIGNAL
) -> tuple[Tensor, Tensor]:
    """Local means of the values (X, Y, Z), and how much of what differs from them is no noise:
    0 where nothing but noise is seen, towards 1 at edges. signal: variance, over that of the most
    even part of the organ, from which on there is more than noise.

    Noise is best left where it is: interpolated it would be smoother where voxels come from between
    others and as it was where they do not, a pattern that real tissue does not have. After Wiener
    (Lee 1980), with the noise's variance from where the organ is most even.
    """
    size = [2 * round(WINDOW_MM / s) + 1 for s in spacing]
    middle = values.mean()  # a float's digits are few for the squares of 1000 HU
    mean = _mean(values - middle, size)
    variance = (_mean((values - middle).square(), size) - mean.square()).clamp_min(1e-12)
    mean = mean + middle
    even = variance[organ] if bool(organ.any()) else variance.flatten()
    even = even[:: 1 + len(even) // 50_000].nanquantile(EVEN)  # vessels and edges have more
    return mean, (1 - (signal * even / variance).square()).clamp_min(0)


def _mean(values: Tensor, size: Sequence[int]) -> Tensor:
    """Mean (X, Y, Z) over a box of odd sides, of what of it lies inside.

    The box is no longer than the volume, which torch's filter could not do.
    """
    out = values[None, None]
    for axis, (side, n) in enumerate(zip(size, values.shape, strict=True)):
        side = min(side, n - (n + 1) % 2)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = side, side // 2
        if side > 1:
            out = F.avg_pool3d(out, kernel, 1, padding, count_include_pad=False)
    return out[0, 0]


def _between(values: Tensor, at: Tensor) -> Tensor:
    """Values (C, X, Y, Z) at fractional voxels (3, N), linear, the border's repeated: (C, N)."""
    last = onto(torch.tensor(values.shape[1:], dtype=at.dtype), at.device)[:, None] - 1
    unit = (2 * at / last.clamp_min(1) - 1).flip(0).T
    found = F.grid_sample(
        values[None], unit[None, None, None], padding_mode="border", align_corners=True
    )
    return found.reshape(len(values), -1)


def _linear(at: Tensor, nodes: Tensor) -> Tensor:
    """(len(at), len(nodes)): weights of linear interpolation; nodes are evenly spaced."""
    step = float(nodes[-1] - nodes[0]) / (len(nodes) - 1)
    if step <= 0:  # one voxel
        return torch.full((len(at), len(nodes)), 1 / len(nodes), dtype=at.dtype)
    return (1 - ((at[:, None] - nodes) / step).abs()).clamp_min(0)
