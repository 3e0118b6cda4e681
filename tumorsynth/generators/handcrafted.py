"""The hand-crafted generator ``hu2023``: no weights, a few random numbers and Gaussian filters.

After Hu et al., "Label-Free Liver Tumor Segmentation", CVPR 2023 (arXiv 2303.14869), section on
tumour generation: salt noise of slowly varying density, Gaussian-filtered and brought to the
voxel grid by cubic interpolation, gives blobs; they modulate a drop in HU; the blurred mask
blends the result in. Written anew from the paper's description, with four differences:

* The change is computed around the tumour only, not for a 420 x 300 x 320 volume beforehand.
* The drop in HU is relative to the parenchyma measured around the tumour, so that it suits an
  unenhanced scan as well as an enhanced one.
* The scan's noise stays: only what stands out of it (vessels) is taken away inside the tumour.
* No mass effect of its own: `mass_effect` moves the tissue around tumours of any generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from tumorsynth.arguments import any_bool
from tumorsynth.devices import onto
from tumorsynth.geometry import bounding_box
from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.models.slabs import Near

HU_SPAN = HU_HIGH - HU_LOW  # of a crop's values, 0 to 1
_MARGIN = 12  # mm around the tumour where the change is computed; it fades out over the last 4
_FADE = 4.0
_TINY = 1e-15  # weight at 12.5 mm of the narrow Gaussian that measures distances


@dataclass(frozen=True)
class HandcraftedConfig:
    """Settings of the hand-crafted generator. Pairs are ranges of a uniform draw per tumour.

    HU are Hounsfield units, mm are millimetres (the crop has 1 mm voxels).
    """

    contrast_hu: tuple[float, float] = (26.0, 46.0)
    """How far below the organ the tumour lies, for an organ at ``reference_hu``."""
    reference_hu: float = 110.0
    """Parenchyma of an enhanced liver. The contrast scales with parenchyma / reference ..."""
    scale_limit: float = 2.0
    """... up to this factor, a kidney of 220 HU."""
    min_contrast_hu: float = 8.0
    """Contrast is never less: a labelled tumour has to be there."""
    floor_hu: float = 10.0
    """A tumour that would lie below this (fluid, fat) is made brighter than its organ instead,
    as tumours in a severely fatty liver are."""
    texture_hu: tuple[float, float] = (2.0, 5.0)
    """Standard deviation of the blobs, scaled like the contrast."""
    texture_mm: tuple[float, float] = (2.0, 4.0)
    """Distance at which the blobs' autocorrelation has fallen to 1/e."""
    edge_mm: tuple[float, float] = (1.0, 2.0)
    """Sigma of the soft edge that ``inpaint`` blends with (sigma_c in the paper)."""
    capsule_probability: float = 0.2
    """How many of the tumours of at least ``capsule_from_mm`` show a bright rim."""
    capsule_from_mm: float = 20.0
    """Equivalent diameter from which a rim is possible."""
    capsule_hu: tuple[float, float] = (8.0, 20.0)
    """Height of the rim at the tumour's surface."""
    tissue_hu: tuple[float, float] = (0.0, 250.0)
    """What may be parenchyma; fat, air and bone around the tumour are not measured."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if any_bool(value):
                raise ValueError(
                    f"{field.name} must be a number or (low, high), got {value}; the default is "
                    f"{field.default}."
                )
            if isinstance(value, tuple) and not (len(value) == 2 and 0 <= value[0] <= value[1]):
                raise ValueError(
                    f"{field.name} must be (low, high) with 0 <= low <= high, got {value}; "
                    f"the default is {field.default}."
                )
        if not 0 <= self.capsule_probability <= 1:
            raise ValueError(
                "capsule_probability must lie in [0, 1], "
                f"got {self.capsule_probability}; pass 0 for no rims."
            )
        if self.texture_mm[0] <= 0 or self.edge_mm[0] <= 0 or self.reference_hu <= 0:
            raise ValueError(
                "texture_mm, edge_mm and reference_hu must be above 0, got "
                f"{self.texture_mm}, {self.edge_mm}, {self.reference_hu}; keep their defaults."
            )


class HandcraftedGenerator:
    """The same interface as a diffusion generator; results depend on crop, mask and seed alone."""

    name = "hu2023"
    crop_size = 64
    crop_multiple = 1
    own_edge = False  # of a change: it carries on beyond the mask
    even = False  # its texture is meant
    parameter_count = 0  # it has no network
    keeps_detail = True  # of the scan: it adds to the crop
    window = (HU_LOW, HU_HIGH)

    def __init__(self, config: HandcraftedConfig | None = None) -> None:
        self.config = config or HandcraftedConfig()
        self.device = torch.device("cpu")
        self.card: dict[str, Any] = {
            "name": self.name,
            "kind": "handcrafted",
            "version": "1",
            "source": "Hu et al., Label-Free Liver Tumor Segmentation, CVPR 2023, arXiv 2303.14869",
            "licence": "Apache-2.0",
            "organs": "solid abdominal organs; liver above all",
        }

    def to(self, device: torch.device | str) -> HandcraftedGenerator:
        """Name the device; there are no weights to move, work is done where the crop is."""
        self.device = torch.device(device)
        return self

    def inpaint(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int],
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """The crop with a tumour, blended by the method's own soft edge.

        crop: (B, 1, X, Y, Z) floating, 0 = -175 HU, 1 = 250 HU, 1 mm voxels. tumor_mask: bool, same
        shape. seed: one int (sample b uses seed + b), or one per sample. contrast_hu: HU above the
        organ (or, negative, below), one number or one per sample, instead of the config's. near: not
        needed, all is computed. NaN and inf in the crop stay where they are.
        Raises ValueError or TypeError for input of another kind.
        """
        return crop + self._run(crop, tumor_mask, seed, contrast_hu, with_edge=True)

    def change(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int],
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Tumour minus healthy, (B, 1, X, Y, Z) in the crop's scale, always finite.

        Carries on beyond the mask (full to 8 mm, none from 12 mm), for the caller's feathered mask
        to limit. Zero for an empty mask. Arguments and errors as for ``inpaint``.
        """
        return self._run(crop, tumor_mask, seed, contrast_hu, with_edge=False)

    @torch.no_grad()
    def _run(
        self,
        crop: Tensor,
        mask: Tensor,
        seed: int | Sequence[int],
        contrast_hu: float | Sequence[float] | None,
        *,
        with_edge: bool,
    ) -> Tensor:
        seeds = _check(crop, mask, seed)
        asked = _contrasts(contrast_hu, len(seeds))
        change = torch.zeros_like(crop)
        # Autocast would do the filters in half precision. One sample at a time: what is
        # computed for it cannot depend on its batch-mates.
        with torch.autocast(crop.device.type, enabled=False):
            for sample, own_seed in enumerate(seeds):
                box = bounding_box(mask[sample, 0], _MARGIN)
                if box is None:
                    continue
                hu = crop[sample, 0][box.slices].float() * HU_SPAN + HU_LOW
                inside = mask[sample, 0][box.slices]
                part = _change_hu(hu, inside, own_seed, self.config, with_edge, asked[sample])
                change[sample, 0][box.slices] = (part / HU_SPAN).to(crop.dtype)
        return change


