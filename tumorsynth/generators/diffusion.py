"""The diffusion generator: autoencoder + denoiser + schedule + card, and how it paints a tumour."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.appearance.contrast import (
    draw_contrast,
    level_around,
    own_level,
    shift,
)
from tumorsynth.arguments import any_bool
from tumorsynth.devices import full_float32, onto
from tumorsynth.generators.compiled import MAX_SHAPES, Compiled
from tumorsynth.generators.config import SamplerConfig as SamplerConfig  # is had from here
from tumorsynth.generators.config_check import check_bounds, check_fit
from tumorsynth.generators.sampling import (
    cosine_schedule,
    ddim_sample,
    ddim_steps,
    ddpm_sample,
    draw_noise,
)
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.conv_unet import ConvUNet, ConvUNetConfig
from tumorsynth.models.kernels import cpu_computes_bfloat16, cpu_isa
from tumorsynth.models.slabs import Near
from tumorsynth.models.unet import FactorizedUNet, UNetConfig

DENOISERS: dict[str, tuple[type[Any], type[Any]]] = {
    "factorized": (FactorizedUNet, UNetConfig),
    "conv": (ConvUNet, ConvUNetConfig),
}
MOST_AMPLIFIED = 4.0  # an error of the predicted noise in x0, where that is computed in bfloat16
PRECISIONS = ("auto", "float32", "bfloat16")


class Generator:
    """A trained diffusion generator. Build one with :func:`tumorsynth.load_generator`,
    :meth:`from_difftumor` or the training commands.

    autoencoder: :class:`tumorsynth.models.autoencoder.Autoencoder`.
    denoiser: a network called as ``denoiser(x_t, t, cond)``.
    card: name, licence, data, metrics; free-form but for ``name``.
    precision: "auto" (the default), "float32" or "bfloat16", which convolutions and matrix products
        then compute in. You may set it at any time. "auto" is bfloat16 on CPUs that compute in it,
        where the network predicts x0 or v, and float32 elsewhere. "bfloat16" on a CPU that would
        only emulate it warns once and computes in float32.

        In bfloat16 the same seed gives the same tumour bit by bit on like machines; against float32
        it differs by much less than a scan's noise. A network that predicts noise computes in full
        float32, with "bfloat16" in those steps that multiply an error by more than 4: the first of
        the published four multiplies it by 263, the others by 2.4 at most. "float32" of all else is
        on CUDA what PyTorch has it be there: by default its convolutions round to TF32.
    """

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
        self.source: str | None = None  # the name or folder it was loaded from
        self.precision = "auto"
        self.compiled: Compiled | None = None

    # -- what the synthesizer asks of every kind of generator -------------------------------------

    own_edge = True  # of a change: it fades out at the tumour's outline by itself

    @property
    def name(self) -> str:
        return str(self.card["name"])

    @property
    def even(self) -> bool:
        """Whether a tumour's inside is made as even as the tissue it replaces, when blended."""
        return self.sampler.contrast is not None and self.sampler.contrast.even

    @property
    def keeps_detail(self) -> bool:
        """Whether `inpaint` keeps the scan's own noise; published autoencoders blur it."""
        return self.autoencoder.config.detail_channels > 0

    @property
    def crop_size(self) -> int:
        return self.sampler.crop_size

    @property
    def crop_multiple(self) -> int:
        return self.sampler.crop_multiple

    @property
    def window(self) -> tuple[float, float]:
        """HU that are 0 and 1 in a crop."""
        return self.autoencoder.config.window

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def to(self, device: torch.device | str) -> Generator:
        """Move both networks, in place; returns self."""
        self.autoencoder.to(device)
        self.denoiser.to(device)
        if self.compiled is not None:
            self.compiled.clear()
        return self

    def compile(
        self, max_shapes: int = MAX_SHAPES, backend: str | Callable[..., Any] = "inductor"
    ) -> Generator:
        """Run the networks through torch.compile from now on, in place; returns self.

        For a GPU and crops of one size: the first ones of a shape wait for the compiler. How many
        shapes, how batches go, and what happens where torch cannot compile, says
        :class:`tumorsynth.generators.compiled.Compiled`. Numbers change by rounding. ``generator.compiled =
        None`` ends it.
        """
        self.compiled = Compiled(max_shapes, backend)
        return self

    @torch.no_grad()
    def inpaint(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        contrast_hu: float | Sequence[float] | Tensor | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """The crop with a tumour in the mask, as the autoencoder decodes it (paper 3.2 and 3.3).

        crop: (B, 1, X, Y, Z) in [0, 1] (the HU of ``window``), 1 mm, RAS. tumor_mask: bool, same
            shape.
        seed: one int, or one per sample; sample b of an int seed uses seed + b.
        noise: (steps + 1, B, 8, d, h, w) instead of a seed, axes (z, x, y).
        contrast_hu: HU between the tumour's core and the tissue around it, one number or one per
            sample; by default as the network has it, or drawn from ``sampler.contrast``.
        near: slices along X, Y and Z of the voxels that are wanted, tumour and all; others are the
            crop's own. Saves a part of the time; what is decoded is the same to rounding.
        Returns (B, 1, X, Y, Z) in [0, 1]; every voxel went through the autoencoder, so blend it.
        The scan's detail (`Autoencoder.detail`), where the autoencoder has it, is in all of it.
        """
        latent, volume, aim = self._paint(crop, tumor_mask, seed, noise, contrast_hu)
        box = self._box(crop, near)
        decoded = self._decode(self.autoencoder.denormalize(latent), box)
        if self.autoencoder.config.detail_channels:  # the scan's own, in the tumour too
            missed = (volume[(..., *box)] + 1) / 2 - self._decode(self._encode(volume), box)
            decoded = (decoded + self.autoencoder.detail(missed)).clamp(0, 1)
        painted = _to_xyz(_placed(decoded, (volume + 1) / 2, box))
        return painted if aim is None else (painted + self._shift(painted, *aim)).clamp(0, 1)

    @torch.no_grad()
    def change(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
        contrast_hu: float | Sequence[float] | Tensor | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Decoded tumour crop minus decoded healthy crop: shapes and scale as :meth:`inpaint`.

        The autoencoder's blur is in both and cancels, so that adding the change to the scan keeps
        the scan's own noise and sharpness. Beyond ``near`` it is 0.
        """
        latent, volume, aim = self._paint(crop, tumor_mask, seed, noise, contrast_hu)
        box = self._box(crop, near)
        healthy = self._decode(self._encode(volume), box)
        change = self._decode(self.autoencoder.denormalize(latent), box) - healthy
        change = _to_xyz(_placed(change, torch.zeros_like(volume), box))
        return change if aim is None else change + self._shift(crop + change, *aim)

    # -- the steps ---------------------------------------------------------------------------------

    def _paint(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int] | None,
        noise: Tensor | None,
        contrast_hu: float | Sequence[float] | Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """Normalised latent of the crop with a tumour, the crop as the networks see it, and the
        mask, level and contrast that `shift` needs, where a contrast is aimed at."""
        seeds = per_sample_seeds(seed, len(crop)) if noise is None else None
        aim = self._aim(crop, tumor_mask, seeds, contrast_hu)
        cond, volume = self._condition(crop, tumor_mask, None if aim is None else aim[2])
        return self.sample(cond, self._noise(cond, seeds, noise)), volume, aim

    def _aim(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seeds: list[int] | None,
        contrast_hu: float | Sequence[float] | Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        taught = self.sampler.contrast
        if contrast_hu is None and taught is None:
            return None
        _check_pair(crop, tumor_mask)
        hu = self._hu(crop)
        if contrast_hu is not None:
            level = own_level(hu, tumor_mask)
            wanted = onto(torch.as_tensor(contrast_hu, dtype=hu.dtype), hu.device)
            if any_bool(contrast_hu) or wanted.ndim > 1 or wanted.numel() not in (1, len(crop)):
                raise ValueError(
                    f"contrast_hu must be one number, or one for each of the {len(crop)} samples, "
                    f"got {contrast_hu!r}; pass for example -35.0"
                )
            return tumor_mask, level, wanted.expand(len(crop))
        assert taught is not None
        level = level_around(hu, tumor_mask, taught.tissue)
        return tumor_mask, level, draw_contrast(taught, level, seeds)

    def _shift(self, painted: Tensor, mask: Tensor, level: Tensor, wanted: Tensor) -> Tensor:
        low, high = self.window
        return shift(self._hu(painted), mask, level, wanted) / (high - low)

    def _hu(self, crop: Tensor) -> Tensor:
        low, high = self.window
        return crop.float() * (high - low) + low

    def condition(
        self, crop: Tensor, tumor_mask: Tensor, contrast_hu: Tensor | None = None
    ) -> Tensor:
        """cond (B, 9, d, h, w): normalised latent of the hollowed crop, and the mask in [-1, 1].

        Arguments as :meth:`inpaint`. The hole is 0 in the network's [-1, 1], the middle of the
        window. A denoiser that is told the contrast has a tenth channel: contrast_hu (B,), in
        eighths of the window, times the mask's share of each latent voxel.
        """
        return self._condition(crop, tumor_mask, contrast_hu)[0]

    def _condition(
        self, crop: Tensor, tumor_mask: Tensor, contrast_hu: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _check_pair(crop, tumor_mask)
        volume = _to_zxy(crop.float() * 2 - 1)
        hole = _to_zxy(tumor_mask.to(volume.dtype))
        latent = self.autoencoder.normalize(self._encode(volume * (1 - hole)))
        parts = [latent, self._latent_mask(hole, latent)]
        if self.sampler.contrast is not None:
            if contrast_hu is None:
                raise ValueError("contrast_hu must be given: this denoiser is told the contrast")
            low, high = self.window
            share = F.interpolate(hole, size=latent.shape[2:], mode="area")
            parts.append(share * (contrast_hu * 8 / (high - low))[:, None, None, None, None])
        return torch.cat(parts, dim=1), volume

    def _latent_mask(self, hole: Tensor, latent: Tensor) -> Tensor:
        size = latent.shape[2:]
        area = F.interpolate(hole, size=size, mode="area")
        if self.sampler.mask_conditioning == "area":
            return area * 2 - 1
        mask = F.interpolate(hole, size=size)
        # sampling every fourth voxel can miss a tiny tumour altogether: then the fullest cells
        fullest = (area == area.amax((2, 3, 4), keepdim=True)) & (area > 0)
        missed = mask.amax((2, 3, 4), keepdim=True) == 0
        return torch.where(missed, fullest.to(mask.dtype), mask) * 2 - 1

    def sample(self, cond: Tensor, noise: Tensor | torch.Generator) -> Tensor:
        """Normalised latent (B, 8, d, h, w) of the inpainted crop.

        noise: (steps + 1, B, 8, d, h, w), the start and then one draw a step; or a CPU
        torch.Generator, for a batch of one or one stream for the whole batch.
        """
        channels = self.autoencoder.config.latent_channels
        s = self.sampler
        if isinstance(noise, torch.Generator):
            shape = (channels, *cond.shape[2:])
            noise = torch.cat([self._draw(shape, [noise]) for _ in range(len(cond))], dim=1)
        noise = onto(noise, cond.device)
        ddpm = s.method == "ddpm"
        steps = list(range(s.timesteps)) if ddpm else ddim_steps(s.timesteps, s.steps)

        def denoise(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return self._denoise(x_t, t, cond, steps.pop())  # reading t would be waited for

        if ddpm:
            return ddpm_sample(
                denoise, self.schedule, cond, noise, clamp=s.clamp, prediction=s.prediction
            )
        return ddim_sample(
            denoise,
            self.schedule,
            cond,
            noise,
            steps=s.steps,
            clamp=s.clamp,
            prediction=s.prediction,
        )

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent -> crop in [0, 1], axes (z, x, y)."""
        return self._decode(self.autoencoder.denormalize(latent))

    def _encode(self, volume: Tensor) -> Tensor:
        with self._reduced():
            return self._run(self.autoencoder.encode, volume).float()

    def _denoise(self, x_t: Tensor, t: Tensor, cond: Tensor, step: int) -> Tensor:
        """The network's answer at this step, which t (B,) holds for each sample."""
        bar = float(self.schedule.alphas_cumprod[step])
        amplified = 1 - bar > MOST_AMPLIFIED**2 * bar
        if self.sampler.prediction == "noise" and (amplified or not self._in_bfloat16()):
            with self._reduced(False), full_float32(x_t.device.type):
                return self._run(self.denoiser, x_t, t, cond).float()
        with self._reduced():
            return self._run(self.denoiser, x_t, t, cond).float()

    def _decode(self, raw: Tensor, box: Near | None = None) -> Tensor:
        """Raw latent -> crop in [0, 1], axes (z, x, y), or a box of it."""
        with self._reduced():
            quantised = self.autoencoder.quantize(raw)
            if self.compiled is None:
                decoded = self.autoencoder.decoder(quantised, box)
            else:  # for one shape, not for every box
                decoded = self.compiled(self.autoencoder.decoder, quantised)
                decoded = decoded if box is None else decoded[(..., *box)]
        return ((decoded.float() + 1) / 2).clamp(0, 1)

    def _run(self, network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        compiled = self.compiled
        return network(*inputs) if compiled is None else compiled(network, *inputs)

    def _box(self, crop: Tensor, near: Near | None) -> Near:
        """``near`` in whole latent voxels, axes (z, x, y); the whole crop for None."""
        factor, sides = self.autoencoder.config.factor, crop.shape[2:]
        if near is None:
            near = (slice(0, sides[0]), slice(0, sides[1]), slice(0, sides[2]))
        fits = len(near) == 3 and all(
            isinstance(n, slice)
            and isinstance(n.start, int)
            and isinstance(n.stop, int)
            and n.step in (None, 1)
            and 0 <= n.start < n.stop <= side
            for n, side in zip(near, sides, strict=False)
        )
        if not fits:
            raise ValueError(
                f"near must be three slices within the crop of {tuple(sides)}, each with a start "
                f"and a stop, got {near!r}; pass for example (slice(20, 44),) * 3, or None for all"
            )
        x, y, z = (
            slice(n.start // factor * factor, min(-(-n.stop // factor) * factor, side))
            for n, side in zip(near, sides, strict=True)
        )
        return z, x, y

    def _reduced(self, allowed: bool = True) -> torch.autocast:
        """The context a network runs in: a caller's autocast has no say in it."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._in_bfloat16() and allowed
        )

    def _in_bfloat16(self) -> bool:
        """Whether the networks compute in bfloat16 at this precision, on this device."""
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        on_cpu = self.device.type == "cpu"
        if self.precision == "auto":
            return on_cpu and self.sampler.prediction != "noise" and cpu_computes_bfloat16()
        if self.precision == "bfloat16" and on_cpu and not cpu_computes_bfloat16():
            _warn_of_float32()
            return False
        return self.precision == "bfloat16"

    def _noise(self, cond: Tensor, seeds: list[int] | None, noise: Tensor | None) -> Tensor:
        if noise is not None:
            return noise
        assert seeds is not None
        shape = (self.autoencoder.config.latent_channels, *cond.shape[2:])
        return self._draw(shape, [torch.Generator().manual_seed(s) for s in seeds])

    def _draw(self, shape: Sequence[int], generators: list[torch.Generator]) -> Tensor:
        # DDIM with eta 0 uses the start alone: no use in drawing 50 more
        steps = self.sampler.steps if self.sampler.method == "ddpm" else 0
        return draw_noise(shape, steps, generators)

    # -- files -------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write model.safetensors, card.json and CARD.md into ``folder``; returns it."""
        from tumorsynth.generators.store import save_generator

        return save_generator(self, Path(folder))

    @classmethod
    def from_difftumor(cls, autoencoder: str | Path, denoiser: str | Path) -> Generator:
        """A generator from the published files: AutoencoderModel.ckpt and e.g. liver_early.pt.

        The files are read by a restricted reader that executes nothing. ``*_noearly.pt`` (T = 200)
        samples by DDIM in 50 steps, as published.
        """
        from tumorsynth.generators.difftumor import read_generator

        return read_generator(Path(autoencoder), Path(denoiser))

    def with_sampler(self, **changes: Any) -> Generator:
        """The same networks sampled another way, for example ``steps=10`` of a DDIM generator."""
        sampler = replace(self.sampler, **changes)
        other = Generator(self.autoencoder, self.denoiser, sampler, self.card)
        other.precision, other.compiled = self.precision, self.compiled
        return other


def per_sample_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed per sample: a sequence as it is, an int counted up, None drawn from torch."""
    if seed is None:
        return torch.randint(2**63 - 1, (batch,)).tolist()
    try:  # index() takes the integers of numpy and torch, and no floats
        seeds = [index(s) for s in islice(seed, batch + 1)]  # type: ignore[arg-type]
    except TypeError:
        try:
            seeds = [index(seed) + i for i in range(batch)]  # type: ignore[arg-type]
        except TypeError:
            seeds = []
    if any_bool(seed) or len(seeds) != batch or any(s < 0 or s >= 2**63 for s in seeds):
        raise ValueError(
            f"seed must be one non-negative int below 2**63, or one for each of the {batch} "
            f"samples, got {seed!r}; pass seed=0, or a list of {batch} ints"
        )
    return seeds


@torch.random.fork_rng(devices=[])  # first weights are drawn, and loading must not show in a run
def build(config: dict[str, Any]) -> tuple[Autoencoder, nn.Module, SamplerConfig]:
    """Untrained networks and sampler from the ``config`` of a card.

    Raises ValueError for an unknown denoiser or field, for sizes beyond reason, and for parts that
    do not fit together.
    """
    if isinstance(config, dict) and "autoencoder" in config and "denoiser" not in config:
        raise ValueError(
            "a generator must have a denoiser, but this folder holds an autoencoder alone; train "
            "one: tumorsynth train denoiser DATA -o OUT --autoencoder FOLDER"
        )
    try:
        check_bounds(config)
        denoiser_config = dict(config["denoiser"])
        kind = denoiser_config.pop("type")
        network, network_config = DENOISERS[kind]
        sizes = network_config(**denoiser_config)
        autoencoder = Autoencoder(AutoencoderConfig(**config["autoencoder"]))
        sampler = SamplerConfig(**config["sampler"])
        check_fit(autoencoder.config, {"type": kind, **asdict(sizes)}, sampler)
        return autoencoder, network(sizes), sampler
    except Exception as error:  # of many kinds: torch's own where a size is absurd
        raise ValueError(
            f"the card's config does not describe a generator of this version: {error}; "
            f"it needs autoencoder, denoiser (type {' or '.join(DENOISERS)}) and sampler"
        ) from error


def config_of(generator: Generator) -> dict[str, Any]:
    """The inverse of :func:`build`: a JSON-able description of the networks and the sampler."""
    for kind, (network, _) in DENOISERS.items():
        if type(generator.denoiser) is network:
            return {
                "autoencoder": asdict(generator.autoencoder.config),
                "denoiser": {"type": kind, **asdict(generator.denoiser.config)},  # type: ignore[call-overload]
                "sampler": asdict(generator.sampler),
            }
    raise TypeError(
        f"a generator to save needs a denoiser of type {' or '.join(DENOISERS)}, got "
        f"{type(generator.denoiser).__name__}"
    )


@cache  # once per process
def _warn_of_float32() -> None:
    warnings.warn(
        "precision is 'bfloat16', which this CPU only emulates (PyTorch uses "
        f"{cpu_isa()}): the generator computes in float32; "
        "set generator.precision = 'auto' to have the CPU decide without this warning",
        stacklevel=2,
    )


def _check_pair(crop: Tensor, tumor_mask: Tensor) -> None:
    if crop.shape != tumor_mask.shape or crop.ndim != 5 or crop.shape[1] != 1:
        raise ValueError(
            f"crop and tumor_mask must have the same shape (B, 1, X, Y, Z), got "
            f"{tuple(crop.shape)} and {tuple(tumor_mask.shape)}"
        )


def _placed(part: Tensor, whole: Tensor, box: Near) -> Tensor:
    """``part`` in its box, and around it what ``whole`` has there."""
    if part.shape == whole.shape:
        return part
    whole = whole.clone()
    whole[(..., *box)] = part.to(whole.dtype)
    return whole


def _to_zxy(x: Tensor) -> Tensor:
    """(B, C, x, y, z) -> (B, C, z, x, y), the networks' order."""
    return x.permute(0, 1, 4, 2, 3).contiguous()


def _to_xyz(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous()
