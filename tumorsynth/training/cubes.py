"""Sample the cubes that stage 1 learns from: jittered, some with a hole."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tumorsynth.training.config import AutoencoderTraining
from tumorsynth.training.data import Case, augment, random_patch, to_unit


def case_shares(cases: list[Case]) -> np.ndarray:
    """Return the probability of each case.

    Annotated scans show the organ of interest: together they are as probable as all others
    together. Within either group the probability grows with the square root of the volume.
    """
    size = np.array([case.hu.numel() ** 0.5 for case in cases])
    annotated = np.array([case.label is not None for case in cases])
    shares = size / size.sum()
    if annotated.any() and not annotated.all():
        shares = np.where(annotated, size / size[annotated].sum(), size / size[~annotated].sum())
    return shares / shares.sum()


def sample_cube(
    cases: list[Case], shares: np.ndarray, config: AutoencoderTraining, rng: np.random.Generator
) -> Tensor:
    """Sample a cube (1, side, side, side) in [-1, 1], axes (z, x, y), with jittered HU."""
    case = cases[int(rng.choice(len(cases), p=shares))]
    tissue = (config.tissue_low, config.tissue_high)
    patch = augment(random_patch(case, config.patch_size, rng, tissue)[None], rng)
    gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-15, 15)
    unit = to_unit(patch * gain + offset, (config.window_low, config.window_high))
    cube = (unit * 2 - 1).permute(0, 3, 1, 2).contiguous()
    return add_hole(cube, rng) if rng.random() < config.hollow else cube


def add_hole(cube: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a cube (1, side, side, side) with a ball of one value put in.

    The value is 0, as in the holes of stage 2, or random; the radius is a twelfth to a quarter of
    the side. In a crop of nearly uniform tissue, above all lung, normalisation layers magnify
    whatever stands out, unless such crops were trained on.
    """
    side = cube.shape[-1]
    radius = rng.uniform(side / 12, side / 4)
    axes = [torch.arange(side) - float(rng.uniform(0.2, 0.8)) * side for _ in range(3)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    stretch = rng.uniform(0.7, 1.4)
    ball = ((x * stretch) ** 2 + y**2 + z**2 < radius**2)[None]
    value = 0.0 if rng.random() < 0.5 else float(rng.uniform(-0.9, 0.9))
    return torch.where(ball, torch.tensor(value), cube)