def _change_hu(
    hu: Tensor,
    mask: Tensor,
    seed: int,
    config: HandcraftedConfig,
    with_edge: bool,
    asked_hu: float | None,
) -> Tensor:
    """Change in HU around one tumour. hu: (x, y, z), any value; mask: bool, not empty."""
    rng = torch.Generator().manual_seed(seed)
    # All draws first and always all of them, so that one setting does not shift another's draw.
    draws = torch.rand(6, generator=rng).tolist()
    contrast, texture_hu, texture_mm, edge_mm, rim_hu = (
        low + draw * (high - low)
        for draw, (low, high) in zip(
            draws[1:],
            (
                config.contrast_hu,
                config.texture_hu,
                config.texture_mm,
                config.edge_mm,
                config.capsule_hu,
            ),
            strict=True,
        )
    )
    diameter = (6 / math.pi * int(mask.sum())) ** (1 / 3)
    if draws[0] >= config.capsule_probability or diameter < config.capsule_from_mm:
        rim_hu = 0.0

    finite = hu.isfinite()
    hu = hu.clamp(HU_LOW, HU_HIGH)
    distance = _distance(mask)
    organ, shell = _parenchyma(hu, mask, finite, distance, config.tissue_hu)
    # How far the low-passed image lies from the organ, and how far noise alone takes it.
    deviation = _blur(torch.where(finite, hu, organ), 0.8) - organ
    noise = 1.4826 * float(deviation[shell].abs().median()) if bool(shell.any()) else 0.0

    scale = min(max(organ / config.reference_hu, 0.0), config.scale_limit)
    contrast = max(scale * contrast, config.min_contrast_hu)
    texture_hu *= min(scale, 1.0)
    if organ - contrast < config.floor_hu:
        contrast = -contrast
    if asked_hu is not None:
        contrast = -asked_hu

    blobs = onto(_blobs(mask.shape, texture_mm, rng), hu.device)
    edge = _blur(mask.float(), edge_mm)
    # Zero mean over the tumour: the mean contrast is the one drawn. 4 edge (1 - edge) is 1 at the
    # surface and falls off over about one sigma to either side.
    tumor = texture_hu * (blobs - blobs[mask].mean()) - contrast + 4 * edge * (1 - edge) * rim_hu

    # Fat, air and fluid stay as they are; so does what is brighter than a vessel outside the
    # tumour (bone, contrast medium in the gut), at whose border the filter sees both.
    dark = -abs(contrast) - 3.0 * noise
    tumor = _ramp(deviation, dark - 50.0, dark) * tumor - _vessels(deviation, noise)
    tumor = torch.where(mask, tumor, tumor * _ramp(-deviation, -120.0, -80.0))
    change = tumor * _ramp(-distance, -float(_MARGIN), _FADE - _MARGIN)
    return change * edge / edge.amax() if with_edge else change


