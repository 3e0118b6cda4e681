"""The networks that the two stages train: their sizes, and their first weights, new or trained."""

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

NETWORKS = {
    "tiny": replace(LIGHT, encoder_widths=(16, 32), decoder_widths=(32, 16)),
    "light": LIGHT,
    "base": AutoencoderConfig(),
}


def starting_autoencoder(
    config: AutoencoderTraining, init: str | None
) -> tuple[Autoencoder, dict[str, Any] | None]:
    """The network of a config, untrained or as in ``init``, which may have fewer channels, and the
    `origin` of that."""
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
    asked = config.latent_channels is not None and not sizes.codes
    wider = asked and trained.config.latent_channels < sizes.latent_channels
    given = replace(trained.config, detail_channels=sizes.detail_channels)  # it is found anew
    if wider:
        given = replace(given, latent_channels=sizes.latent_channels)
    if given != sizes:
        raise ValueError(
            f"--init {init} has another size or window than --network {config.network} with "
            f"{sizes.codes} codes, {sizes.latent_channels} latent channels and {sizes.window} HU: "
            f"{trained.config}"
        )
    return _continued(trained, model), origin(card)


@torch.no_grad()
def _continued(trained: Autoencoder, model: Autoencoder) -> Autoencoder:
    """The trained network with the untrained one's further latent channels, which the decoder
    hardly listens to at first, and its detail, which is found after the training."""
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
    """The denoiser for an autoencoder's latent, what a crop must be a multiple of, in mm, and the
    `origin` of the generator it starts from."""
    sampler_of(config, 1)  # says what does not go together
    cosine_schedule(config.timesteps)
    channels, factor = autoencoder.config.latent_channels, autoencoder.config.factor
    if config.network == "base":
        if config.contrast == "on":
            raise ValueError(
                "--network base is the published one, which is not told the contrast; pass "
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
        told = int(config.contrast == "on")
        sizes = ConvUNetConfig(latent_channels=channels, cond_channels=channels + 1 + told)
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
    """Whether two autoencoders have the same latent: all weights but those of the detail."""
    a, b = (
        {k: v for k, v in network.state_dict().items() if k != "detail_basis"}
        for network in (one, other)
    )
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sampler_of(
    config: DenoiserTraining, multiple: int, contrast: ContrastConfig | None = None
) -> SamplerConfig:
    """How the trained generator samples: DDPM for few noise levels, else DDIM in about 50 steps."""
    few = config.timesteps <= 10
    stride = max(1, config.timesteps // 50)
    while config.timesteps % stride:
        stride -= 1
    return SamplerConfig(
        method="ddpm" if few else "ddim",
        timesteps=config.timesteps,
        steps=config.timesteps if few else config.timesteps // stride,
        prediction=cast(Prediction, config.prediction),
        # In crops that hold little but one tissue latents reach 2 and, in livers, 6: cut off at 1.5
        # they decode to dots. Predicted noise needs the bound: its first error is multiplied.
        clamp=1.5 if config.prediction == "noise" else None,
        mask_conditioning="area",
        zero_terminal_snr=config.zero_terminal_snr == "on",
        contrast=contrast,
        crop_size=config.patch_size,
        crop_multiple=multiple,
    )
