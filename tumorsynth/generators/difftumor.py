"""Read the published DiffTumor checkpoints into tumorsynth's networks.

Reading is strict: every tensor of the published networks must be there with its name and shape, the
schedule must be the one that this package computes, and both files must belong together.
`tumorsynth.generators.checkpoint` reads the files; nothing in them is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tumorsynth.appearance.tissue import CARD_KEY, SOFT_TISSUE
from tumorsynth.devices import plain_defaults
from tumorsynth.generators.checkpoint import AGAIN, CheckpointError, LazyTensor, read_checkpoint
from tumorsynth.generators.config import SamplerConfig
from tumorsynth.generators.diffusion import Generator
from tumorsynth.generators.sampling import cosine_schedule
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.models.unet import FactorizedUNet

PUBLISHED_SAMPLERS = {  # timesteps -> sampler
    4: SamplerConfig(),  # early
    200: SamplerConfig("ddim", 200, steps=50, clamp=None),  # mid and late
}
IGNORED_PREFIXES = ("image_discriminator.", "video_discriminator.", "perceptual_model.")
SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
# (tumorsynth's name, published name), regular expressions, applied in this order
AUTOENCODER_NAMES = (
    (r"^encoder\.stem\.", "encoder.conv_first."),
    (r"^encoder\.levels\.(\d)\.0\.", r"encoder.conv_blocks.\1.down."),
    (r"^encoder\.levels\.(\d)\.1\.", r"encoder.conv_blocks.\1.res."),
    (r"^decoder\.levels\.(\d)\.0\.", r"decoder.conv_blocks.\1.up."),
    (r"^decoder\.levels\.(\d)\.([12])\.", r"decoder.conv_blocks.\1.res\2."),
    (r"^(encoder|decoder)\.norm\.", r"\1.final_block.0."),
    (r"^encoder\.head\.", "pre_vq_conv.conv."),
    (r"^decoder\.stem\.", "post_vq_conv.conv."),
    (r"^decoder\.head\.", "decoder.conv_last."),
    (r"^codebook\.counts$", "codebook.N"),
    (r"^codebook\.sums$", "codebook.z_avg"),
)
DENOISER_NAMES = (
    (r"^bias\.embedding\.", "time_rel_pos_bias.relative_attention_bias."),
    (r"^rotary\.frequencies$", "init_temporal_attn.fn.fn.fn.rotary_emb.freqs"),
    (r"^time\.linear1\.", "time_mlp.1."),
    (r"^time\.linear2\.", "time_mlp.3."),
    (r"^(downs|ups)\.(\d)\.res1\.", r"\1.\2.0."),
    (r"^(downs|ups)\.(\d)\.res2\.", r"\1.\2.1."),
    (r"^(downs|ups)\.(\d)\.spatial\.to_", r"\1.\2.2.fn.fn.to_"),
    (r"^(downs|ups)\.(\d)\.spatial\.norm\.weight$", r"\1.\2.2.fn.norm.gamma"),
    (r"^(downs|ups)\.(\d)\.depth\.", r"\1.\2.3."),
    (r"^shrink\.(\d)\.", r"downs.\1.4."),
    (r"^grow\.(\d)\.", r"ups.\1.4."),
    (r"^middle\.res(\d)\.", r"mid_block\1."),
    (r"^middle\.spatial\.", "mid_spatial_attn."),
    (r"^middle\.depth\.", "mid_temporal_attn."),
    (r"^first\.", "init_conv."),
    (r"^first_depth\.", "init_temporal_attn."),
    (r"^last_res\.", "final_conv.0."),
    (r"^last\.", "final_conv.1."),
    # inside a residual block, then inside a softmax attention
    (r"\.time\.(weight|bias)$", r".mlp.1.\1"),
    (r"\.conv([12])\.(weight|bias)$", r".block\1.proj.\2"),
    (r"\.norm([12])\.(weight|bias)$", r".block\1.norm.\2"),
    (r"\.skip\.", ".res_conv."),
    (r"((?:\.3|_attn)\.)to_", r"\1fn.fn.fn.to_"),
    (r"((?:\.3|_attn)\.)norm\.weight$", r"\1fn.norm.gamma"),
)
# every block of the published denoiser holds a copy of the one rotary embedding
ROTARY_COPY = r"^((downs|ups)\.[0-3]\.3|mid_temporal_attn)\.fn\.fn\.fn\.rotary_emb\.freqs$"


class DiffTumorWeights(NamedTuple):
    """Weights of published networks.

    Args:
        autoencoder: state dict for `Autoencoder()`.
        denoiser: state dict for `FactorizedUNet()`.
        timesteps: of the schedule.
    """

    autoencoder: dict[str, Tensor]
    denoiser: dict[str, Tensor]
    timesteps: int


def read_difftumor(
    autoencoder_path: str | PathLike[str], denoiser_path: str | PathLike[str]
) -> DiffTumorWeights:
    """Read both published files and check that they belong together.

    Args:
        autoencoder_path: AutoencoderModel.ckpt.
        denoiser_path: {organ}_early.pt or {organ}_noearly.pt.

    Raises:
        CheckpointError: if a file is damaged, is not the published network, or was trained with
            another autoencoder.
    """
    autoencoder = autoencoder_state(autoencoder_path)
    denoiser, timesteps, own_autoencoder = denoiser_state(denoiser_path)
    for name, tensor in autoencoder.items():
        if name in ("codebook.counts", "codebook.sums"):  # running sums, used in training only
            continue
        # the copy went through a moving average in float32, which may change the last bits
        if not torch.allclose(tensor, own_autoencoder[name], rtol=1e-4, atol=1e-5):
            raise CheckpointError(
                f"{Path(denoiser_path).name} was trained with another autoencoder than "
                f"{Path(autoencoder_path).name} ({name} differs); pass the autoencoder file "
                "published with it"
            )
    return DiffTumorWeights(autoencoder, denoiser, timesteps)


@plain_defaults()
@torch.random.fork_rng(devices=[])  # initial weights must not advance the caller's random stream
def read_generator(
    autoencoder_path: str | PathLike[str], denoiser_path: str | PathLike[str]
) -> Generator:
    """Build a generator from both published files that samples as published.

    "early" (4 timesteps) samples by DDPM with x0 clamped, "noearly" (200 timesteps) by DDIM in 50
    steps without clamping. Arguments and errors are those of `read_difftumor`.
    """
    weights = read_difftumor(autoencoder_path, denoiser_path)
    autoencoder, denoiser = Autoencoder(), FactorizedUNet()
    autoencoder.load_state_dict(weights.autoencoder)
    denoiser.load_state_dict(weights.denoiser)
    card = {
        "name": "difftumor-" + Path(denoiser_path).stem.replace("_", "-"),
        "description": "Read from published DiffTumor checkpoints (Chen et al., CVPR 2024).",
        "files": [Path(autoencoder_path).name, Path(denoiser_path).name],
        "licence": "CC BY-NC-ND 4.0, as the original: do not redistribute these weights, "
        "converted or not",
        CARD_KEY: SOFT_TISSUE.to_card(),  # liver, pancreas and kidney, which the paper trained on
    }
    return Generator(autoencoder, denoiser, PUBLISHED_SAMPLERS[weights.timesteps], card)


def autoencoder_state(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Read a published AutoencoderModel.ckpt as a state dict for `Autoencoder()`."""
    return _autoencoder_state(_table(read_checkpoint(path), "state_dict", path), Path(path).name)


