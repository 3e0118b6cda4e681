"""Sample what is random about one tumour, before a place for it is searched."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tumorsynth.placement.exophytic import sample_bulge
from tumorsynth.placement.settings import PlacementSettings, SizeRange
from tumorsynth.placement.types import TumorParams
from tumorsynth.random_streams import substream

OUTLINE_ROUGHNESS = 0.06  # relative amplitude (standard deviation) by which a real outline is bent
SEED_LIMIT = 1 << 48  # seeds are whole numbers from 0 up to this


class SampledTumor(NamedTuple):
    """Params whose centre is still open, and whether to place them at the organ's surface."""

    params: TumorParams
    touches_capsule: bool


def sample_tumor(
    settings: PlacementSettings, sizes: SizeRange, may_bulge: bool, rng: torch.Generator
) -> SampledTumor:
    """Sample one tumour.

    Args:
        settings: the distributions.
        sizes: range of its diameter, within ``settings.size_range``.
        may_bulge: whether there is a region where it may grow beyond the organ.
        rng: the tumour's own generator.
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
    if settings.outlines:
        chosen = int(torch.randint(len(settings.outlines), (), generator=rng))
        params = replace(
            params,
            axes=(1.0, 1.0, 1.0),
            roughness=OUTLINE_ROUGHNESS,
            outline=settings.outlines[chosen],
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


def _sample_diameter(settings: PlacementSettings, sizes: SizeRange, rng: torch.Generator) -> float:
    if settings.size_prior is not None:
        return settings.size_prior.draw_diameter(sizes.low, sizes.high, rng)
    u = float(torch.rand((), generator=rng, dtype=torch.float64))
    return sizes.low * (sizes.high / sizes.low) ** u
