"""Build the networks that the two stages train, with new or trained weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from tumorsynth.appearance.contrast import ContrastConfig
from tumorsynth.generators.config import SamplerConfig
from tumorsynth.generators.folder import read_folder
from tumorsynth.generators.sampling import Prediction, cosine_schedule
from tumorsynth.generators.store import find_folder
from tumorsynth.models.autoencoder import LIGHT, Autoencoder, AutoencoderConfig
from tumorsynth.models.conv_unet import ConvUNet, ConvUNetConfig
from tumorsynth.models.unet import FactorizedUNet, UNetConfig
from tumorsynth.training.config import AutoencoderTraining, DenoiserTraining
from tumorsynth.training.folders import origin, read_autoencoder

MAX_DDPM_TIMESTEPS = 10
DDIM_STEPS = 50  # about
NETWORKS = {
    "tiny": replace(LIGHT, encoder_widths=(16, 32), decoder_widths=(32, 16)),
    "light": LIGHT,
    "base": AutoencoderConfig(),
}


def starting_autoencoder(
    config: AutoencoderTraining, init: str | None
) -> tuple[Autoencoder, dict[str, Any] | None]:
    """Build the autoencoder of a config.

    Args:
        config: settings of the training.
        init: a trained autoencoder to start from; it may have fewer latent channels, and another
            window, which only scales the values.

    Returns:
        The network, and the `origin` of ``init`` or None.

    Raises:
        ValueError: if ``init`` has another size.
    """
    sizes = replace(
        NETWORKS[config.network],
        window=(config.window_low, config.window_high),
        detail_channels=config.detail_channels,
    )
    if config.codes is not None:
        sizes = replace(sizes, codes=config.codes)
    if config.latent_channels is not None:
        sizes = replace(sizes, latent_channels=config.latent_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Autoencoder(sizes)
    if init is None:
        return model, None
    trained, card = read_autoencoder(init, "--init")
    may_widen = config.latent_channels is not None and not sizes.codes
    widened = replace(
        trained.config,
        window=sizes.window,
        detail_channels=sizes.detail_channels,  # fitted anew
    )
    if may_widen and trained.config.latent_channels < sizes.latent_channels:
        widened = replace(widened, latent_channels=sizes.latent_channels)
    if widened != sizes:
        raise ValueError(
            f"--init {init} has another size than --network {config.network} with "
            f"{sizes.codes} codes and {sizes.latent_channels} latent channels: {trained.config}"
        )
    return _copy_weights(trained, model), origin(card)


@torch.no_grad()
def _copy_weights(trained: Autoencoder, model: Autoencoder) -> Autoencoder:
    """Copy trained weights into a network that may have more latent channels.

    The decoder starts with small weights for the additional channels. The detail is not copied,
    because it is fitted after the training.
    """
    old, new = trained.state_dict(), model.state_dict()
    old.pop("detail_basis", None)
    new["decoder.stem.weight"] *= 0.1
    for name, value in old.items():
        new[name][tuple(slice(n) for n in value.shape)] = value
    model.load_state_dict(new)
    return model


def starting_denoiser(
    config: DenoiserTraining, autoencoder: Autoencoder, init: str | None
) -> tuple[nn.Module, int, dict[str, Any] | None]:
    """Build the denoiser for the latent of an autoencoder.

    Args:
        config: settings of the training.
        autoencoder: the frozen autoencoder.
        init: a generator whose denoiser to start from.

    Returns:
        The network; the number of mm that a crop's side must be a multiple of; the `origin` of
        ``init`` or None.

    Raises:
        ValueError: for settings that do not fit each other, the autoencoder or ``init``.
    """
    sampler_config(config, 1)  # refuses settings that do not fit each other
    cosine_schedule(config.timesteps)
    channels, factor = autoencoder.config.latent_channels, autoencoder.config.factor
    if config.network == "base":
        if config.contrast == "on":
            raise ValueError(
                "--network base is the published one, which has no contrast condition; pass "
                "--contrast off, or --preset base"
            )
        published = UNetConfig()
        if published.out_channels != channels or factor != 4:
            raise ValueError(
                f"--network base needs an autoencoder with {published.out_channels} latent "
                f"channels and 4 mm per latent voxel, got one with {channels} and {factor}; "
                "choose another --autoencoder or --network"
            )
        kind: Any = FactorizedUNet
        sizes: Any = published
        halvings = len(published.multipliers) - 1
    else:
        kind = ConvUNet
        cond_channels = channels + 1 + int(config.contrast == "on")
        sizes = ConvUNetConfig(latent_channels=channels, cond_channels=cond_channels)
        if config.network == "tiny":
            sizes = replace(sizes, widths=(16, 32), blocks=1, time_channels=32)
        halvings = len(sizes.widths) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network: nn.Module = kind(sizes)
    started = None
    if init is not None:
        generator = read_folder(find_folder(init))
        denoiser, started = generator.denoiser, origin(generator.card)
        if not _same_latent(generator.autoencoder, autoencoder):
            started["autoencoder"] = (
                f"the denoiser of --init {init} was trained over another autoencoder, whose latent "
                "means something else: give it the steps to learn this one's"
            )
        if getattr(denoiser, "config", None) != sizes:
            raise ValueError(
                f"--init {init} has a denoiser of another size than --network {config.network} "
                f"over {channels} latent channels: {getattr(denoiser, 'config', None)}"
            )
        network = denoiser.train().requires_grad_(True)
    return network, factor * 2**halvings, started


def _same_latent(one: Autoencoder, other: Autoencoder) -> bool:
    """Whether two autoencoders have the same latent: all weights are equal but the detail's."""
    a, b = (
        {k: v for k, v in network.state_dict().items() if k != "detail_basis"}
        for network in (one, other)
    )
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sampler_config(
    config: DenoiserTraining, multiple: int, contrast: ContrastConfig | None = None
) -> SamplerConfig:
    """Return the sampler of the trained generator.

    DDPM for at most 10 noise levels, else DDIM in about 50 steps.

    Args:
        config: settings of the training.
        multiple: number of mm that a crop's side must be a multiple of.
        contrast: contrast condition of the denoiser; None without one.
    """
    few = config.timesteps <= MAX_DDPM_TIMESTEPS
    stride = max(1, config.timesteps // DDIM_STEPS)
    while config.timesteps % stride:
        stride -= 1
    return SamplerConfig(
        method="ddpm" if few else "ddim",
        timesteps=config.timesteps,
        steps=config.timesteps if few else config.timesteps // stride,
        prediction=cast(Prediction, config.prediction),
        # In crops of nearly uniform tissue latents reach 2 to 6; clamped to 1.5 they decode to
        # dots. Noise prediction needs the clamp, because its first error is amplified.
        clamp=1.5 if config.prediction == "noise" else None,
        mask_conditioning="area",
        zero_terminal_snr=config.zero_terminal_snr == "on",
        contrast=contrast,
        crop_size=config.patch_size,
        crop_multiple=multiple,
    )
