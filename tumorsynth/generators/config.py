"""How a generator samples: the `sampler` of its card, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tumorsynth.appearance.contrast import ContrastConfig
from tumorsynth.generators.config_check import finite, whole
from tumorsynth.generators.sampling import Prediction

# What a sampler may ask for, so that no card takes the machine's memory or does not end
MAX_STEPS = 1000
MAX_CROP = 192


@dataclass(frozen=True)
class SamplerConfig:
    """How a generator samples, and what it expects of a crop.

    timesteps: T of the cosine schedule. steps: denoising steps, T itself for DDPM.
    method: "ddpm" (early tumours, T = 4) or "ddim" (mid and late, 200 -> 50).
    prediction: what the network predicts, "noise" (published), "x0" or "v".
    clamp: x0 is kept in [-clamp, clamp] at every step; None leaves it (DDIM as published).
    mask_conditioning: how the mask comes to latent size: "nearest" (published) or "area", which
        keeps tiny tumours.
    zero_terminal_snr: the last noise level holds no signal at all (Lin et al. 2023); not for
        "noise", whose answer would mean nothing there.
    contrast: the denoiser is told the tumour's contrast (a further channel of cond), and this is
        what it was taught; None for the published ones.
    crop_size, crop_multiple: the crop's preferred side and what it must be a multiple of, in voxels
        of the 1 mm grid.
    """

    method: str = "ddpm"
    timesteps: int = 4
    steps: int = 4
    prediction: Prediction = "noise"
    clamp: float | None = 1.0
    mask_conditioning: str = "nearest"
    zero_terminal_snr: bool = False
    contrast: ContrastConfig | None = None
    crop_size: int = 96
    crop_multiple: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.contrast, dict):  # from JSON
            object.__setattr__(self, "contrast", ContrastConfig(**self.contrast))
        counts = (self.timesteps, self.steps, self.crop_size, self.crop_multiple)
        rules = {
            f"timesteps and steps must be whole numbers, at most {MAX_STEPS}, crop_size and "
            f"crop_multiple at most {MAX_CROP}": whole(*counts)
            and max(counts[:2]) <= MAX_STEPS
            and max(counts[2:]) <= MAX_CROP,
            "clamp must be positive, or None": self.clamp is None
            or (finite(self.clamp) and self.clamp > 0),
            'zero_terminal_snr needs prediction "x0" or "v"': not (
                self.zero_terminal_snr and self.prediction == "noise"
            ),
            'method must be "ddpm" or "ddim"': self.method in ("ddpm", "ddim"),
            'prediction must be "noise", "x0" or "v"': self.prediction in ("noise", "x0", "v"),
            'mask_conditioning must be "nearest" or "area"': self.mask_conditioning
            in ("nearest", "area"),
            "steps must be timesteps for ddpm, a divisor of it for ddim": 0 < self.steps
            and (
                self.steps == self.timesteps
                if self.method == "ddpm"
                else self.timesteps % self.steps == 0
            ),
            "crop_size must be a positive multiple of crop_multiple": self.crop_multiple > 0
            and self.crop_size > 0
            and self.crop_size % self.crop_multiple == 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, got {asdict(self)}")
