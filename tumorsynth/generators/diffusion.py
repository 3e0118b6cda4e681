"""The diffusion generator: an autoencoder, a denoiser and a sampler that paint tumours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.arguments import keywords_of, known_keywords
from tumorsynth.devices import full_float32, onto
from tumorsynth.generators.compiled import MAX_SHAPES, Compiled
from tumorsynth.generators.conditioning import (
    NetworkInputs,
    check_pair,
    contrast_channel,
    contrast_target,
    latent_box,
    mask_channel,
    paste,
    to_xyz,
    to_zxy,
)
from tumorsynth.generators.config import SamplerConfig
from tumorsynth.generators.precision import computes_in_bfloat16
from tumorsynth.generators.sampling import (
    cosine_schedule,
    ddim_sample,
    ddpm_sample,
    draw_noise,
)
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.models.slabs import Near
from tumorsynth.random_streams import per_sample_seeds


@keywords_of()
class Generator:
    """A trained diffusion generator.

    `tumorsynth.load_generator`, `from_difftumor` and the training commands make one.

    Args:
        autoencoder: maps crops to latents and back.
        denoiser: a network called as ``denoiser(x_t, t, cond)``.
        sampler: how to sample, and which crops to take.
        card: name, licence, data, metrics; free-form but for ``name``.

    Attributes:
        precision: format that convolutions and matrix products compute in: "auto" (default),
            "float32" or "bfloat16", see `tumorsynth.generators.precision`. You may set it at any
            time, for all transforms that share the generator.
        source: name or folder that the generator was loaded from; None if it was built in memory.
        compiled: the compiled networks after `compile`; None runs them as they are.

    Examples:
        >>> generator = ts.load_generator("liver-early")
        >>> crop = torch.full((1, 1, 96, 96, 96), 0.6)
        >>> mask = torch.zeros_like(crop, dtype=torch.bool)
        >>> mask[..., 40:52, 40:52, 40:52] = True
        >>> painted = generator.inpaint(crop, mask, seed=0)
    """

    own_edge = True  # a change fades out at the tumour's outline by itself

    def __init__(
        self,
        autoencoder: Autoencoder,
        denoiser: nn.Module,
        sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 (frozen)
        card: dict[str, Any] | None = None,
    ):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.sampler = sampler
        self.schedule = cosine_schedule(
            sampler.timesteps, zero_terminal_snr=sampler.zero_terminal_snr
        )
        self.card: dict[str, Any] = {"name": "unnamed", **(card or {})}
        self.source: str | None = None
        self.precision = "auto"
        self.compiled: Compiled | None = None

    # -- members of the TumorGenerator protocol ----------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.card["name"])

    @property
    def even(self) -> bool:
        """Whether noise, slow variation and edge of a painted tumour are matched to the scan."""
        return self.sampler.contrast is not None and self.sampler.contrast.even

    @property
    def keeps_detail(self) -> bool:
        """Whether `inpaint` keeps the scan's noise; published autoencoders blur it."""
        return self.autoencoder.config.detail_channels > 0

    @property
    def darkens(self) -> bool:
        """Whether tumours are always darker than the tissue around, unless asked otherwise."""
        contrast = self.sampler.contrast
        return contrast is not None and contrast.darkens

    @property
    def parameter_count(self) -> int:
        """Parameters of both networks."""
        networks = (self.autoencoder, self.denoiser)
        return sum(p.numel() for network in networks for p in network.parameters())

    @property
    def crop_size(self) -> int:
        return self.sampler.crop_size

    @property
    def crop_multiple(self) -> int:
        return self.sampler.crop_multiple

    @property
    def window(self) -> tuple[float, float]:
        """HU that 0 and 1 in a crop stand for."""
        return self.autoencoder.config.window

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def to(self, device: torch.device | str) -> Generator:
        """Move both networks, in place; return self."""
        self.autoencoder.to(device)
        self.denoiser.to(device)
        if self.compiled is not None:
            self.compiled.clear()
        return self

    @torch.no_grad()
    @known_keywords
    def inpaint(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        contrast_hu: float | Sequence[float] | Tensor | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Paint a tumour into the mask (paper 3.2 and 3.3).

        Args:
            crop: (B, 1, X, Y, Z) in [0, 1] (the HU of ``window``), on a 1 mm grid, RAS.
            tumor_mask: bool, same shape.
            seed: one int, which counts up over the batch, or one for each sample; None draws from
                torch's global generator.
            noise: (steps + 1, B, 8, d, h, w) with axes (z, x, y), in place of a seed.
            contrast_hu: HU between the tumour's core and the tissue around it, one number or one
                for each sample. None samples ``sampler.contrast``, or leaves it to a denoiser that
                takes no contrast.
            near: slices along X, Y and Z of the voxels to paint, tumour and all; the rest of the
                result is the input. Decoding less saves time and changes results by rounding only.

        Returns:
            (B, 1, X, Y, Z) in [0, 1]. Every painted voxel went through the autoencoder, so blend
            the result into the scan. If the autoencoder has detail channels, the scan's detail is
            added back.

        Raises:
            ValueError: if shapes, seed, contrast or ``near`` do not fit the crop.
        """
        inputs = self.prepare(crop, tumor_mask, seed, noise, contrast_hu)
        latent = self.sample(inputs.cond, inputs.noise)
        volume, box = (
            inputs.volume,
            latent_box(near, crop.shape[2:], self.autoencoder.config.factor),
        )
        decoded = self.decode_latent(self.autoencoder.denormalize(latent), box)
        if self.autoencoder.config.detail_channels:
            healthy = self.decode_latent(self.encode_volume(volume), box)
            there = volume[..., box[0], box[1], box[2]]
            decoded = (decoded + self.autoencoder.detail((there + 1) / 2 - healthy)).clamp(0, 1)
        painted = to_xyz(paste(decoded, (volume + 1) / 2, box))
        if inputs.target is None:
            return painted
        return (painted + inputs.target.correction(painted)).clamp(0, 1)

    @torch.no_grad()
    @known_keywords
    def change(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        contrast_hu: float | Sequence[float] | Tensor | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Return the decoded tumour crop minus the decoded healthy crop.

        The autoencoder's blur is in both and cancels: added to the scan, the change keeps the
        scan's own noise and sharpness. Arguments and errors are those of `inpaint`.

        Returns:
            (B, 1, X, Y, Z) in the crop's scale, 0 beyond ``near``.
        """
        inputs = self.prepare(crop, tumor_mask, seed, noise, contrast_hu)
        latent = self.sample(inputs.cond, inputs.noise)
        volume, box = (
            inputs.volume,
            latent_box(near, crop.shape[2:], self.autoencoder.config.factor),
        )
        healthy = self.decode_latent(self.encode_volume(volume), box)
        change = self.decode_latent(self.autoencoder.denormalize(latent), box) - healthy
        change = to_xyz(paste(change, torch.zeros_like(volume), box))
        if inputs.target is None:
            return change
        return change + inputs.target.correction(crop + change)

    # -- the steps ---------------------------------------------------------------------------------

    def prepare(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        contrast_hu: float | Sequence[float] | Tensor | None = None,
    ) -> NetworkInputs:
        """Return what the networks need; arguments and errors are those of `inpaint`."""
        seeds = per_sample_seeds(seed, len(crop)) if noise is None else None
        trained = self.sampler.contrast
        target = contrast_target(crop, tumor_mask, self.window, trained, seeds, contrast_hu)
        hu = None if target is None else target.contrast_hu
        volume, cond = self._condition(crop, tumor_mask, hu)
        if noise is None:
            assert seeds is not None
            streams = [torch.Generator().manual_seed(s) for s in seeds]
            noise = self._draw_noise(cond, streams, last=False)
        return NetworkInputs(volume, cond, noise, target)

    def condition(
        self, crop: Tensor, tumor_mask: Tensor, contrast_hu: Tensor | None = None
    ) -> Tensor:
        """Return the denoiser's conditioning.

        The crop is hollowed: the tumour's voxels are 0 in [-1, 1], the middle of the window.

        Args:
            crop: (B, 1, X, Y, Z) in [0, 1].
            tumor_mask: bool, same shape.
            contrast_hu: (B,) HU, for denoisers with a contrast channel.

        Returns:
            (B, 9, d, h, w): normalised latent of the hollowed crop, and the mask in [-1, 1]. A
            denoiser with a contrast channel has a tenth: the mask's share of each latent voxel
            times the contrast, in eighths of the window.

        Raises:
            ValueError: if shapes differ, or a contrast is needed and missing.
        """
        return self._condition(crop, tumor_mask, contrast_hu)[1]

    @known_keywords
    def sample(self, cond: Tensor, noise: Tensor | torch.Generator) -> Tensor:
        """Sample the latent of a crop with a tumour.

        Args:
            cond: (B, 9, d, h, w) from `condition`.
            noise: (steps + 1, B, 8, d, h, w), the start and one draw for each step; or a CPU
                torch.Generator, one stream for the whole batch.

        Returns:
            Normalised latent, (B, 8, d, h, w).
        """
        s = self.sampler
        if isinstance(noise, torch.Generator):
            stream = noise
            noise = torch.cat([self._draw_noise(cond, [stream]) for _ in range(len(cond))], dim=1)
        noise, ddpm = onto(noise, cond.device), s.method == "ddpm"
        call = self._run_exactly if s.prediction == "noise" else self.run_network
        denoise = partial(call, self.denoiser)
        run: Callable[..., Tensor] = ddpm_sample if ddpm else ddim_sample
        how: dict[str, Any] = {"clamp": s.clamp, "prediction": s.prediction, "steps": s.steps}
        return run(denoise, self.schedule, cond, noise, **how)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a normalised latent to a crop in [0, 1], axes (z, x, y)."""
        return self.decode_latent(self.autoencoder.denormalize(latent))

    def encode_volume(self, volume: Tensor) -> Tensor:
        """Encode (B, 1, D, H, W) in [-1, 1] to a raw latent, in this generator's precision."""
        if self.sampler.prediction == "noise":
            return self._run_exactly(self.autoencoder.encode, volume)
        return self.run_network(self.autoencoder.encode, volume)

    def decode_latent(self, raw: Tensor, box: Near | None = None) -> Tensor:
        """Quantise and decode a raw latent, in this generator's precision.

        Args:
            raw: (B, 8, d, h, w), not normalised.
            box: part of the crop along (z, x, y), in whole latent voxels; None is all of it.

        Returns:
            That part of the crop, in [0, 1].
        """
        quantised, decoder = self.autoencoder.quantize(raw), self.autoencoder.decoder
        if self.compiled is None:
            decoded = self.run_network(decoder, quantised, box)
        else:  # compile for the whole crop, not for every box
            decoded = self.run_network(decoder, quantised)
            decoded = decoded if box is None else decoded[..., box[0], box[1], box[2]]
        return ((decoded + 1) / 2).clamp(0, 1)

    def run_network(
        self, network: Callable[..., Tensor], *inputs: Any, allow_bfloat16: bool = True
    ) -> Tensor:
        """Call a network in this generator's precision, compiled if asked; return float32.

        A caller's autocast has no effect.
        """
        compiled, enabled = self.compiled, allow_bfloat16 and self._in_bfloat16()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            out = network(*inputs) if compiled is None else compiled(network, *inputs)
        return out.float()

    @known_keywords
    def compile(
        self, max_shapes: int = MAX_SHAPES, backend: str | Callable[..., Any] = "inductor"
    ) -> Generator:
        """Run the networks through torch.compile from now on, in place; return self.

        This pays off on a GPU with crops of one size. The first crops of each shape wait for the
        compiler. Results change by rounding. ``generator.compiled = None`` undoes it.

        Args:
            max_shapes: shapes to compile for each network; others run uncompiled.
            backend: passed to torch.compile.
        """
        self.compiled = Compiled(max_shapes, backend)
        return self

    # -- files -------------------------------------------------------------------------------------

    @known_keywords
    def save(self, folder: str | Path) -> Path:
        """Write model.safetensors, card.json and CARD.md into ``folder``; return it."""
        from tumorsynth.generators.folder import save_generator

        return save_generator(self, Path(folder))

    @classmethod
    @known_keywords
    def from_difftumor(cls, autoencoder: str | Path, denoiser: str | Path) -> Generator:
        """Build a generator from published DiffTumor checkpoints.

        A restricted reader reads the files and executes nothing in them.

        Args:
            autoencoder: AutoencoderModel.ckpt.
            denoiser: for example liver_early.pt. ``*_noearly.pt`` (200 timesteps) samples by DDIM
                in 50 steps, as published.

        Raises:
            CheckpointError: if a file is damaged or not the published network.
        """
        from tumorsynth.generators.difftumor import read_generator

        return read_generator(Path(autoencoder), Path(denoiser))

    def with_sampler(self, **changes: Any) -> Generator:
        """Return a generator of the same networks with another sampler.

        Args:
            changes: fields of `SamplerConfig`, for example ``steps=2``: half the network passes.
        """
        sampler = replace(self.sampler, **changes)
        other = Generator(self.autoencoder, self.denoiser, sampler, self.card)
        other.precision, other.compiled = self.precision, self.compiled
        return other

    def _condition(
        self, crop: Tensor, tumor_mask: Tensor, contrast_hu: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the crop as the networks see it, and the conditioning."""
        check_pair(crop, tumor_mask)
        volume = to_zxy(crop.float() * 2 - 1)
        hole = to_zxy(tumor_mask.to(volume.dtype))
        latent = self.autoencoder.normalize(self.encode_volume(volume * (1 - hole)))
        size = latent.shape[2:]
        channels = [latent, mask_channel(hole, size, self.sampler.mask_conditioning)]
        if self.sampler.contrast is not None:
            if contrast_hu is None:
                raise ValueError(
                    "contrast_hu must be given, as this denoiser takes a contrast; pass one number "
                    "of HU for each sample"
                )
            channels.append(contrast_channel(hole, size, contrast_hu, self.window))
        return volume, torch.cat(channels, dim=1)

    def _run_exactly(self, network: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call a network in full float32, whatever the precision.

        Steps of a denoiser that predicts noise multiply errors, of its own and of its conditioning,
        by up to 263.
        """
        module = getattr(network, "__self__", network)
        own = self.compiled is None and type(module).__module__.startswith("tumorsynth.models.")
        with full_float32(self.device.type, own_layers=own):
            return self.run_network(network, *inputs, allow_bfloat16=False)

    def _in_bfloat16(self) -> bool:
        return computes_in_bfloat16(self.precision, self.device, self.sampler.prediction)

    def _draw_noise(
        self, cond: Tensor, streams: list[torch.Generator], last: bool = True
    ) -> Tensor:
        shape = (self.autoencoder.config.latent_channels, *cond.shape[2:])
        # DDIM with eta 0 uses the start alone
        steps = self.sampler.steps if self.sampler.method == "ddpm" else 0
        return draw_noise(shape, steps, streams, last=last)
