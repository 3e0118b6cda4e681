"""Fit the sizes and shapes of a prior to real masks.

Sizes: the likeliest log-normal, truncated to the prior's range. Shapes: tumours are drawn once, of
the real sizes and through the real slices, from wide distributions of elongation, flatness and
roughness, and measured. `fit_shape` then searches the eight numbers of a prior under which these
draws, weighted by their probability, have the measures of the real masks. A measure's loss is the
mean squared distance of the two cumulative distributions; it is summed over all tumours, the
smaller half and the larger half, so that a prior holds at each size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm

from benchmarks.realism.shape_measures import (
    FEATURES,
    FITTED,
    Interpolation,
    RealTumors,
    drawn_mask,
    features,
    through_slices,
)
from tumorsynth.placement.organ_priors import REFERENCE_MM, SizePrior, bounded_shape

# Mean and standard deviation of what the wide distributions are normal in
WIDE = {"elongation": (1.9, 1.3), "flatness": (2.4, 1.2), "roughness": (-1.6, 0.6)}
# Where the search starts, as `_weights` takes it: mean and sd of elongation; mean, sd and slope of
# flatness; of roughness. Far from it a prior costs, by what it is off in these steps: a hundred
# tumours do not tell eight numbers apart, and what they leave open stays ordinary.
START = np.array([2.0, 1.2, 2.5, 1.0, 0.2, -1.6, 0.4, 0.3])
STEP = np.array([1.0, 0.4, 1.0, 0.4, 0.4, 0.5, 0.15, 0.3])
STEP_LOSS = 0.1  # over the number of tumours; a perfect prior's loss is about 3 over it, by chance
MIN_SD = 0.1
ENOUGH_DRAWS = 200.0  # fewer effective draws than this are penalised
FEW_DRAWS_LOSS = 0.01


@dataclass(frozen=True)
class Pool:
    """Tumours drawn from the wide distributions."""

    tumor: np.ndarray  # (N,) the real tumour whose size and slices each has
    log_size: np.ndarray  # (N,) ln(diameter / REFERENCE_MM)
    drawn: np.ndarray  # (N, 3) in the order of WIDE
    measured: np.ndarray  # (N, FITTED or more)

    def save(self, path: Path) -> None:
        """Write to an .npz file."""
        np.savez(path, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> Pool:
        """Read what `save` wrote."""
        with np.load(path) as data:
            return cls(**{name: data[name] for name in data})


def draw_pool(real: RealTumors, way: Interpolation, count: int, seed: int = 0) -> Pool:
    """Draw and measure tumours of the real sizes in turn."""
    rng = np.random.default_rng(seed)
    tumor, drawn, measured = [], [], []
    for k in range(count):
        which = k % len(real.masks)
        diameter, spacing = float(real.diameters[which]), real.spacings[which].tolist()
        values = [mean + sd * float(rng.standard_normal()) for mean, sd in WIDE.values()]
        mask = drawn_mask(bounded_shape(*values), diameter, k, spacing)
        if mask is None:
            continue
        tumor.append(which)
        drawn.append(values)
        measured.append(features(through_slices(mask, spacing, way)))
    index = np.array(tumor)
    log_size = np.log(real.diameters[index] / REFERENCE_MM)
    return Pool(index, log_size, np.array(drawn), np.array(measured))


class _Target(NamedTuple):
    """One measure of one group of real tumours, beside the pool's."""

    rows: np.ndarray  # of the pool, in order of its measure
    values: np.ndarray  # of the pool, in order
    real: np.ndarray  # in order


