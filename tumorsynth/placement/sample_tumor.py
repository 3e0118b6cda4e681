"""Sample what is random about one tumour, before a place for it is searched."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.placement.exophytic import sample_bulge
from tumorsynth.placement.settings import OwnShape, PlacementSettings, SizeRange
from tumorsynth.placement.types import TumorParams
from tumorsynth.random_streams import substream

OUTLINE_ROUGHNESS = 0.06  # relative amplitude (standard deviation) by which a real outline is bent
SCALE_SD = 0.25  # of the logarithm by which a lesion of a generator's own is scaled
Quaternion = tuple[float, float, float, float]
# rotations that take the third axis to the first, second and third
THIRD_AXIS_TO: tuple[Quaternion, ...] = (
    (0.5, 0.5, 0.5, 0.5),
    (0.5, -0.5, -0.5, -0.5),
    (1.0, 0.0, 0.0, 0.0),
)
SEED_LIMIT = 1 << 48  # seeds are whole numbers from 0 up to this


class SampledTumor(NamedTuple):
    """Params whose centre is still open, and whether to place them at the organ's surface."""

    params: TumorParams
    touches_capsule: bool


def sample_tumor(
    settings: PlacementSettings,
    sizes: SizeRange,
    may_bulge: bool,
    rng: torch.Generator,
    vertical: int = 2,
) -> SampledTumor:
    """Sample one tumour.

    Args:
        settings: the distributions.
        sizes: range of its diameter, within ``settings.size_range``.
        may_bulge: whether there is a region where it may grow beyond the organ.
        rng: the tumour's own generator.
        vertical: the sample's axis that the third axis of an upright shape lies along.
    """
    diameter_mm = _sample_diameter(settings, sizes, rng)
    prior = settings.shape_prior
    axes, roughness = prior.draw_shape(diameter_mm, rng)
    quaternion = F.normalize(torch.randn(4, generator=rng, dtype=torch.float64), dim=0)
    u_sigma, u_touch = torch.rand(2, generator=rng, dtype=torch.float64).tolist()
    shape_seed, noise_seed = torch.randint(SEED_LIMIT, (2,), generator=rng).tolist()
    w, x, y, z = quaternion.tolist()
    low_sigma, high_sigma = settings.sigma_range_mm
    params = TumorParams(
        centre=(0, 0, 0),
        diameter_mm=diameter_mm,
        axes=axes,
        rotation=(w, x, y, z),
        roughness=roughness,
        shape_seed=shape_seed,
        seed=noise_seed,
        sigma_mm=low_sigma + (high_sigma - low_sigma) * u_sigma,
        drawn_mm=diameter_mm,
        contrast_hu=sample_contrast_hu(settings.contrast_hu, noise_seed),
        bulge=sample_bulge(settings.bulge, diameter_mm, noise_seed) if may_bulge else 0.0,
    )
    chosen = _sample_shape(settings, diameter_mm, rng)
    if chosen is not None:
        params = replace(
            params,
            axes=(1.0, 1.0, 1.0),
            roughness=OUTLINE_ROUGHNESS,
            outline=chosen.outline,
            rotation=upright(params.rotation, vertical) if chosen.upright else params.rotation,
        )
    return SampledTumor(params, u_touch < prior.touch_probability(diameter_mm))


def sample_contrast_hu(range_hu: tuple[float, float] | None, seed: int) -> float | None:
    """Return the contrast of the tumour with this noise seed, uniform in the range; None for None.

    It has a random stream of its own: no other quantity depends on it.
    """
    if range_hu is None:
        return None
    low, high = range_hu
    return low + (high - low) * float(torch.rand((), generator=substream(seed, "contrast")))


def _sample_shape(
    settings: PlacementSettings, diameter_mm: float, rng: torch.Generator
) -> OwnShape | None:
    """Return one of the outlines, if there are any; of a generator's own, one of a like size."""
    if settings.outlines:
        number = int(torch.randint(len(settings.outlines), (), generator=rng))
        return OwnShape(settings.outlines[number], diameter_mm)
    if not settings.own_shapes:
        return None
    sizes_mm = torch.tensor([one.diameter_mm for one in settings.own_shapes], dtype=torch.float64)
    u = float(torch.rand((), generator=rng, dtype=torch.float64))
    return settings.own_shapes[choose_like_size(sizes_mm, diameter_mm, u)]


def upright(rotation: Quaternion, vertical: int) -> Quaternion:
    """Return a rotation that takes the third axis to one of the sample's, up or down.

    Args:
        rotation: unit quaternion, random; its twist about the third axis remains.
        vertical: the sample's axis.
    """
    w, x, _, z = rotation
    length = math.hypot(w, z)
    twist = (w / length, 0.0, 0.0, z / length) if length > 0 else (1.0, 0.0, 0.0, 0.0)
    if x < 0:  # upside down
        twist = _multiply(twist, (0.0, 1.0, 0.0, 0.0))
    return _multiply(THIRD_AXIS_TO[vertical], twist)


def _multiply(a: Quaternion, b: Quaternion) -> Quaternion:
    """Return the rotation b followed by a."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )


def choose_like_size(sizes_mm: Tensor, diameter_mm: float, u: float) -> int:
    """Return the number of a lesion of about a size, or of the one nearest to it in size.

    Args:
        sizes_mm: of the lesions (N,), float64.
        diameter_mm: the size.
        u: uniform in [0, 1).
    """
    squares = ((sizes_mm / diameter_mm).log() / SCALE_SD).square()
    weights = (-0.5 * (squares - squares.min())).exp()
    return int((weights.cumsum(0) / weights.sum() > u).to(torch.uint8).argmax())


def _sample_diameter(settings: PlacementSettings, sizes: SizeRange, rng: torch.Generator) -> float:
    if settings.size_prior is not None:
        return settings.size_prior.draw_diameter(sizes.low, sizes.high, rng)
    u = float(torch.rand((), generator=rng, dtype=torch.float64))
    return sizes.low * (sizes.high / sizes.low) ** u
