"""Reading files in the published format, here made from fresh networks of this package."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tumorsynth.generators.checkpoint import CheckpointError
from tumorsynth.generators.difftumor import (
    AUTOENCODER_NAMES,
    DENOISER_NAMES,
    SCHEDULE_BUFFERS,
    autoencoder_state,
    denoiser_state,
    published_names,
    read_difftumor,
    read_generator,
)
from tumorsynth.generators.sampling import cosine_schedule
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.models.unet import FactorizedUNet

BOOKKEEPING = ("codebook.updates", "codebook.initialised")


@pytest.fixture(scope="module")
def networks() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts under tumorsynth's names."""
    torch.manual_seed(0)
    return Autoencoder().state_dict(), FactorizedUNet().state_dict()


@pytest.fixture
def tables(networks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tables of an AutoencoderModel.ckpt and a liver_early.pt, to be changed by a test."""
    autoencoder, denoiser = networks
    vqgan = {
        published: autoencoder[ours]
        for ours, published in published_names(AUTOENCODER_NAMES, autoencoder).items()
        if ours not in BOOKKEEPING
    }
    ema = {
        f"denoise_fn.{published}": denoiser[ours]
        for ours, published in published_names(DENOISER_NAMES, denoiser).items()
    }
    for block in [*(f"{s}.{i}.3" for s in ("downs", "ups") for i in range(4)), "mid_temporal_attn"]:
        ema[f"denoise_fn.{block}.fn.fn.fn.rotary_emb.freqs"] = denoiser["rotary.frequencies"]
    for key, tensor in list(ema.items()):  # two layers are convolutions there
        if re.search(r"\.2\.fn\.fn\.to_(qkv|out)\.weight$", key):
            ema[key] = tensor[..., None, None]
        if key.endswith("gamma"):
            ema[key] = tensor[None, :, None, None, None]
    ema |= buffers(4)
    ema |= {f"vqgan.{key}": tensor for key, tensor in vqgan.items()}
    junk = torch.zeros(1).expand(64, 3, 3, 3)
    vqgan |= {"perceptual_model.net.0.weight": junk, "image_discriminator.model0.0.weight": junk}
    ema |= {"vqgan.video_discriminator.model0.0.weight": junk}
    return vqgan, ema


def buffers(timesteps: int) -> dict[str, Tensor]:
    schedule = cosine_schedule(timesteps)
    made = {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod}
    return {name: made.get(name, schedule.betas).float() for name in SCHEDULE_BUFFERS}


def write(folder: Path, tables: tuple[dict[str, Any], dict[str, Any]]) -> tuple[Path, Path]:
    paths = folder / "AutoencoderModel.ckpt", folder / "liver_early.pt"
    torch.save({"epoch": 1, "state_dict": OrderedDict(tables[0])}, paths[0])
    torch.save({"step": 1, "model": {}, "ema": OrderedDict(tables[1]), "scaler": {}}, paths[1])
    return paths


def test_every_tensor_arrives_under_its_name(tmp_path: Path, networks, tables) -> None:
    assert len(tables[1]) == 300 + 12 + len(tables[0]) - 1  # as many as in the published file
    state = torch.get_rng_state()
    weights = read_difftumor(*write(tmp_path, tables))
    assert torch.equal(state, torch.get_rng_state())
    assert weights.timesteps == 4
    assert weights.autoencoder.keys() == networks[0].keys()
    assert weights.denoiser.keys() == networks[1].keys()
    for found, made in zip(weights[:2], networks, strict=True):
        for name in found.keys() - set(BOOKKEEPING):
            assert torch.equal(found[name], made[name]), name
    assert weights.autoencoder["codebook.initialised"]


def test_half_precision_becomes_float32(tmp_path: Path, tables) -> None:
    tables[0]["encoder.conv_first.conv.bias"] = torch.full((16,), 0.5).half()
    state = autoencoder_state(write(tmp_path, tables)[0])
    assert state["encoder.stem.conv.bias"].dtype == torch.float32
    assert state["encoder.stem.conv.bias"].unique().tolist() == [0.5]


@pytest.mark.parametrize(("timesteps", "method", "steps"), [(4, "ddpm", 4), (200, "ddim", 50)])
def test_generator_samples_as_published(
    tmp_path: Path, tables, timesteps: int, method: str, steps: int
) -> None:
    tables[1].update(buffers(timesteps))
    generator = read_generator(*write(tmp_path, tables))
    assert (generator.sampler.method, generator.sampler.steps) == (method, steps)
    assert generator.sampler.clamp == (1.0 if timesteps == 4 else None)
    assert generator.schedule.timesteps == timesteps
    assert generator.name == "difftumor-liver-early"


DENOISER_PROBLEMS = {
    "missing": ("denoise_fn.init_conv.bias", None, "missing init_conv.bias"),
    "missing rotary": (
        "denoise_fn.ups.2.3.fn.fn.fn.rotary_emb.freqs",
        None,
        "missing ups.2.3.fn.fn.fn.rotary_emb.freqs",
    ),
    "extra": ("denoise_fn.downs.4.0.mlp.1.bias", torch.zeros(3), "unexpected downs.4.0.mlp.1.bias"),
    "extra rotary": (
        "denoise_fn.downs.4.3.fn.fn.fn.rotary_emb.freqs",
        torch.zeros(16),
        "unexpected downs.4.3",
    ),
    "extra buffer": ("p_losses", torch.zeros(3), "unexpected p_losses"),
    "missing buffer": ("posterior_variance", None, "missing posterior_variance"),
    "missing autoencoder": ("vqgan.codebook.N", None, "missing codebook.N"),
    "shape": ("denoise_fn.time_mlp.1.bias", torch.zeros(95), "'time_mlp.1.bias' must have"),
    "order": ("denoise_fn.time_mlp.1.weight", torch.zeros(24, 96), "must have the shape"),
    "NaN": ("denoise_fn.final_conv.1.bias", torch.full((8,), torch.nan), "holds NaN"),
    "infinity": ("denoise_fn.final_conv.1.bias", torch.full((8,), torch.inf), "holds NaN or inf"),
    "integers": ("denoise_fn.final_conv.1.bias", torch.zeros(8, dtype=torch.long), "real numbers"),
    "no tensor": ("denoise_fn.final_conv.1.bias", [0.0] * 8, "real numbers"),
    "rotary": (
        "denoise_fn.downs.1.3.fn.fn.fn.rotary_emb.freqs",
        torch.ones(16),
        "other rotary frequencies in 'downs.1.3",
    ),
    "schedule": ("betas", torch.tensor([0.1, 0.2, 0.3, 0.9]), "another schedule.*betas differ"),
    "timesteps": ("betas", torch.ones(5), "4 or 200 steps"),
    "huge timesteps": ("betas", torch.ones(1).expand(10**12), "4 or 200 steps"),
    "no timesteps": ("betas", None, "4 or 200 steps"),
    "huge": ("denoise_fn.init_conv.bias", torch.ones(1).expand(10**13), "must have the shape"),
}


@pytest.mark.parametrize("problem", list(DENOISER_PROBLEMS))
def test_a_wrong_denoiser_is_refused_by_name(tmp_path: Path, tables, problem: str) -> None:
    key, value, message = DENOISER_PROBLEMS[problem]
    if value is None:
        del tables[1][key]
    else:
        tables[1][key] = value
    with pytest.raises(CheckpointError, match=f"liver_early.pt.*{message}"):
        denoiser_state(write(tmp_path, tables)[1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoder.conv_last.conv.bias", None, "missing decoder.conv_last.conv.bias"),
        ("decoder.conv_more.bias", torch.zeros(1), "unexpected decoder.conv_more.bias"),
        ("codebook.embeddings", torch.zeros(8, 16384), "must have the shape"),
    ],
)
def test_a_wrong_autoencoder_is_refused_by_name(tmp_path: Path, tables, key, value, message):
    if value is None:
        del tables[0][key]
    else:
        tables[0][key] = value
    with pytest.raises(CheckpointError, match=f"AutoencoderModel.ckpt.*{message}"):
        autoencoder_state(write(tmp_path, tables)[0])


def test_files_that_do_not_belong_together(tmp_path: Path, tables) -> None:
    paths = write(tmp_path, tables)
    with pytest.raises(CheckpointError, match="no table of tensors called 'state_dict'"):
        read_difftumor(paths[1], paths[0])
    tables[1]["vqgan.codebook.z_avg"] = torch.zeros(16384, 8)  # training's own, no matter here
    read_difftumor(*write(tmp_path, tables))
    tables[1]["vqgan.codebook.embeddings"] = tables[1]["vqgan.codebook.embeddings"] + 0.01
    with pytest.raises(CheckpointError, match="another autoencoder.*codebook.embeddings differs"):
        read_difftumor(*write(tmp_path, tables))
