"""Compare a generator's tumours with real ones, and measure what it changes beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.generators.diffusion import Generator
from tumorsynth.synthesizer import SynthesizeTumor
from tumorsynth.training.data import Case, DataProblems, connected_components, find_tumors, to_unit
from tumorsynth.training.measures import SHELL_MM, distance_mm, summary, tumor_statistics
from tumorsynth.training.outlines import tumor_mask
from tumorsynth.training.pictures import (
    PLANES,
    Group,
    GroupCaption,
    anatomical_slices,
    middle_voxel,
    outlined,
    shown,
    write_grid,
)
from tumorsynth.training.reconstruction import CropSlices, cube, evenly_spaced, reconstructed

SYNTHETIC_SIZE_MM = (8.0, 20.0)  # of the synthetic tumours measured
TUMORS_PER_CALL = 3
CROP_MARGIN_MM = 24  # around a tumour
TILE_MM = 48  # side of the pictures' tiles
MAX_PICTURE_ROWS = 6
ORGAN_DISTANCE_MM = (2, 5)  # from a tumour, where its organ's labels are read
RING_MM = (2, 6)  # around a hole, where inpainting should change nothing
SYNTHETIC_VIEWS = ("before", "after", "outlined")
REAL_VIEWS = ("scan", "outlined")


@dataclass
class TumorCrop:
    """A synthetic or a real tumour: crops (X, Y, Z) around it."""

    case: Case
    centre: Sequence[int]  # voxel of the scan
    seed: int
    before: Tensor  # HU; of a real tumour the scan as it is
    after: Tensor
    mask: Tensor
    statistics: tuple[float, float, float]  # of `tumor_statistics`


def measure_generator(
    generator: Generator,
    cases: Sequence[Case],
    tumor_label: int,
    organ_labels: Sequence[int] | None = None,
    *,
    tumours: int = 16,
    scans: int = 4,
    holes: int = 8,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Compare synthetic tumours with real ones, and measure what is changed beside them.

    Args:
        generator: the generator to measure.
        cases: scans; only annotated ones are used.
        tumor_label: label value of the real tumours.
        organ_labels: labels to place synthetic tumours in, by default `organ_labels_around`.
        tumours: most synthetic tumours of 8 to 20 mm to measure.
        scans: most scans to place them in; scans with tumours come first.
        holes: most holes of the synthetic tumours' shapes to measure `inpainting_error` on.
        pictures: a PNG to write.

    Returns:
        A JSON-able dict: ``organ_labels``; ``tumours`` with the `summary` of the "real" and the
        "synthetic" ones; ``inpainting`` of `inpainting_error`; ``skipped``, the reason why
        something is missing.
    """
    annotated = [case for case in cases if case.label is not None]
    chosen = sorted(annotated, key=lambda case: not _has_label(case, tumor_label))[:scans]
    if organ_labels is None:
        organ_labels = organ_labels_around(annotated, tumor_label)
    result: dict[str, Any] = {"organ_labels": list(organ_labels)}
    if not chosen:
        return {**result, "skipped": "none of the scans measured is annotated"}
    if not organ_labels:
        why = "no label but the tumours' own, or none at all, to put synthetic tumours into"
        return {**result, "skipped": why}
    real = [one for case in chosen for one in real_tumors(case, organ_labels, tumor_label)]
    synthetic: list[TumorCrop] = []
    reasons: list[str] = []
    per_scan = -(-tumours // len(chosen))
    for case in chosen:
        seeds = range(-(-per_scan // TUMORS_PER_CALL))
        crops = synthetic_tumors(generator, case, organ_labels, tumor_label, seeds, reasons)
        synthetic += list(crops)[:per_scan]
    result["tumours"] = {
        name: summary([one.statistics for one in ones])
        for name, ones in (("real", real), ("synthetic", synthetic[:tumours]))
        if ones
    }
    if synthetic:
        result["inpainting"] = inpainting_error(generator, evenly_spaced(synthetic, holes))
    else:
        result["skipped"] = f"no synthetic tumour: {'; '.join(sorted(set(reasons)))}"
    if pictures is not None and (synthetic or real):
        low, high = generator.window
        _write_pictures(
            pictures,
            evenly_spaced(synthetic, MAX_PICTURE_ROWS),
            evenly_spaced(real, MAX_PICTURE_ROWS),
            (high - low) / 4,
        )
    return result


def _has_label(case: Case, value: int) -> bool:
    return case.label is not None and bool((case.label == value).any())


def organ_labels_around(cases: Sequence[Case], tumor_label: int) -> list[int]:
    """Return the labels that hold at least a quarter of the labelled voxels around the tumours.

    Voxels 2 to 5 mm away from a tumour count.
    """
    counts = torch.zeros(256, dtype=torch.long)
    nearest, farthest = ORGAN_DISTANCE_MM
    for case in cases:
        if case.label is None:
            continue
        for low, high, _ in connected_components(case.label == tumor_label):
            where = _crop_around(low, high, case.hu.shape, farthest + 1)
            label = case.label[where]
            far = distance_mm(label == tumor_label, farthest)
            counts += label[(far > nearest) & (far <= farthest)].long().bincount(minlength=256)
    counts[0] = counts[tumor_label] = 0
    return [] if not counts.any() else (counts >= counts.sum() / 4).nonzero().flatten().tolist()


def real_tumors(case: Case, organ_labels: Sequence[int], tumor_label: int) -> list[TumorCrop]:
    """Return crops of the annotated tumours of a case, from 4.5 mm."""
    assert case.label is not None
    try:
        tumors = find_tumors([case], tumor_label)
    except DataProblems:
        return []
    crops = []
    for tumor in tumors:
        where = _crop_around(tumor.low, tumor.high, case.hu.shape)
        hu, label = case.hu[where].float(), case.label[where]
        mask = tumor_mask(case, tumor, tumor_label)[where]
        centre = [(a + b) // 2 for a, b in zip(tumor.low, tumor.high, strict=True)]
        organ = torch.isin(label, torch.tensor(list(organ_labels), dtype=label.dtype))
        statistics = tumor_statistics(hu, mask, organ)
        crops.append(TumorCrop(case, centre, 0, hu, hu, mask, statistics))
    return crops


def synthetic_tumors(
    generator: Generator,
    case: Case,
    organ_labels: Sequence[int],
    tumor_label: int,
    seeds: Sequence[int],
    reasons: list[str] | None = None,
) -> Iterator[TumorCrop]:
    """Synthesise three tumours for each seed in the organ of a case, and yield crops of them.

    Args:
        generator: the generator to measure.
        case: an annotated case.
        organ_labels: labels to place tumours in.
        tumor_label: label value of tumours.
        seeds: one synthesis call for each.
        reasons: a list to which the reasons of skipped tumours are appended.
    """
    assert case.label is not None
    low, high = generator.window
    hu, label = case.hu.float().clamp(low, high)[None], case.label[None]
    labels = [int(v) for v in organ_labels]
    organ = torch.isin(case.label, torch.tensor(labels, dtype=case.label.dtype))
    synthesize = SynthesizeTumor(
        generator,
        labels,
        tumor_label=tumor_label,
        count=TUMORS_PER_CALL,
        size_mm=SYNTHETIC_SIZE_MM,
        device=generator.device,
        any_tissue=True,  # held-out scans may be of another phase
    )
    for seed in seeds:
        image, new_label = synthesize(hu, label, seed=seed)
        for record in synthesize.report:
            if not record["applied"]:
                if reasons is not None:
                    reasons.append(record["reason"])
                continue
            centre = record["centre_voxel"]
            where = _crop_around(centre, centre, case.hu.shape)
            new = (new_label[0][where] == tumor_label) & (label[0][where] != tumor_label)
            mask = _component_at(new, [c - s.start for c, s in zip(centre, where, strict=True)])
            after = image[0][where]
            statistics = tumor_statistics(after, mask, organ[where] & ~new)
            yield TumorCrop(case, centre, record["seed"], hu[0][where], after, mask, statistics)


@torch.no_grad()
def inpainting_error(generator: Generator, holes: Sequence[TumorCrop]) -> dict[str, Any]:
    """Measure in HU what `Generator.inpaint` changes beside a hole in healthy tissue.

    The crop (of the generator's size) is hollowed where the synthetic tumour was, and the sampler
    paints a tumour there. Outside the hole the crop should stay as it was; inside, no answer is
    right or wrong. Voxels beyond the window are left out.

    Args:
        generator: the generator to measure.
        holes: synthetic tumours, whose place and shape the holes get.

    Returns:
        A JSON-able dict: RMSE over all voxels outside the hole (``outside_``), RMSE and bias over
        the ring 2 to 6 mm around it (``ring_``); ``reconstruction_...``, the error of the
        autoencoder alone in the same voxels, a lower bound; ``without_detail_...``, that of its
        decoded latent, where it has detail.
    """
    low, high = generator.window
    kinds = ("inpainted", "reconstruction", "without_detail")
    errors: dict[str, dict[str, list[Tensor]]] = {k: {"outside": [], "ring": []} for k in kinds}
    for hole in holes:
        index = _crop_indices(hole, generator.crop_size)
        scan = hole.case.hu[index[0]][:, index[1]][:, :, index[2]].float()
        mask = _mask_on_crop(hole, index)
        crop = to_unit(scan, (low, high))[None, None].to(generator.device)
        painted = generator.inpaint(crop, mask[None, None].to(crop.device), seed=hole.seed)
        inpainted = painted[0, 0].cpu() * (high - low) + low
        _, recon, decoded = reconstructed(generator.autoencoder, scan)
        far = distance_mm(mask, RING_MM[1])
        seen = (scan > low) & (scan < high)
        regions = {"outside": far > 0, "ring": (far > RING_MM[0]) & (far <= RING_MM[1])}
        for kind, volume in zip(kinds, (inpainted, recon, decoded), strict=True):
            for name, region in regions.items():
                errors[kind][name].append((volume - scan)[region & seen])

    def rmse(kind: str, name: str) -> float:
        error = torch.cat(errors[kind][name])
        return round(float(error.double().square().mean().sqrt()), 2)

    ring = torch.cat(errors["inpainted"]["ring"])
    figures = {
        "holes": len(holes),
        "outside_rmse_hu": rmse("inpainted", "outside"),
        "ring_rmse_hu": rmse("inpainted", "ring"),
        "ring_bias_hu": round(float(ring.double().mean()), 2),
        "reconstruction_outside_rmse_hu": rmse("reconstruction", "outside"),
        "reconstruction_ring_rmse_hu": rmse("reconstruction", "ring"),
    }
    if generator.autoencoder.config.detail_channels:
        figures["without_detail_outside_rmse_hu"] = rmse("without_detail", "outside")
        figures["without_detail_ring_rmse_hu"] = rmse("without_detail", "ring")
    return figures


def _crop_indices(hole: TumorCrop, side: int) -> list[Tensor]:
    """Voxels along each axis of a cube around a hole; beyond the scan its last voxels repeat."""
    return [
        torch.arange(c - side // 2, c + (side + 1) // 2).clamp(0, n - 1)
        for c, n in zip(hole.centre, hole.case.hu.shape, strict=True)
    ]


def _mask_on_crop(hole: TumorCrop, index: list[Tensor]) -> Tensor:
    """The mask of a hole on another crop of the scan, given by its indices."""
    whole = torch.zeros(hole.case.hu.shape, dtype=torch.bool)
    whole[_crop_around(hole.centre, hole.centre, hole.case.hu.shape)] = hole.mask
    return whole[index[0]][:, index[1]][:, :, index[2]]


def _component_at(mask: Tensor, voxel: Sequence[int]) -> Tensor:
    """The 26-connected component of a mask that holds a voxel."""
    part = torch.zeros_like(mask)
    part[tuple(voxel)] = True
    while True:
        grown = (distance_mm(part, 1) <= 1.8) & mask  # neighbours at a corner are 1.7 mm away
        if torch.equal(grown, part):
            return part
        part = grown


def _crop_around(
    low: Sequence[int], high: Sequence[int], shape: Sequence[int], margin: int = CROP_MARGIN_MM
) -> CropSlices:
    a, b, c = (
        slice(max(0, int(lo) - margin), min(n, int(hi) + margin))
        for lo, hi, n in zip(low, high, shape, strict=True)
    )
    return a, b, c


def _write_pictures(
    path: Path, synthetic: list[TumorCrop], real: list[TumorCrop], half_window_hu: float
) -> None:
    """Write rows of a synthetic and a real tumour each; the shorter list ends in black tiles."""
    captions: list[GroupCaption] = []
    rows: list[list[Group]] = [[] for _ in range(max(len(synthetic), len(real)))]
    for kind, crops, views in (
        ("synthetic tumour", synthetic, SYNTHETIC_VIEWS),
        ("real tumour", real, REAL_VIEWS),
    ):
        if not crops:
            continue
        captions += [(f"{kind}, {plane}", views) for plane in PLANES]
        black = [[torch.zeros(TILE_MM, TILE_MM) for _ in views] for _ in PLANES]
        for k, row in enumerate(rows):
            row += _views(crops[k], len(views), half_window_hu) if k < len(crops) else black
    write_grid(path, rows, captions)


def _views(crop: TumorCrop, views: int, half_window_hu: float) -> list[Group]:
    """The last of (before, after, outlined) for each plane, TILE_MM wide, around a tumour.

    White and black are ``half_window_hu`` above and below the tissue around the tumour.
    """
    middle = middle_voxel(crop.mask)  # near the scan's edge it is not the crop's middle
    where = cube(middle, crop.mask.shape, TILE_MM)
    at = [m - s.start for m, s in zip(middle, where, strict=True)]
    before, after, mask = crop.before[where], crop.after[where], crop.mask[where]
    far = distance_mm(mask, SHELL_MM[1])
    around = before[(far > SHELL_MM[0]) & (far <= SHELL_MM[1])]
    level = float(around.median()) if len(around) else float(before.median())
    low, high = level - half_window_hu, level + half_window_hu
    groups = []
    slices = (anatomical_slices(v, at) for v in (before, after, mask))
    for old, new, inside in zip(*slices, strict=True):
        old, new = shown(old, low, high), shown(new, low, high)
        tiles = [old, new, outlined(new, inside)][3 - views :]
        groups.append([_pad_to_tile(tile) for tile in tiles])
    return groups


def _pad_to_tile(tile: Tensor) -> Tensor:
    """Pad a tile that ends with the scan with black, so that columns stay aligned."""
    return F.pad(tile, (0, TILE_MM - tile.shape[1], 0, TILE_MM - tile.shape[0]))
