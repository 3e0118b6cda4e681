"""Named priors: how large tumours are, how they are shaped, where they sit, how many there are.

Everything here is data. "liver", "kidney" and "cyst" are fitted to connected components of real
masks (MSD liver tumours, KiTS23 kidney tumours and cysts). "pancreas" and "lung" have no masks
behind them: their shapes are those of early liver tumours, and their sizes and counts are
assumptions from the clinical literature, to be replaced when masks are at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

# Bounds on what a prior's tails may draw: beyond these a shape is a strip, a disc or a star.
MIN_AXIS_RATIO = 0.35
MAX_ROUGHNESS = 0.30


@dataclass(frozen=True)
class SizePrior:
    """Distributions of one kind of tumour. Normal distributions are given as (mean, sd).

    d is the equivalent diameter in mm, the diameter of the sphere of the same volume. "logit" is
    ln(x / (1 - x)). The axis and roughness figures describe the drawn surface, not the voxels:
    they were set so that what is *measured* on drawn voxels agrees with the real masks.
    """

    name: str
    log_diameter: tuple[float, float]  # ln d, d in mm, truncated to range_mm
    range_mm: tuple[float, float]
    elongation: tuple[float, float]  # logit of axis2 / axis1
    flatness: tuple[float, float]  # logit of axis3 / axis2
    flatness_slope: float  # added to the flatness mean per unit of ln(d / 15 mm)
    roughness: tuple[float, float]  # ln of the relative surface amplitude at d = 15 mm
    roughness_slope: float  # added to the roughness mean per unit of ln(d / 15 mm)
    capsule: tuple[float, float]  # P(touches the capsule) = logistic(a + b ln d)
    count: tuple[float, ...]  # relative frequency of 1, 2, 3, ... tumours in a case that has any
    source: str

    def draw_diameter(self, lo: float, hi: float, rng: torch.Generator) -> float:
        """One equivalent diameter in mm within [lo, hi], from the truncated log-normal."""
        normal = NormalDist(*self.log_diameter)
        p_lo, p_hi = normal.cdf(math.log(lo)), normal.cdf(math.log(hi))
        u = _uniform(rng)
        if p_hi - p_lo < 1e-6:  # the prior has nothing to say about sizes this far in its tails
            return lo * (hi / lo) ** u
        return min(max(math.exp(normal.inv_cdf(p_lo + u * (p_hi - p_lo))), lo), hi)

    def draw_shape(
        self, diameter_mm: float, rng: torch.Generator
    ) -> tuple[tuple[float, float, float], float]:
        """Half-axes (longest first, relative, product 1) and the roughness of one tumour."""
        size = math.log(diameter_mm / 15.0)
        z1, z2, z3 = torch.randn(3, generator=rng, dtype=torch.float64).tolist()
        mean, sd = self.elongation
        elongation = max(_logistic(mean + sd * z1), MIN_AXIS_RATIO)
        mean, sd = self.flatness
        flatness = _logistic(mean + self.flatness_slope * size + sd * z2) * elongation
        flatness = max(flatness, MIN_AXIS_RATIO)
        mean, sd = self.roughness
        roughness = min(math.exp(mean + self.roughness_slope * size + sd * z3), MAX_ROUGHNESS)
        longest = (elongation * flatness) ** (-1.0 / 3.0)
        return (longest, longest * elongation, longest * flatness), roughness

    def touch_probability(self, diameter_mm: float) -> float:
        """Probability that a tumour of this size reaches the organ's surface."""
        a, b = self.capsule
        return _logistic(a + b * math.log(diameter_mm))

    def draw_count(self, rng: torch.Generator) -> int:
        """Number of tumours in one case, at least 1."""
        weights = torch.tensor(self.count, dtype=torch.float64)
        return 1 + int(torch.multinomial(weights, 1, generator=rng))


def get_prior(name: str | SizePrior) -> SizePrior:
    """The prior of that name (a prior passes through). Raises ValueError naming the known ones."""
    if isinstance(name, SizePrior):
        return name
    if not isinstance(name, str) or name not in PRIORS:
        known = ", ".join(sorted(PRIORS))
        raise ValueError(f"a size prior must be one of {known}, got {name!r}; or pass (lo, hi) mm")
    return PRIORS[name]


def _uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng, dtype=torch.float64))


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


_LIVER = SizePrior(
    name="liver",
    log_diameter=(2.758, 0.740),
    range_mm=(5.0, 100.0),
    elongation=(1.45, 0.75),
    flatness=(1.65, 0.70),
    flatness_slope=0.2,
    roughness=(-2.5, 0.5),
    roughness_slope=0.4,
    capsule=(-4.185, 1.621),
    count=(45, 8, 6, 3, 5, 3, 1, 2, 1, 2),
    source="MSD liver",
)

PRIORS: dict[str, SizePrior] = {p.name: p for p in (_LIVER,)}