def fit_shape(pool: Pool, measured: np.ndarray, chosen: np.ndarray, prior: SizePrior) -> SizePrior:
    """Return the prior with its shape fitted.

    Args:
        pool: drawn tumours.
        measured: (N, len(FEATURES)) of the real tumours that the pool was drawn for.
        chosen: bool (N,), the real tumours to fit to.
        prior: gives what is not fitted.
    """
    size = np.zeros(len(measured))
    size[pool.tumor] = pool.log_size
    middle = float(np.median(size[chosen]))
    smaller = size < middle
    everything = np.ones_like(smaller)
    targets = [
        _target(pool, measured, chosen, group, k)
        for group in (everything, smaller, ~smaller)
        for k in range(FITTED)
    ]

    step_loss = STEP_LOSS / int(chosen.sum())

    def loss(numbers: np.ndarray) -> float:
        weights = _weights(pool, numbers)
        total = sum(float(np.mean(_gaps(target, weights) ** 2)) for target in targets)
        total += step_loss * float(np.square((numbers - START) / STEP).sum())
        effective = weights.sum() ** 2 / (weights**2).sum()
        return total + FEW_DRAWS_LOSS * max(0.0, ENOUGH_DRAWS / effective - 1)

    options = {"maxfev": 3000, "maxiter": 3000, "xatol": 1e-3, "fatol": 1e-6}
    best = minimize(loss, START, method="Nelder-Mead", options=options).x
    values = [round(float(v), 2) for v in best]
    sds = [round(max(abs(float(best[k])), MIN_SD), 2) for k in (1, 3, 6)]
    return replace(
        prior,
        elongation=(values[0], sds[0]),
        flatness=(values[2], sds[1]),
        flatness_slope=values[4],
        roughness=(values[5], sds[2]),
        roughness_slope=values[7],
    )


def weighted_distances(
    pool: Pool, measured: np.ndarray, chosen: np.ndarray, prior: SizePrior
) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of a prior from chosen real tumours, by the pool's draws."""
    numbers = (*prior.elongation, *prior.flatness, prior.flatness_slope)
    weights = _weights(pool, np.array([*numbers, *prior.roughness, prior.roughness_slope]))
    found = {}
    for k, name in enumerate(FEATURES[:FITTED]):
        target = _target(pool, measured, chosen, np.ones_like(chosen), k)
        found[name] = float(np.abs(_gaps(target, weights)).max() + 0.5 / len(target.real))
    return found


def _target(
    pool: Pool, measured: np.ndarray, chosen: np.ndarray, group: np.ndarray, feature: int
) -> _Target:
    """A measure of the chosen tumours of a group; drawn are those of the whole group's sizes."""
    rows = np.flatnonzero(group[pool.tumor])
    rows = rows[pool.measured[rows, feature].argsort()]
    real = np.sort(measured[chosen & group, feature])
    return _Target(rows, pool.measured[rows, feature], real)


def _gaps(target: _Target, weights: np.ndarray) -> np.ndarray:
    """Cumulative distribution of the pool minus the real one's, at the real values."""
    share = weights[target.rows].cumsum()
    count = len(target.real)
    drawn = np.interp(target.real, target.values, share / share[-1])
    return drawn - (np.arange(count) + 0.5) / count


def _weights(pool: Pool, numbers: np.ndarray) -> np.ndarray:
    """The probability of each draw under a prior over that under the wide distributions.

    numbers: mean and sd of elongation, of flatness and its slope, of roughness and its slope.
    """
    e_mean, e_sd, f_mean, f_sd, f_slope, r_mean, r_sd, r_slope = numbers
    means = (e_mean, f_mean + f_slope * pool.log_size, r_mean + r_slope * pool.log_size)
    log_ratio = np.zeros(len(pool.log_size))
    for values, mean, sd, wide in zip(
        pool.drawn.T, means, (e_sd, f_sd, r_sd), WIDE.values(), strict=True
    ):
        sd = max(abs(sd), MIN_SD)
        log_ratio -= 0.5 * ((values - mean) / sd) ** 2 + math.log(sd)
        log_ratio += 0.5 * ((values - wide[0]) / wide[1]) ** 2 + math.log(wide[1])
    return np.exp(log_ratio - log_ratio.max())


def fit_sizes(diameters: np.ndarray, prior: SizePrior) -> SizePrior:
    """Return the prior with the likeliest log-normal within its range."""
    low, high = prior.range_mm
    logs = np.log(diameters[(diameters >= low) & (diameters <= high)])

    def loss(numbers: np.ndarray) -> float:
        mean, sd = float(numbers[0]), abs(float(numbers[1]))
        within = norm.cdf(math.log(high), mean, sd) - norm.cdf(math.log(low), mean, sd)
        return float(len(logs) * math.log(within) - norm.logpdf(logs, mean, sd).sum())

    mean, sd = minimize(loss, [logs.mean(), logs.std()], method="Nelder-Mead").x
    return replace(prior, log_diameter=(round(float(mean), 3), round(abs(float(sd)), 3)))
