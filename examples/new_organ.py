"""Train a generator for a new organ from scratch: solid lung nodules, tiny networks, on the CPU.

With real data the same two calls are `tumorsynth train autoencoder` and `tumorsynth train denoiser`
on a dataset.json. Here the scans are random and the networks are the smallest.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

import tumorsynth as ts
from tumorsynth.training import autoencoder, denoiser
from tumorsynth.training.config import PRESETS, AutoencoderTraining, DataConfig, DenoiserTraining
from tumorsynth.training.data import Case

SIDE = 56
LUNG, NODULE = 1, 2


def lung(seed: int, nodules: int) -> tuple[torch.Tensor, torch.Tensor]:
    """HU and label (X, Y, Z) of lung with vessels and some nodules of 9 to 14 mm."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1).astype(float)
    hu = rng.normal(-820, 40, (SIDE,) * 3)
    for _ in range(8):  # vessels run along z
        at = rng.uniform(8, SIDE - 8, 2)
        hu[np.linalg.norm(grid[..., :2] - at, axis=-1) < rng.uniform(1, 2.5)] = 30
    label = np.full(hu.shape, LUNG)
    wall = (grid[..., 0] < 6) | (grid[..., 1] < 6)
    hu[wall], label[wall] = 55, 0
    for _ in range(nodules):
        ball = np.linalg.norm(grid - rng.uniform(17, SIDE - 11, 3), axis=-1) < rng.uniform(4.5, 7)
        hu[ball], label[ball] = 35, NODULE
    hu += rng.normal(0, 12, hu.shape)
    return torch.from_numpy(hu), torch.from_numpy(label)


cases = []
for seed in range(3):
    hu, label = lung(seed, nodules=3)
    cases.append(Case(f"lung_{seed}", hu.round().short(), label.byte()))

with tempfile.TemporaryDirectory() as folder:
    runs = Path(folder)
    # the lung preset: a window from -1000 HU, and lung as the tissue around a tumour
    tiny = {**PRESETS["autoencoder"]["tiny"], **PRESETS["autoencoder"]["lung"]}
    autoencoder.train(
        cases, runs / "ae", AutoencoderTraining(**{**tiny, "steps": 300, "picture_every": 0})
    )
    tiny = {**PRESETS["denoiser"]["tiny"], **PRESETS["denoiser"]["lung"]}
    denoiser.train(
        cases,
        str(runs / "ae"),
        runs / "lung",
        DenoiserTraining(**{**tiny, "steps": 250, "picture_every": 0}),
        DataConfig(tumor_label=NODULE, max_diameter_mm=20),
    )

    synth = ts.SynthesizeTumor(
        generator=runs / "lung",
        organ_labels=LUNG,
        tumor_label=NODULE,
        count=1,
        size_mm=(11, 13),
    )
    image, label = (volume[None] for volume in lung(seed=100, nodules=0))  # a lung it never saw
    new_image, new_label = synth(image.float(), label, spacing=(1, 1, 1), seed=0)

(record,) = synth.report
middle = (0, *(slice(c - 2, c + 3) for c in record["centre_voxel"]))
before, after = image[middle].mean(), new_image[middle].mean()
print(f"a nodule of {record['diameter_mm']:.1f} mm at {record['centre_voxel']}")
print(f"in its middle: {before:.0f} HU before, {after:.0f} HU after; those trained on have 35 HU")
