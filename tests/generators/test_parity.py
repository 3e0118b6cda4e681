"""Equal to the published model: outputs against those of the published model definition.

The fixtures are seeded random weights in the published file format and what the published code
computes from them (../shared/reference). Measured errors are about 1e-6, the demand is 1e-3.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tumorsynth.generators.difftumor import read_difftumor
from tumorsynth.generators.diffusion import Generator

TIGHT = 2e-5  # relative to the largest value; float32 on a CPU


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def make(shared: Path, out: Path, *options: str) -> tuple[Path, Path]:
    pytest.importorskip("omegaconf")
    script = shared / "reference" / "make_checkpoints.py"
    subprocess.run([sys.executable, script, out, *options], check=True)
    return out / "AutoencoderModel.ckpt", out / "liver_early.pt"


@pytest.fixture(scope="module")
def seed1(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(shared, tmp_path_factory.mktemp("seed1"), "--seed", "1")


@pytest.fixture(scope="module")
def generator(seed1: tuple[Path, Path]) -> Generator:
    return Generator.from_difftumor(*seed1)


@pytest.fixture(scope="module")
def expected(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "reference" / "difftumor_expected_seed1.npz") as file:
        return {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}


@pytest.fixture(scope="module")
def crop(expected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return expected["ct"][None, None], expected["mask"][None, None].bool()


@pytest.fixture(scope="module")
def cond(generator: Generator, crop: tuple[Tensor, Tensor]) -> Tensor:
    return generator.condition(*crop)


def zxy(x: Tensor) -> Tensor:
    return x.permute(0, 1, 4, 2, 3)


@torch.no_grad()
def test_encode(generator: Generator, expected: dict[str, Tensor], crop) -> None:
    image, mask = zxy(2 * crop[0] - 1), zxy(crop[1])
    latent = generator.autoencoder.encode(image)[0, :, ::2, ::2, ::2]
    assert difference(latent, expected["latent"]) < TIGHT
    hollowed = generator.autoencoder.encode(image * ~mask)[0, :, ::2, ::2, ::2]
    assert difference(hollowed, expected["masked_latent"]) < TIGHT


def test_condition(cond: Tensor, expected: dict[str, Tensor]) -> None:
    assert difference(cond[0, :, ::2, ::2, ::2], expected["cond"]) < TIGHT


@torch.no_grad()
@pytest.mark.parametrize("t", range(4))
def test_predicted_noise(generator: Generator, cond: Tensor, expected, t: int) -> None:
    eps = generator.denoiser(expected["noise"][:1], torch.tensor([t]), cond)
    assert difference(eps[0, :, ::2, ::2, ::2], expected["eps"][t]) < TIGHT


def test_four_steps(generator: Generator, cond: Tensor, expected: dict[str, Tensor]) -> None:
    latent = generator.sample(cond, noise=expected["noise"][:, None])[0]
    # the first step multiplies an error of the predicted noise by 263
    assert difference(latent, expected["sampled_latent"]) < 5e-3


@torch.no_grad()
def test_codes_and_decode(generator: Generator, expected: dict[str, Tensor]) -> None:
    autoencoder = generator.autoencoder
    latent = autoencoder.denormalize(expected["sampled_latent"][None])
    assert torch.equal(autoencoder.codes(latent)[0], expected["codes"].long())
    decoded = autoencoder.decode(latent)[0, 0, ::3, ::3, ::3]
    assert difference(decoded, expected["decoded"]) < TIGHT


@torch.no_grad()
def test_reconstruction(generator: Generator, expected: dict[str, Tensor], crop) -> None:
    found = generator.autoencoder(zxy(2 * crop[0] - 1))[0, 0, ::3, ::3, ::3]
    assert difference(found, expected["reconstruction"]) < TIGHT


def test_another_seed_and_schedule(shared: Path, tmp_path: Path, generator, seed1) -> None:
    paths = make(shared, tmp_path, "--seed", "2", "--timesteps", "200")
    other = Generator.from_difftumor(*paths)
    assert other.schedule.timesteps == 200 and other.sampler.steps == 50
    own = dict(generator.denoiser.named_parameters())
    same = [name for name, p in other.denoiser.named_parameters() if torch.equal(p, own[name])]
    assert same == []
    with pytest.raises(ValueError, match="another autoencoder"):
        read_difftumor(seed1[0], paths[1])
