"""The hand-crafted generator ``hu2023``: random numbers and Gaussian filters, no weights.

It follows Hu et al., "Label-Free Liver Tumor Segmentation", CVPR 2023 (arXiv 2303.14869): salt
noise of slowly varying density, Gaussian-filtered and interpolated to the voxel grid, gives blobs
that modulate a drop in HU; the blurred mask blends the result in. This implementation is written
from the paper's description and differs in four points:

* It computes the change around the tumour only.
* The drop in HU is relative to the parenchyma measured around the tumour, so that it suits
  unenhanced and enhanced scans.
* It keeps the scan's noise, and removes only vessels inside the tumour.
* It has no mass effect of its own: `mass_effect` moves tissue around tumours of any generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from tumorsynth.appearance.tissue import CARD_KEY, SOFT_TISSUE
from tumorsynth.arguments import any_bool, keywords_of, known_keywords
from tumorsynth.devices import onto
from tumorsynth.generators import filters
from tumorsynth.geometry import bounding_box
from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.models.slabs import Near

WINDOW_HU = HU_HIGH - HU_LOW  # width of the window that a crop's 0 to 1 stands for
MARGIN_MM = 12  # around the tumour, in which the change is computed
FADE_MM = 4.0  # at the end of the margin, over which the change fades out
PARENCHYMA_MM = (3.0, 10.0)  # distance from the tumour in which the organ's HU are measured
MIN_PARENCHYMA_VOXELS = 50  # with fewer, the whole neighbourhood is measured
MAD_TO_SIGMA = 1.4826  # standard deviation of normal values / their median absolute deviation


@dataclass(frozen=True)
class HandcraftedConfig:
    """Settings of the hand-crafted generator. Pairs are ranges, sampled uniformly for each tumour.

    Args:
        contrast_hu: HU by which the tumour is darker than an organ at ``reference_hu``.
        reference_hu: HU of enhanced liver. The contrast scales with parenchyma / reference.
        scale_limit: largest factor of that scaling.
        min_contrast_hu: smallest contrast, so that every labelled tumour is visible.
        floor_hu: no tumour becomes darker than this (fluid), but for ``min_contrast_hu``.
        texture_hu: standard deviation of the blobs, scaled like the contrast.
        texture_mm: distance at which the blobs' autocorrelation falls to 1/e.
        edge_mm: sigma of the soft edge that ``inpaint`` blends with (sigma_c in the paper).
        capsule_probability: share of tumours of at least ``capsule_from_mm`` with a bright rim.
        capsule_from_mm: equivalent diameter from which a rim is possible.
        capsule_hu: height of the rim at the tumour's surface.
        tissue_hu: HU that may be parenchyma; fat, air and bone are not measured.

    Raises:
        ValueError: if a value is out of range.
    """

    contrast_hu: tuple[float, float] = (26.0, 46.0)
    reference_hu: float = 110.0
    scale_limit: float = 2.0
    min_contrast_hu: float = 8.0
    floor_hu: float = 10.0
    texture_hu: tuple[float, float] = (2.0, 5.0)
    texture_mm: tuple[float, float] = (2.0, 4.0)
    edge_mm: tuple[float, float] = (1.0, 2.0)
    capsule_probability: float = 0.2
    capsule_from_mm: float = 20.0
    capsule_hu: tuple[float, float] = (8.0, 20.0)
    tissue_hu: tuple[float, float] = (0.0, 250.0)

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


@keywords_of()
class HandcraftedGenerator:
    """Paints tumours by the rules of Hu et al. 2023, with the interface of `TumorGenerator`.

    Args:
        config: ranges to sample from; None takes the defaults.

    Examples:
        >>> config = HandcraftedConfig(contrast_hu=(60.0, 60.0))
        >>> synth = ts.SynthesizeTumor(ts.HandcraftedGenerator(config), tumor_label=2)
    """

    name = "hu2023"
    crop_size = 64
    crop_multiple = 1
    own_edge = False  # a change continues beyond the mask
    even = False
    darkens = True
    parameter_count = 0  # it has no network
    keeps_detail = True
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
            CARD_KEY: SOFT_TISSUE.to_card(),
        }

    def to(self, device: torch.device | str) -> HandcraftedGenerator:
        """Set the device, and return self; there are no weights to move."""
        self.device = torch.device(device)
        return self

    @known_keywords
    def inpaint(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int],
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Return the crop with a tumour, blended by the method's own soft edge.

        Args:
            crop: (B, 1, X, Y, Z) floating; 0 is -175 HU, 1 is 250 HU; 1 mm voxels. NaN and inf stay
                where they are.
            tumor_mask: bool, same shape.
            seed: one int (sample b uses seed + b), or one for each sample.
            contrast_hu: HU above the organ (negative: below), one number or one for each sample;
                None samples the config's range.
            near: ignored; the whole change is computed.

        Returns:
            (B, 1, X, Y, Z) in the crop's scale and dtype.

        Raises:
            TypeError: if crop or mask have another dtype.
            ValueError: if shapes, seeds or contrasts do not fit.
        """
        return crop + self._run(crop, tumor_mask, seed, contrast_hu, with_edge=True)

    @known_keywords
    def change(
        self,
        crop: Tensor,
        tumor_mask: Tensor,
        seed: int | Sequence[int],
        contrast_hu: float | Sequence[float] | None = None,
        near: Near | None = None,
    ) -> Tensor:
        """Return tumour minus healthy tissue, for the caller's feathered mask to limit.

        The change continues beyond the mask: in full to 8 mm, fading to 0 at 12 mm. Arguments and
        errors are those of `inpaint`.

        Returns:
            (B, 1, X, Y, Z) in the crop's scale, finite everywhere; 0 for an empty mask.
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
        contrasts = _contrasts(contrast_hu, len(seeds))
        change = torch.zeros_like(crop)
        # Without autocast, which would filter in half precision. One sample at a time, so that
        # no result depends on the batch.
        with torch.autocast(crop.device.type, enabled=False):
            for sample, own_seed in enumerate(seeds):
                box = bounding_box(mask[sample, 0], MARGIN_MM)
                if box is None:
                    continue
                hu = crop[sample, 0][box.slices].float() * WINDOW_HU + HU_LOW
                inside = mask[sample, 0][box.slices]
                part = _change_hu(hu, inside, own_seed, self.config, with_edge, contrasts[sample])
                change[sample, 0][box.slices] = (part / WINDOW_HU).to(crop.dtype)
        return change


def _change_hu(
    hu: Tensor,
    mask: Tensor,
    seed: int,
    config: HandcraftedConfig,
    with_edge: bool,
    contrast_hu: float | None,
) -> Tensor:
    """Return the change in HU around one tumour.

    Args:
        hu: (x, y, z), any value.
        mask: bool, same shape, not empty.
        seed: decides every random quantity.
        config: ranges to sample from.
        with_edge: whether to blend by the method's soft edge.
        contrast_hu: HU above the organ; None samples the config's range.
    """
    rng = torch.Generator().manual_seed(seed)
    # always draw all, so that one setting does not shift the draw of another
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
    distance = filters.distance_mm(mask)
    organ, shell = _parenchyma(hu, mask, finite, distance, config.tissue_hu)
    # deviation of the smoothed image from the organ, and the part of it that is noise
    deviation = filters.blur(torch.where(finite, hu, organ), 0.8) - organ
    noise = MAD_TO_SIGMA * float(deviation[shell].abs().median()) if bool(shell.any()) else 0.0

    scale = min(max(organ / config.reference_hu, 0.0), config.scale_limit)
    contrast = min(scale * contrast, organ - config.floor_hu)
    contrast = max(contrast, config.min_contrast_hu)
    texture_hu *= min(scale, 1.0)
    if contrast_hu is not None:
        contrast = -contrast_hu

    blobs = onto(filters.blobs(mask.shape, texture_mm, rng), hu.device)
    edge = filters.blur(mask.float(), edge_mm)
    # The blobs have zero mean over the tumour, so that the contrast is met. 4 edge (1 - edge) is 1
    # at the surface and falls off over about one sigma to either side.
    tumor = texture_hu * (blobs - blobs[mask].mean()) - contrast + 4 * edge * (1 - edge) * rim_hu

    # Keep fat, air and fluid, and outside the tumour what is brighter than a vessel (bone, contrast
    # medium in the gut), whose borders the filter blurs.
    dark = -abs(contrast) - 3.0 * noise
    tumor = filters.ramp(deviation, dark - 50.0, dark) * tumor - _vessels(deviation, noise)
    tumor = torch.where(mask, tumor, tumor * filters.ramp(-deviation, -120.0, -80.0))
    change = tumor * filters.ramp(-distance, -float(MARGIN_MM), FADE_MM - MARGIN_MM)
    return change * edge / edge.amax() if with_edge else change


def _vessels(deviation: Tensor, noise: float) -> Tensor:
    """Return how far vessels are brighter than the organ, in HU (>= 0).

    A threshold between 1.5 and 3 standard deviations of the noise, widened by about the filter's
    width, keeps noise and selects vessels with their borders.
    """
    low = max(1.5 * noise, 4.0)
    region = (2 * filters.blur(filters.ramp(deviation, low, 2 * low), 1.5)).clamp(max=1.0)
    return region * deviation.clamp(min=0.0)


def _parenchyma(
    hu: Tensor, mask: Tensor, finite: Tensor, distance: Tensor, tissue_hu: tuple[float, float]
) -> tuple[float, Tensor]:
    """Return the organ's median HU around the tumour, and the voxels it was measured in.

    The tumour's place and its nearest neighbourhood are organ, as the crop is still healthy. Tissue
    farther away that differs by more than noise explains is a vessel or another organ.
    """
    nearest_mm, farthest_mm = PARENCHYMA_MM
    tissue = finite & (hu >= tissue_hu[0]) & (hu <= tissue_hu[1])
    near = tissue & (distance < nearest_mm)
    if not bool(near.any()):
        near = finite & mask
        if not bool(near.any()):
            return 0.0, near
        return float(hu[near].median()), near
    centre = hu[near].median()
    spread = 2.5 * MAD_TO_SIGMA * (hu[near] - centre).abs().median()
    similar = tissue & ((hu - centre).abs() <= spread.clamp(20.0, 60.0))
    shell = similar & (distance >= nearest_mm) & (distance <= farthest_mm)
    if int(shell.sum()) < MIN_PARENCHYMA_VOXELS:
        shell = similar & (distance <= farthest_mm)
    return float(hu[shell].median()), shell


def _check(crop: Tensor, mask: Tensor, seed: int | Sequence[int]) -> list[int]:
    """Check crop, mask and seed; return one seed for each sample."""
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
        return [int(seed) + i for i in range(len(crop))]
    if len(seed) != len(crop):
        raise ValueError(
            f"seed must be one int or one per sample, got {len(seed)} for {len(crop)} samples; "
            "pass a list of B ints."
        )
    return [int(s) for s in seed]


def _contrasts(contrast_hu: float | Sequence[float] | None, count: int) -> list[float | None]:
    """Return one contrast for each sample; None leaves it to the config."""
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
