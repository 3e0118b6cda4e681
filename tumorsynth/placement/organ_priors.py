"""Priors of each organ: sizes, shapes and counts of its tumours, and how they lie at its capsule.

They are fitted to real masks: tumours of liver and pancreas from the MSD, kidney tumours and cysts
from KiTS23, lung tumours from ULS23 (sizes alone; their shapes are set by hand, since real ones
have spikes that this surface lacks). How often tumours of pancreas and lung touch the organ's
surface is assumed. benchmarks/realism/shapes.py fits and tests sizes and shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

# Bounds on the tails of the distributions; beyond them a shape is a strip, a disc or a star
MIN_AXIS_RATIO = 0.4  # shortest / longest axis
MAX_ROUGHNESS = 0.4  # of the shortest half-axis
REFERENCE_MM = 15.0  # diameter at which shape, roughness and bulge have their mean values
MIN_PROBABILITY = 1e-6  # of a range of sizes; below it sizes are log-uniform in the range


@dataclass(frozen=True)
class SizePrior:
    """Distributions of one kind of tumour.

    Normal distributions are (mean, sd). d is the equivalent diameter in mm: that of the sphere of
    the same volume. logit(x) is ln(x / (1 - x)). Axes and roughness describe the sampled surface;
    they are set so that measurements on its voxels agree with real masks.

    Args:
        name: the name in `PRIORS`.
        log_diameter: normal distribution of ln d, before truncation to ``range_mm``.
        range_mm: smallest and largest d.
        elongation: normal distribution of logit(axis 2 / axis 1).
        flatness: normal distribution of logit(axis 3 / axis 2) at d = 15 mm.
        flatness_slope: added to the mean flatness per unit of ln(d / 15 mm).
        roughness: normal distribution of ln(relative surface amplitude) at d = 15 mm.
        roughness_slope: added to the mean roughness per unit of ln(d / 15 mm).
        capsule: (a, b); a tumour touches the organ's surface with probability
            logistic(a + b ln d).
        count: relative frequency of 1, 2, 3, ... tumours in a case that has any.
        source: the data behind the prior.
        bulge: normal distribution of logit(share of the volume beyond the organ) at d = 15 mm;
            None for organs whose tumours stay inside.
        bulge_slope: added to the mean bulge per unit of ln(d / 15 mm).
    """

    name: str
    log_diameter: tuple[float, float]
    range_mm: tuple[float, float]
    elongation: tuple[float, float]
    flatness: tuple[float, float]
    flatness_slope: float
    roughness: tuple[float, float]
    roughness_slope: float
    capsule: tuple[float, float]
    count: tuple[float, ...]
    source: str
    bulge: tuple[float, float] | None = None
    bulge_slope: float = 0.0

    def draw_diameter(self, lo: float, hi: float, rng: torch.Generator) -> float:
        """Sample an equivalent diameter in mm from the log-normal, truncated to [lo, hi]."""
        normal = NormalDist(*self.log_diameter)
        p_lo, p_hi = normal.cdf(math.log(lo)), normal.cdf(math.log(hi))
        u = _uniform(rng)
        if p_hi - p_lo < MIN_PROBABILITY:
            return lo * (hi / lo) ** u
        return min(max(math.exp(normal.inv_cdf(p_lo + u * (p_hi - p_lo))), lo), hi)

    def draw_shape(
        self, diameter_mm: float, rng: torch.Generator
    ) -> tuple[tuple[float, float, float], float]:
        """Sample relative half-axes, longest first and with product 1, and the roughness."""
        log_size = math.log(diameter_mm / REFERENCE_MM)
        z1, z2, z3 = torch.randn(3, generator=rng, dtype=torch.float64).tolist()
        mean, sd = self.elongation
        elongation = mean + sd * z1
        mean, sd = self.flatness
        flatness = mean + self.flatness_slope * log_size + sd * z2
        mean, sd = self.roughness
        roughness = mean + self.roughness_slope * log_size + sd * z3
        return bounded_shape(elongation, flatness, roughness)

    def touch_probability(self, diameter_mm: float) -> float:
        """Return the probability that a tumour of this size reaches the organ's surface."""
        a, b = self.capsule
        return _logistic(a + b * math.log(diameter_mm))

    def draw_bulge(self, diameter_mm: float, rng: torch.Generator) -> float:
        """Sample the share of the volume beyond the organ; 0 if the prior has no ``bulge``."""
        if self.bulge is None:
            return 0.0
        z = float(torch.randn((), generator=rng, dtype=torch.float64))
        mean, sd = self.bulge
        return _logistic(mean + self.bulge_slope * math.log(diameter_mm / REFERENCE_MM) + sd * z)

    def draw_count(self, rng: torch.Generator) -> int:
        """Sample the number of tumours in a case that has any."""
        weights = torch.tensor(self.count, dtype=torch.float64)
        return 1 + int(torch.multinomial(weights, 1, generator=rng))


