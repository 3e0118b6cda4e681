"""Measure how well an autoencoder reconstructs scans, by tissue, and how it uses its codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.training.data import Case, connected_components, to_unit
from tumorsynth.training.measures import Difference, RegionErrors
from tumorsynth.training.pictures import PLANES, Group, anatomical_slices, shown, write_grid

CROP_SIDE_MM = 64  # of the crops measured at the end of a training
TILE_SIDE_MM = 96  # of the cubes that `reconstruction` cuts a whole scan into
MIN_REGION_VOXELS = 500  # of a region that gets figures
MIN_ORGAN_SHARE = 0.05  # of a cube that `reconstruction` measures
MIN_TISSUE_SHARE = 0.3  # of a crop that is measured for its tissue
MAX_CROPS_PER_SCAN = 8
MAX_PICTURE_ROWS = 8
DIFFERENCE_GAIN = 4  # of the difference in the pictures
PICTURE_CAPTIONS = [
    (plane, ("scan", "reconstruction", f"{DIFFERENCE_GAIN} x difference")) for plane in PLANES
]
T = TypeVar("T")
CropSlices = tuple[slice, slice, slice]
Regions = dict[tuple[str, str], RegionErrors]  # by kind of reconstruction and name of the tissue


@torch.no_grad()
def measure_autoencoder(
    autoencoder: Autoencoder,
    cases: Sequence[Case],
    tumor_label: int | None = None,
    *,
    crops: int = 64,
    side: int = CROP_SIDE_MM,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Measure how well an autoencoder reconstructs scans, by kind of tissue.

    Nothing is random.

    Args:
        autoencoder: the network to measure.
        cases: the scans to measure it on.
        tumor_label: label value reported as "tumour".
        crops: most crops to measure, spread over the scans, at most 8 in each; half of them lie
            around the tumours, or else the rarest labels.
        side: side of the crops in mm.
        pictures: a PNG to write.

    Returns:
        A JSON-able dict. ``reconstruction`` has `RegionErrors.figures` for "tissue" (all voxels
        inside the autoencoder's window) and for every label value with at least 500 such voxels.
        ``without_detail``, where the autoencoder has detail, has the same for the decoded latent
        alone, which is what a denoiser works in. ``codes``, where there is a codebook, has the
        share of codes used and their perplexity.
    """
    window = autoencoder.config.window
    regions: Regions = {}
    codes: list[Tensor] = []
    rows: list[list[Group]] = []
    chosen = evenly_spaced(list(cases), max(1, crops // 4))
    each = max(1, min(MAX_CROPS_PER_SCAN, crops // len(chosen)))
    for case in chosen:
        for index, where in enumerate(choose_crops(case, side, each, tumor_label, window)):
            scan, recon, decoded = reconstructed(autoencoder, case.hu[where], codes)
            differences = {"reconstruction": Difference(scan, recon, window)}
            if autoencoder.config.detail_channels:
                differences["without_detail"] = Difference(scan, decoded, window)
            _add_regions(
                regions, differences, _tissue_masks(case, where, scan, tumor_label, window)
            )
            if len(rows) < MAX_PICTURE_ROWS and index < max(1, MAX_PICTURE_ROWS // len(chosen)):
                rows.append(_picture_row(scan, recon, window))
    result = _region_figures(regions)
    if autoencoder.codebook is not None:
        result["codes"] = _code_usage(autoencoder, torch.cat(codes))
    if pictures is not None and rows:
        write_grid(pictures, rows, PICTURE_CAPTIONS)
    return result


def _tissue_masks(
    case: Case,
    where: CropSlices,
    scan: Tensor,
    tumor_label: int | None,
    window: tuple[float, float],
) -> dict[str, Tensor]:
    """Masks by name of the voxels inside the window: all of them, and those of each label."""
    raw = _trim(case.hu[where], scan)
    inside = (raw > window[0]) & (raw < window[1])
    masks = {"tissue": inside}
    if case.label is not None:
        label = _trim(case.label[where], scan)
        for value in label.unique().tolist():
            if value:
                name = "tumour" if value == tumor_label else f"label {value}"
                masks[name] = inside & (label == value)
    return masks


def _add_regions(
    regions: Regions, differences: dict[str, Difference], masks: dict[str, Tensor]
) -> None:
    for name, mask in masks.items():
        if not bool(mask.any()):
            continue
        for kind, difference in differences.items():
            errors = regions.setdefault((kind, name), RegionErrors(difference.window))
            errors.add(difference, mask)


def _region_figures(regions: Regions) -> dict[str, Any]:
    """Figures by kind of reconstruction, then by tissue: the tumour first, then all tissue."""
    names = {name for _, name in regions}
    ordered = sorted(names, key=lambda name: (name != "tumour", name != "tissue", len(name), name))
    return {
        kind: {
            name: regions[kind, name].figures()
            for name in ordered
            if regions[kind, name].voxels >= MIN_REGION_VOXELS
        }
        for kind in dict.fromkeys(("reconstruction", *(kind for kind, _ in regions)))
    }


def _code_usage(autoencoder: Autoencoder, codes: Tensor) -> dict[str, Any]:
    assert autoencoder.codebook is not None
    usage = autoencoder.codebook.usage(codes.to(autoencoder.codebook.counts.device))
    return {
        "codes": autoencoder.config.codes,
        "used_share": round(len(codes.unique()) / autoencoder.config.codes, 4),
        "perplexity": round(usage.perplexity, 1),
        "latent_voxels": codes.numel(),
    }


@torch.no_grad()
def reconstructed(
    autoencoder: Autoencoder, hu: Tensor, codes: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct a crop with and without `Autoencoder.detail`.

    Args:
        autoencoder: the network, on any device.
        hu: (X, Y, Z) in HU. Sides are cut to multiples of the autoencoder's factor.
        codes: a list to which the codes used are appended.

    Returns:
        The crop, its reconstruction, and the reconstruction without detail: (X, Y, Z) in HU,
        clipped to the window, on the CPU.
    """
    low, high = autoencoder.config.window
    scan = hu.float().clamp(low, high)
    for axis, n in enumerate(scan.shape):
        scan = scan.narrow(axis, 0, n - n % autoencoder.config.factor)
    x = (to_unit(scan, (low, high)) * 2 - 1)[None, None].permute(0, 1, 4, 2, 3).contiguous()
    x = x.to(next(autoencoder.parameters()).device)
    latent = autoencoder.encode(x)
    if codes is not None and autoencoder.codebook is not None:
        codes.append(autoencoder.codes(latent).flatten().cpu())
    decoded = autoencoder.decode(latent)

    def to_hu(volume: Tensor) -> Tensor:
        back = volume.permute(0, 1, 3, 4, 2)[0, 0].clamp(-1, 1).cpu()
        return (back + 1) / 2 * (high - low) + low

    return scan, to_hu(decoded + autoencoder.detail(x - decoded)), to_hu(decoded)


def choose_crops(
    case: Case, side: int, count: int, tumor_label: int | None, window: tuple[float, float]
) -> list[CropSlices]:
    """Choose at most ``count`` cubes of a scan, without chance.

    Half of them lie around the scan's tumours, or else its rarest labels; the others are spread
    over what is tissue.
    """
    chosen = [
        cube(centre, case.hu.shape, side)
        for centre in evenly_spaced(_label_centres(case, count, tumor_label), max(1, count // 2))
    ]
    rated: list[tuple[float, CropSlices]] = []
    for where in tiles(case.hu.shape, side):
        part = case.hu[where]
        rated.append((float(((part > window[0]) & (part < window[1])).float().mean()), where))
    enough = min(MIN_TISSUE_SHARE, max(share for share, _ in rated))
    tissue = [where for share, where in rated if share >= enough]
    chosen += evenly_spaced(tissue, count - len(chosen))
    return [where for k, where in enumerate(chosen) if where not in chosen[:k]]


def _label_centres(case: Case, count: int, tumor_label: int | None) -> list[list[int]]:
    """Centres of the tumours, largest first, or else a voxel of each of the rarest labels."""
    if case.label is None:
        return []
    tumor = case.label == (-1 if tumor_label is None else tumor_label)
    if bool(tumor.any()):
        boxes = sorted(connected_components(tumor), key=lambda part: -part[2])
        return [[(a + b) // 2 for a, b in zip(lo, hi, strict=True)] for lo, hi, _ in boxes]
    centres = []
    values = case.label.flatten().long().bincount()
    rarest = [int(v) for v in values.argsort() if v and values[v]]
    for value in rarest[: count // 2]:
        voxels = (case.label == value).nonzero()
        centres.append(voxels[len(voxels) // 2].tolist())
    return centres


def tiles(shape: Sequence[int], side: int) -> list[CropSlices]:
    """Return cubes of this side that cover a volume; the last are moved back to fit into it."""
    return [
        cube([c * side + side // 2 for c in corner], shape, side)
        for corner in np.ndindex(*(max(1, -(-n // side)) for n in shape))
    ]


def cube(centre: Sequence[int], shape: Sequence[int], side: int) -> CropSlices:
    """Return a cube around a voxel, moved back to fit; sides longer than the volume are cut."""
    starts = [max(0, min(c - side // 2, n - side)) for c, n in zip(centre, shape, strict=True)]
    a, b, c = (slice(s, min(n, s + side)) for s, n in zip(starts, shape, strict=True))
    return a, b, c


def evenly_spaced(items: list[T], count: int) -> list[T]:
    """Return at most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def _trim(volume: Tensor, like: Tensor) -> Tensor:
    a, b, c = like.shape
    return volume[:a, :b, :c]


def _picture_row(scan: Tensor, recon: Tensor, window: tuple[float, float]) -> list[Group]:
    """The scan, its reconstruction and their magnified difference, plane by plane."""
    width = window[1] - window[0]
    views = (
        shown(scan, *window),
        shown(recon, *window),
        (0.5 + DIFFERENCE_GAIN * (recon - scan) / width).clamp(0, 1),
    )
    return [list(group) for group in zip(*map(anatomical_slices, views), strict=True)]


def reconstruction(
    autoencoder: Autoencoder, case: Case, organ_labels: Sequence[int]
) -> dict[str, Any]:
    """Measure an autoencoder in the organ's voxels of a whole annotated scan.

    Args:
        autoencoder: the network to measure.
        case: an annotated scan, which is cut into cubes of 96 mm.
        organ_labels: label values that count as the organ.

    Returns:
        `RegionErrors.figures`; where the autoencoder has detail, also ``without_detail`` with the
        figures of the decoded latent alone.
    """
    assert case.label is not None
    organ = torch.isin(case.label, torch.tensor(list(organ_labels), dtype=case.label.dtype))
    window = autoencoder.config.window
    errors, without_detail = RegionErrors(window), RegionErrors(window)
    for where in tiles(case.hu.shape, TILE_SIDE_MM):
        factor = autoencoder.config.factor
        inside = organ[where]
        inside = inside[tuple(slice(n - n % factor) for n in inside.shape)]
        if inside.float().mean() < MIN_ORGAN_SHARE:
            continue
        scan, recon, decoded = reconstructed(autoencoder, case.hu[where])
        errors.add(Difference(scan, recon, window), inside)
        if autoencoder.config.detail_channels:
            without_detail.add(Difference(scan, decoded, window), inside)
    figures: dict[str, Any] = errors.figures() if errors.voxels else {"voxels": 0}
    if without_detail.voxels:
        figures["without_detail"] = without_detail.figures()
    return figures