def _vessels(deviation: Tensor, noise: float) -> Tensor:
    """What stands out brightly of the organ, to be taken away, in HU (>= 0).

    Thresholding firmly (nothing below 1.5 standard deviations of the noise, everything from 3)
    and widening that region by about the filter's width leaves noise and removes vessels with
    their borders.
    """
    low = max(1.5 * noise, 4.0)
    region = (2 * _blur(_ramp(deviation, low, 2 * low), 1.5)).clamp(max=1.0)
    return region * deviation.clamp(min=0.0)


def _parenchyma(
    hu: Tensor, mask: Tensor, finite: Tensor, distance: Tensor, tissue_hu: tuple[float, float]
) -> tuple[float, Tensor]:
    """Median HU of the organ 3 to 10 mm around the tumour, and the voxels it was measured in.

    The tumour's place and its next neighbourhood are organ (the crop is still healthy): tissue
    in the shell that differs from it by more than the noise allows is another organ, or a vessel.
    """
    tissue = finite & (hu >= tissue_hu[0]) & (hu <= tissue_hu[1])
    near = tissue & (distance < 3.0)
    if not bool(near.any()):
        near = finite & mask
        if not bool(near.any()):
            return 0.0, near
        return float(hu[near].median()), near
    centre = hu[near].median()
    spread = 2.5 * 1.4826 * (hu[near] - centre).abs().median()
    alike = tissue & ((hu - centre).abs() <= spread.clamp(20.0, 60.0))
    shell = alike & (distance >= 3.0) & (distance <= 10.0)
    if int(shell.sum()) < 50:
        shell = alike & (distance <= 10.0)
    return float(hu[shell].median()), shell


def _blobs(shape: torch.Size, length_mm: float, rng: torch.Generator) -> Tensor:
    """Dark blobs on a 1 mm grid, mean 0 and standard deviation 1 over the box, on the CPU.

    Salt noise on a coarse grid, its density (about 15 %) varying over some 16 mm, filtered and
    interpolated to 1 mm by cubic convolution, both at once as one matrix per axis.
    """
    step = length_mm / 2
    coarse = [math.ceil(n / step) + 3 for n in shape]
    uniform = torch.rand(2, *coarse, generator=rng)
    density = _apply(uniform[0], [_gauss(n, 8.0 / step) for n in coarse])
    density = (density - density.mean()) / density.std()
    salt = (uniform[1] < (0.15 + 0.035 * density).clamp(0.02, 0.4)).float()
    # A Gaussian of sigma s has autocorrelation 1/e at 2 s = 2 steps; the interpolation adds to it.
    sigma = 0.8
    field = _apply(
        salt,
        [_cubic(n, m, step) @ _gauss(m, sigma) for n, m in zip(shape, coarse, strict=True)],
    )
    return (field.mean() - field) / field.std().clamp(min=1e-6)