def denoiser_state(
    path: str | PathLike[str],
) -> tuple[dict[str, Tensor], int, dict[str, Tensor]]:
    """Read the averaged weights (``ema``) of a published {organ}_early.pt or {organ}_noearly.pt.

    Returns:
        State dict for `FactorizedUNet()`, the timesteps, and the state dict of the autoencoder that
        it was trained with.
    """
    file = Path(path).name
    table = _table(read_checkpoint(path), "ema", path)
    networks: dict[str, dict[str, LazyTensor]] = {"denoise_fn": {}, "vqgan": {}}
    buffers: dict[str, LazyTensor] = {}
    for key, tensor in table.items():
        prefix, _, name = key.partition(".")
        (networks[prefix] if prefix in networks else buffers)[name or key] = tensor
    return (
        _denoiser_state(networks["denoise_fn"], file),
        _timesteps(buffers, file),
        _autoencoder_state(networks["vqgan"], file),
    )


def published_names(renames: tuple[tuple[str, str], ...], keys: Iterable[str]) -> dict[str, str]:
    """Map tumorsynth's keys to published keys."""
    names = {}
    for key in keys:
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    return names


def _table(checkpoint: Any, key: str, path: str | PathLike[str]) -> dict[str, LazyTensor]:
    table = checkpoint.get(key) if isinstance(checkpoint, dict) else None
    if not isinstance(table, dict) or not all(isinstance(k, str) for k in table):
        raise CheckpointError(
            f"{Path(path).name} holds no table of tensors called {key!r}; pass "
            "AutoencoderModel.ckpt as the autoencoder and {organ}_early.pt as the denoiser"
        )
    return table


def _fresh(network: type[nn.Module]) -> dict[str, Tensor]:
    """Return the keys and shapes to match, without advancing the caller's random stream."""
    with torch.random.fork_rng(devices=[]):
        return network().state_dict()


