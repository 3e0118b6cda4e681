"""Named priors: how large tumours are, how they are shaped, where they sit, how many there are.

Everything here is data. "liver", "kidney" and "cyst" are fitted to connected components of real
masks (MSD liver tumours, KiTS23 kidney tumours and cysts). "pancreas" and "lung" have no masks
behind them: their shapes are those of early liver tumours, and their sizes and counts are
assumptions from the clinical literature, to be replaced when masks are at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

# Bounds on what a prior's tails may draw: beyond these a shape is a strip, a disc or a star.
MIN_AXIS_RATIO = 0.4
MAX_ROUGHNESS = 0.4  # of the shortest half-axis


@dataclass(frozen=True)
class SizePrior:
    """Distributions of one kind of tumour. Normal distributions are given as (mean, sd).

    d is the equivalent diameter in mm, the diameter of the sphere of the same volume. "logit" is
    ln(x / (1 - x)). The axis and roughness figures describe the drawn surface, not the voxels:
    they were set so that what is *measured* on drawn voxels agrees with the real masks.
    """

    name: str
    log_diameter: tuple[float, float]  # ln d, d in mm, before truncation to range_mm
    range_mm: tuple[float, float]
    elongation: tuple[float, float]  # logit of axis2 / axis1
    flatness: tuple[float, float]  # logit of axis3 / axis2
    flatness_slope: float  # added to the flatness mean per unit of ln(d / 15 mm)
    roughness: tuple[float, float]  # ln of the relative surface amplitude at d = 15 mm
    roughness_slope: float  # added to the roughness mean per unit of ln(d / 15 mm)
    capsule: tuple[float, float]  # P(touches the capsule) = logistic(a + b ln d)
    count: tuple[float, ...]  # relative frequency of 1, 2, 3, ... tumours in a case that has any
    source: str
    bulge: tuple[float, float] | None = None  # logit of the share beyond the organ at d = 15 mm
    bulge_slope: float = 0.0  # added to the bulge mean per unit of ln(d / 15 mm)

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
        roughness = math.exp(mean + self.roughness_slope * size + sd * z3)
        longest = (elongation * flatness) ** (-1.0 / 3.0)
        axes = (longest, longest * elongation, longest * flatness)
        return axes, min(roughness, MAX_ROUGHNESS * axes[2])

    def touch_probability(self, diameter_mm: float) -> float:
        """Probability that a tumour of this size reaches the organ's surface."""
        a, b = self.capsule
        return _logistic(a + b * math.log(diameter_mm))

    def draw_bulge(self, diameter_mm: float, rng: torch.Generator) -> float:
        """Share of a tumour's volume beyond the organ; 0 for organs whose tumours stay inside."""
        if self.bulge is None:
            return 0.0
        z = float(torch.randn((), generator=rng, dtype=torch.float64))
        mean, sd = self.bulge
        return _logistic(mean + self.bulge_slope * math.log(diameter_mm / 15.0) + sd * z)

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
    log_diameter=(2.403, 1.022),
    range_mm=(5.0, 100.0),
    elongation=(2.0, 1.4),
    flatness=(2.5, 1.2),
    flatness_slope=0.5,
    roughness=(-1.72, 0.5),
    roughness_slope=0.7,
    capsule=(-4.185, 1.621),  # 33 % at 8 mm, 54 % at 15 mm, 84 % at 30 mm
    count=(46, 8, 6, 3, 5, 2, 1, 3, 1, 2),
    source="306 components of the MSD liver tumours; capsule contact from 227 of them",
)

_KIDNEY = SizePrior(
    name="kidney",
    log_diameter=(3.597, 0.640),
    range_mm=(8.0, 150.0),
    elongation=(2.7, 1.06),
    flatness=(3.2, 0.9),
    flatness_slope=0.68,
    roughness=(-2.0, 0.25),
    roughness_slope=0.15,
    capsule=(-2.094, 1.928),
    count=(439, 37, 12),
    source="558 tumours of KiTS23",
    bulge=(-0.8, 1.5),
)

_CYST = SizePrior(
    name="cyst",
    log_diameter=(2.345, 0.789),
    range_mm=(4.5, 80.0),
    elongation=(1.92, 1.30),
    flatness=(2.6, 1.2),
    flatness_slope=0.55,
    roughness=(-2.05, 0.3),
    roughness_slope=0.0,
    capsule=(-3.798, 2.048),
    count=(87, 60, 27, 15, 21, 10, 3, 11, 1, 5),
    source="805 kidney cysts of KiTS23",
    bulge=(-1.1, 2.3),
    bulge_slope=0.6,
)

# No masks behind these two: early liver tumours' shapes, a little rounder (round to oval). Sizes
# are assumptions: ductal carcinoma at detection around 2.5 cm, most lung nodules under 1 cm.
_PANCREAS = replace(
    _LIVER,
    name="pancreas",
    log_diameter=(3.0, 0.45),
    range_mm=(5.0, 50.0),
    elongation=(2.1, 1.0),
    flatness=(2.1, 0.8),
    roughness=(-2.0, 0.3),
    capsule=(2.2, 0.0),  # a thin organ: 90 % reach its surface at any size
    count=(1,),
    source="assumed sizes and contact; shapes of early MSD liver tumours, rounder",
)

_LUNG = replace(
    _PANCREAS,
    name="lung",
    log_diameter=(2.2, 0.45),
    range_mm=(4.0, 30.0),
    capsule=(-0.85, 0.0),  # 30 % reach the pleura
    count=(6, 2, 1),
    source="assumed sizes, contact and counts; shapes of early MSD liver tumours, rounder",
)

PRIORS: dict[str, SizePrior] = {p.name: p for p in (_LIVER, _KIDNEY, _CYST, _PANCREAS, _LUNG)}