def bounded_shape(
    elongation: float, flatness: float, roughness: float
) -> tuple[tuple[float, float, float], float]:
    """Return relative half-axes, longest first and with product 1, and the roughness.

    Args:
        elongation: logit(axis 2 / axis 1).
        flatness: logit(axis 3 / axis 2).
        roughness: ln(relative surface amplitude).
    """
    second = max(_logistic(elongation), MIN_AXIS_RATIO)
    third = max(_logistic(flatness) * second, MIN_AXIS_RATIO)
    longest = (second * third) ** (-1.0 / 3.0)
    axes = (longest, longest * second, longest * third)
    return axes, min(math.exp(roughness), MAX_ROUGHNESS * axes[2])


def get_prior(name: str | SizePrior) -> SizePrior:
    """Return the prior of a name; a prior passes through.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(name, SizePrior):
        return name
    if not isinstance(name, str) or name not in PRIORS:
        known = ", ".join(sorted(PRIORS))
        raise ValueError(
            f"a size prior must be one of {known}, got {name!r}; pass one of "
            "these, or (lo, hi) in mm"
        )
    return PRIORS[name]


def _uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng, dtype=torch.float64))


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


_LIVER = SizePrior(
    name="liver",
    log_diameter=(2.672, 0.905),
    range_mm=(5.0, 100.0),
    elongation=(2.62, 1.82),
    flatness=(3.24, 0.8),
    flatness_slope=0.19,
    roughness=(-1.5, 0.65),
    roughness_slope=0.6,
    capsule=(-4.185, 1.621),  # gives 31 % at 8 mm, 55 % at 15 mm, 79 % at 30 mm
    count=(46, 8, 6, 3, 5, 2, 1, 3, 1, 2),
    source="306 components of the MSD liver tumours; capsule contact from 227 of them",
)

_KIDNEY = SizePrior(
    name="kidney",
    log_diameter=(3.6, 0.638),
    range_mm=(8.0, 150.0),
    elongation=(2.08, 0.95),
    flatness=(3.5, 0.26),
    flatness_slope=0.68,
    roughness=(-2.0, 0.25),  # by eye: as smooth in axial slices as real ones, smoother across them
    roughness_slope=0.2,
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

_PANCREAS = SizePrior(
    name="pancreas",
    log_diameter=(3.081, 0.325),
    range_mm=(6.0, 60.0),
    elongation=(1.75, 1.17),
    flatness=(2.56, 0.83),
    flatness_slope=0.21,
    roughness=(-1.57, 0.32),
    roughness_slope=0.22,
    capsule=(2.2, 0.0),  # assumed: 90 % reach the surface of this thin organ at any size
    count=(279, 2),
    source="283 tumours of the MSD; contact with the surface assumed",
)

_LUNG = SizePrior(
    name="lung",
    log_diameter=(3.118, 0.5),
    range_mm=(5.0, 60.0),
    elongation=(1.8, 1.2),
    flatness=(2.5, 0.9),
    flatness_slope=0.2,
    roughness=(-1.2, 0.2),
    roughness_slope=0.3,
    capsule=(-0.85, 0.0),  # assumed: 30 % reach the pleura
    count=(62, 0, 1),
    source="sizes and counts of 65 tumours of ULS23; shapes by hand, contact assumed",
)

PRIORS: dict[str, SizePrior] = {p.name: p for p in (_LIVER, _KIDNEY, _CYST, _PANCREAS, _LUNG)}