def _autoencoder_state(table: Mapping[str, LazyTensor], file: str) -> dict[str, Tensor]:
    table = {key: tensor for key, tensor in table.items() if not key.startswith(IGNORED_PREFIXES)}
    expected = _fresh(Autoencoder)
    # state of our codebook: initialised, and trained long enough to need no bias correction
    bookkeeping = {
        "codebook.updates": torch.tensor(10_000),
        "codebook.initialised": torch.tensor(True),
    }
    for name in bookkeeping:
        del expected[name]
    return _take(table, expected, published_names(AUTOENCODER_NAMES, expected), file) | bookkeeping


def _denoiser_state(table: Mapping[str, LazyTensor], file: str) -> dict[str, Tensor]:
    expected = _fresh(FactorizedUNet)
    names = published_names(DENOISER_NAMES, expected)
    copies = {key: tensor for key, tensor in table.items() if re.match(ROTARY_COPY, key)}
    state = _take({k: v for k, v in table.items() if k not in copies}, expected, names, file)
    frequencies = state["rotary.frequencies"]
    wanted = [f"{side}.{level}.3" for side in ("downs", "ups") for level in range(4)]
    for name in (f"{b}.fn.fn.fn.rotary_emb.freqs" for b in (*wanted, "mid_temporal_attn")):
        copy = _take(copies, {name: frequencies}, {name: name}, file, only=True)[name]
        if not torch.allclose(copy, frequencies, rtol=1e-5):
            raise CheckpointError(f"{file} has other rotary frequencies in {name!r}; {AGAIN}")
    return state


def _timesteps(buffers: Mapping[str, LazyTensor], file: str) -> int:
    """Return the timesteps, after checking that the file's schedule is the cosine schedule."""
    shape: Any = getattr(buffers.get("betas"), "shape", None)
    if shape not in [(steps,) for steps in PUBLISHED_SAMPLERS]:
        raise CheckpointError(
            f"{file} must hold the betas of a schedule of "
            f"{' or '.join(map(str, PUBLISHED_SAMPLERS))} steps, got shape {shape}; {AGAIN}"
        )
    timesteps = int(shape[0])
    schedule = cosine_schedule(timesteps)
    names = {name: name for name in SCHEDULE_BUFFERS}
    state = _take(buffers, dict.fromkeys(SCHEDULE_BUFFERS, schedule.betas), names, file)
    for name, ours in (("betas", schedule.betas), ("alphas_cumprod", schedule.alphas_cumprod)):
        if not torch.allclose(state[name].double(), ours, rtol=1e-4, atol=1e-7):
            raise CheckpointError(
                f"{file} was trained with another schedule than the cosine schedule of its "
                f"{timesteps} steps ({name} differ); {AGAIN}"
            )
    return timesteps


def _take(
    table: Mapping[str, LazyTensor],
    expected: Mapping[str, Tensor],
    names: Mapping[str, str],
    file: str,
    only: bool = False,
) -> dict[str, Tensor]:
    """Return exactly the expected tensors, in float32 under our names.

    Shapes may differ by axes of length 1: published 1x1 convolutions are Linear layers here.

    Args:
        table: published names -> tensors.
        expected: our names -> tensors of the shapes to match.
        names: our names -> published names.
        file: file name, for errors.
        only: whether the table may hold other tensors too.
    """
    missing = sorted(set(names.values()) - set(table))
    extra = [] if only else sorted(set(table) - set(names.values()))
    if missing or extra:
        raise CheckpointError(
            f"{file} must hold the tensors of the published network, nothing more: "
            f"missing {_some(missing)}, unexpected {_some(extra)}; {AGAIN}"
        )
    state = {}
    for ours, published in names.items():
        lazy, shape = table[published], expected[ours].shape
        if not isinstance(lazy, LazyTensor) or not lazy.dtype.is_floating_point:
            raise CheckpointError(
                f"{file}: {published!r} must be a tensor of real numbers; {AGAIN}"
            )
        if [n for n in lazy.shape if n != 1] != [n for n in shape if n != 1]:
            raise CheckpointError(
                f"{file}: {published!r} must have the shape {tuple(shape)}, up to axes of length "
                f"1, got {lazy.shape}; {AGAIN}"
            )
        # load after the checks, since a stride of 0 lets a small file describe a large tensor
        tensor = lazy.load().to(torch.float32).reshape(shape).contiguous()
        if not math.isfinite(float(tensor.sum())) and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {published!r} holds NaN or infinity; {AGAIN}")
        state[ours] = tensor
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "") or "none"