def _distance(mask: Tensor) -> Tensor:
    """Distance to the mask in mm, about 0 inside; inf beyond some 12 mm.

    From a sum of Gaussians, whose logarithm is a soft minimum of the squared distance: one
    separable filter, right to about half a millimetre from 3 mm on.
    """
    sigma = 1.5
    matrices = [onto(_gauss(n, sigma, normalised=False), mask.device) for n in mask.shape]
    total = _apply(mask.float() * 1e15, matrices)  # scaled up to keep clear of underflow
    # Several voxels contribute: at a flat surface some 10 in effect, at a small mask fewer.
    total = total / total.amax().clamp(max=1e16)
    return (-2 * sigma**2 * total.log()).clamp(min=0.0).sqrt()


def _blur(field: Tensor, sigma: float) -> Tensor:
    """Gaussian filter; the weights of voxels beyond the border go to those within."""
    return _apply(field, [onto(_gauss(n, sigma), field.device) for n in field.shape])


def _apply(field: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A separable linear filter, (x, y, z) -> (x', y', z'), given as one matrix per axis.

    For boxes of some 50 voxels three matrix products are faster than convolutions.
    """
    a, b, c = matrices
    field = (a @ field.flatten(1)).unflatten(1, field.shape[1:])
    return (b @ field) @ c.T


def _gauss(n: int, sigma: float, normalised: bool = True) -> Tensor:
    """(n, n): entry (i, j) is the weight of voxel j in the filtered voxel i."""
    index = torch.arange(n, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    # Products of three smaller weights would be subnormal numbers, which are slow on a CPU.
    weights = torch.where(weights < _TINY, 0.0, weights)
    return weights / weights.sum(1, keepdim=True) if normalised else weights


def _cubic(n: int, coarse: int, step: float) -> Tensor:
    """(n, coarse): cubic convolution (Keys 1981, a = -1/2) to n points 1 / step apart."""
    x = (torch.arange(n) / step + 1.0)[:, None] - torch.arange(coarse)
    x = x.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, torch.zeros(())))


def _ramp(x: Tensor, low: float, high: float) -> Tensor:
    """0 up to low, 1 from high, smooth between."""
    t = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3 - 2 * t)


def _check(crop: Tensor, mask: Tensor, seed: int | Sequence[int]) -> list[int]:
    """One seed per sample, or an error that names rule, value and fix."""
    if not isinstance(crop, Tensor) or not crop.is_floating_point():
        kind = crop.dtype if isinstance(crop, Tensor) else type(crop).__name__
        raise TypeError(f"crop must be a floating tensor, got {kind}; use crop.float().")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"tumor_mask must be a bool tensor, got {kind}; use tumor_mask.bool().")
    if crop.ndim != 5 or crop.shape[1] != 1 or crop.shape != mask.shape:
        raise ValueError(
            "crop and tumor_mask must both be (B, 1, X, Y, Z), got "
            f"{tuple(crop.shape)} and {tuple(mask.shape)}; add the missing axes or cut alike."
        )
    if isinstance(seed, (int, Integral)):
        return [int(seed) + i for i in range(len(crop))]  # as the diffusion generator does
    if len(seed) != len(crop):
        raise ValueError(
            f"seed must be one int or one per sample, got {len(seed)} for {len(crop)} samples; "
            "pass a list of B ints."
        )
    return [int(s) for s in seed]


def _contrasts(contrast_hu: float | Sequence[float] | None, count: int) -> list[float | None]:
    """One contrast per sample; None leaves it to the config."""
    if any_bool(contrast_hu):
        raise ValueError(f"contrast_hu must be HU, got {contrast_hu!r}; pass for example -35.0")
    if contrast_hu is None or isinstance(contrast_hu, int | float | Real):
        return [None if contrast_hu is None else float(contrast_hu)] * count
    if len(contrast_hu) != count:
        raise ValueError(
            f"contrast_hu must be one number or one per sample, got {len(contrast_hu)} for {count} "
            "samples; pass a list of B numbers."
        )
    return [float(c) for c in contrast_hu]
