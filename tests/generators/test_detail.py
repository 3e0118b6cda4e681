"""The autoencoder's detail channels, which carry a scan's noise past the denoiser."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from balls import make_cases
from tiny import tiny_crop, tiny_generator

from tumorsynth.generators.diffusion import Generator
from tumorsynth.generators.folder import read_folder
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.training.autoencoder import train
from tumorsynth.training.config import PRESETS, AutoencoderTraining, configured
from tumorsynth.training.folders import read_autoencoder
from tumorsynth.training.networks import NETWORKS

TINY = tiny_generator()


def with_detail(channels: int, seed: int = 0) -> Autoencoder:
    """The tiny autoencoder with detail, fitted to noise that is smooth along the first axis."""
    trained = TINY.autoencoder
    autoencoder = Autoencoder(replace(trained.config, detail_channels=channels)).eval()
    autoencoder.load_state_dict({**autoencoder.state_dict(), **trained.state_dict()})
    autoencoder.fit_detail(volume(seed + k) for k in range(4))
    return autoencoder


def volume(seed: int) -> torch.Tensor:
    noise = torch.randn(1, 1, 20, 16, 16, generator=torch.Generator().manual_seed(seed))
    return (0.2 * noise.unfold(2, 5, 1).mean(-1)).clamp(-1, 1)


@pytest.mark.parametrize("channels", [1, 24, 64])
def test_the_directions_are_orthonormal_and_all_of_them_give_the_scan_back(channels):
    autoencoder = with_detail(channels)
    basis = autoencoder.detail_basis
    assert basis.shape == (channels, 64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(channels), atol=1e-5, rtol=0)
    x = volume(9)
    with torch.no_grad():
        off = (autoencoder(x) - x).square().mean().sqrt()
    assert (off < 1e-5) == (channels == 64)


def test_each_further_direction_lowers_the_error_more_than_a_random_one_would():
    x = volume(9)
    with torch.no_grad():
        errors = [
            float((with_detail(channels)(x) - x).square().mean()) for channels in (0, 8, 24, 48)
        ]
        drawn = with_detail(24)
        random = torch.linalg.qr(torch.randn(64, 24, generator=torch.Generator().manual_seed(1)))[0]
        drawn.detail_basis.copy_(random.T)
        unfitted = float((drawn(x) - x).square().mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * unfitted


def test_a_painted_crop_has_the_scans_detail_and_a_change_is_the_same_without():
    crop, mask = tiny_crop(2)
    detailed = Generator(with_detail(64), TINY.denoiser, TINY.sampler, TINY.card)
    plain = TINY.change(crop, mask, seed=3)
    assert torch.equal(detailed.change(crop, mask, seed=3), plain)
    painted = detailed.inpaint(crop, mask, seed=3)
    off = painted - (crop + plain).clamp(0, 1)
    # the decoder's output is kept in [0, 1] in between: so is nearly all of this
    assert float((off.abs() < 1e-4).float().mean()) > 0.95
    assert float((painted - TINY.inpaint(crop, mask, seed=3)).abs().mean()) > 0.01


def test_detail_is_saved_and_loaded(tmp_path):
    detailed = Generator(with_detail(24), TINY.denoiser, TINY.sampler, TINY.card)
    loaded = read_folder(detailed.save(tmp_path / "gen"))
    assert torch.equal(loaded.autoencoder.detail_basis, detailed.autoencoder.detail_basis)
    assert loaded.autoencoder.config.detail_channels == 24


def test_training_fits_it_and_resumes_from_more_or_fewer_channels(tmp_path):
    config = configured(
        AutoencoderTraining, PRESETS["autoencoder"]["tiny"], {"steps": 2, "patch_size": 16}
    )
    made = train(make_cases(), tmp_path / "ae", config)
    assert made.config.detail_channels == 24
    assert float(made.detail_basis.square().sum()) == pytest.approx(24, rel=1e-4)
    again = replace(config, detail_channels=4)
    other = train(make_cases(), tmp_path / "more", again, init=str(tmp_path / "ae"))
    assert other.detail_basis.shape == (4, 64)
    read, _ = read_autoencoder(str(tmp_path / "more"))
    assert torch.equal(read.detail_basis, other.detail_basis)


def test_more_detail_channels_than_voxels_are_refused():
    with pytest.raises(ValueError, match="detail_channels must be 0 to 64"):
        AutoencoderConfig(detail_channels=65)
    assert NETWORKS["base"].detail_channels == 0
