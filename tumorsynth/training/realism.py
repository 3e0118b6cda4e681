"""How a generator's tumours compare with real ones, and what it changes beside them."""

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
from tumorsynth.training.data import Case, DataProblems, components, find_tumors, to_unit
from tumorsynth.training.measures import distance, summary, tumor_statistics
from tumorsynth.training.outlines import alone
from tumorsynth.training.pictures import grid, middle_of, outlined, sections, shown
from tumorsynth.training.reconstruction import Place, cube, reconstructed, spread

SIZES_MM = (8.0, 20.0)  # of the synthetic tumours measured
TILE_MM = 48  # side of the pictures


@dataclass
class Painted:
    """A synthetic tumour in healthy tissue, or a real one: crops (X, Y, Z) around it."""

    case: Case
    centre: Sequence[int]
    seed: int
    before: Tensor  # HU; of a real tumour the scan as it is
    after: Tensor
    mask: Tensor
    statistics: tuple[float, float, float]


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
    """How synthetic tumours compare with real ones, and what is changed beside them; JSON-able.

    ``tumours`` has contrast and noise (`summary`) of the "real" ones and of at most so many
    "synthetic" ones of 8 to 20 mm in healthy tissue of at most so many scans.
    ``inpainting`` is of at most so many holes of those tumours' shapes in the same places, see
    `inpainting_error`. ``skipped`` says why something is not there. pictures: a PNG to write.

    organ_labels: where synthetic tumours are put, by default `organ_labels_around`.
    """
    annotated = [case for case in cases if case.label is not None]
    chosen = sorted(annotated, key=lambda case: not _has(case, tumor_label))[:scans]
    if organ_labels is None:
        organ_labels = organ_labels_around(annotated, tumor_label)
    result: dict[str, Any] = {"organ_labels": list(organ_labels)}
    if not chosen:
        return {**result, "skipped": "none of the scans measured is annotated"}
    if not organ_labels:
        why = "no label but the tumours' own, or none at all, to put synthetic tumours into"
        return {**result, "skipped": why}
    real = [one for case in chosen for one in real_tumors(case, organ_labels, tumor_label)]
    made: list[Painted] = []
    reasons: list[str] = []
    each = -(-tumours // len(chosen))
    for case in chosen:
        calls = range(-(-each // 3))
        made += list(synthetic_tumors(generator, case, organ_labels, tumor_label, calls, reasons))[
            :each
        ]
    result["tumours"] = {
        name: summary([one.statistics for one in ones])
        for name, ones in (("real", real), ("synthetic", made[:tumours]))
        if ones
    }
    if made:
        result["inpainting"] = inpainting_error(generator, spread(made, holes))
    else:
        result["skipped"] = f"no synthetic tumour: {'; '.join(sorted(set(reasons)))}"
    if pictures is not None and (made or real):
        low, high = generator.window
        grid(pictures, _rows(spread(made, 6), spread(real, 6), (high - low) / 4))
    return result


def _has(case: Case, value: int) -> bool:
    return case.label is not None and bool((case.label == value).any())


def organ_labels_around(cases: Sequence[Case], tumor_label: int) -> list[int]:
    """Label values of at least a quarter of what is labelled 2 to 5 mm around the tumours."""
    counts = torch.zeros(256, dtype=torch.long)
    for case in cases:
        if case.label is None:
            continue
        for low, high, _ in components(case.label == tumor_label):
            where = _around(low, high, case.hu.shape, 6)
            label = case.label[where]
            far = distance(label == tumor_label, 5)
            counts += label[(far > 2) & (far <= 5)].long().bincount(minlength=256)
    counts[0] = counts[tumor_label] = 0
    return [] if not counts.any() else (counts >= counts.sum() / 4).nonzero().flatten().tolist()


def real_tumors(case: Case, organ_labels: Sequence[int], tumor_label: int) -> list[Painted]:
    """The annotated tumours of a case, from 4.5 mm."""
    assert case.label is not None
    try:
        found = find_tumors([case], tumor_label)
    except DataProblems:
        return []
    out = []
    for tumor in found:
        where = _around(tumor.low, tumor.high, case.hu.shape)
        hu, label = case.hu[where].float(), case.label[where]
        mask = alone(case, tumor, tumor_label)[where]
        centre = [(a + b) // 2 for a, b in zip(tumor.low, tumor.high, strict=True)]
        organ = torch.isin(label, torch.tensor(list(organ_labels), dtype=label.dtype))
        out.append(Painted(case, centre, 0, hu, hu, mask, tumor_statistics(hu, mask, organ)))
    return out


def synthetic_tumors(
    generator: Generator,
    case: Case,
    organ_labels: Sequence[int],
    tumor_label: int,
    seeds: Sequence[int],
    reasons: list[str] | None = None,
) -> Iterator[Painted]:
    """Three tumours for each seed in the organ of a case; reasons: gets why some are not made."""
    assert case.label is not None
    low, high = generator.window
    hu, label = case.hu.float().clamp(low, high)[None], case.label[None]
    labels = [int(v) for v in organ_labels]
    organ = torch.isin(case.label, torch.tensor(labels, dtype=case.label.dtype))
    synth = SynthesizeTumor(
        generator,
        labels,
        tumor_label=tumor_label,
        count=3,
        size_mm=SIZES_MM,
        device=generator.device,
    )
    for seed in seeds:
        image, new_label = synth(hu, label, seed=seed)
        for record in synth.report:
            if not record["applied"]:
                if reasons is not None:
                    reasons.append(record["reason"])
                continue
            centre = record["centre_voxel"]
            where = _around(centre, centre, case.hu.shape)
            new = (new_label[0][where] == tumor_label) & (label[0][where] != tumor_label)
            mask = _part_of(new, [c - s.start for c, s in zip(centre, where, strict=True)])
            after = image[0][where]
            statistics = tumor_statistics(after, mask, organ[where] & ~new)
            yield Painted(case, centre, record["seed"], hu[0][where], after, mask, statistics)


@torch.no_grad()
def inpainting_error(generator: Generator, holes: Sequence[Painted]) -> dict[str, Any]:
    """What `Generator.inpaint` changes beside a hole in healthy tissue, in HU.

    The crop (the generator's side) is hollowed where the synthetic tumour was; the sampler puts a
    tumour there, so that nothing can be said of the hole itself. Outside it the crop should come
    back as it was: RMSE over all of it, and RMSE and bias over the ring 2 to 6 mm around the
    hole; ``reconstruction_...`` is the error of the autoencoder alone in the same voxels, which
    is the least that can be, and ``without_detail_...`` that of its decoded latent, where it has
    detail. Voxels beyond the window are left out.
    """
    low, high = generator.window
    errors: dict[str, list[Tensor]] = {"outside": [], "ring": []}
    plain: dict[str, list[Tensor]] = {"outside": [], "ring": []}
    bare: dict[str, list[Tensor]] = {"outside": [], "ring": []}
    for hole in holes:
        index = [
            torch.arange(c - generator.crop_size // 2, c + (generator.crop_size + 1) // 2)
            for c in hole.centre
        ]
        # beyond the scan its last voxels go on
        index = [i.clamp(0, n - 1) for i, n in zip(index, hole.case.hu.shape, strict=True)]
        scan = hole.case.hu[index[0]][:, index[1]][:, :, index[2]].float()
        mask = _moved(hole.mask, hole, index)
        crop = to_unit(scan, (low, high))[None, None].to(generator.device)
        painted = generator.inpaint(crop, mask[None, None].to(crop.device), seed=hole.seed)
        out = painted[0, 0].cpu() * (high - low) + low
        _, again, decoded = reconstructed(generator.autoencoder, scan)
        far = distance(mask, 6)
        seen = (scan > low) & (scan < high)
        for name, region in (("outside", far > 0), ("ring", (far > 2) & (far <= 6))):
            errors[name].append((out - scan)[region & seen])
            plain[name].append((again - scan)[region & seen])
            bare[name].append((decoded - scan)[region & seen])
    ring, outside = torch.cat(errors["ring"]), torch.cat(errors["outside"])

    def rmse(error: Tensor) -> float:
        return round(float(error.double().square().mean().sqrt()), 2)

    told = {
        "holes": len(holes),
        "outside_rmse_hu": rmse(outside),
        "ring_rmse_hu": rmse(ring),
        "ring_bias_hu": round(float(ring.double().mean()), 2),
        "reconstruction_outside_rmse_hu": rmse(torch.cat(plain["outside"])),
        "reconstruction_ring_rmse_hu": rmse(torch.cat(plain["ring"])),
    }
    if generator.autoencoder.config.detail_channels:
        told["without_detail_outside_rmse_hu"] = rmse(torch.cat(bare["outside"]))
        told["without_detail_ring_rmse_hu"] = rmse(torch.cat(bare["ring"]))
    return told


def _moved(mask: Tensor, hole: Painted, index: list[Tensor]) -> Tensor:
    """The mask of a crop `_around` the hole, on another crop of the scan, given by its indices."""
    whole = torch.zeros(hole.case.hu.shape, dtype=torch.bool)
    whole[_around(hole.centre, hole.centre, hole.case.hu.shape)] = mask
    return whole[index[0]][:, index[1]][:, :, index[2]]


def _part_of(mask: Tensor, at: Sequence[int]) -> Tensor:
    """The connected part of a mask that holds a voxel; corners connect, they are 1.7 mm away."""
    part = torch.zeros_like(mask)
    part[tuple(at)] = True
    while True:
        grown = (distance(part, 1) <= 1.8) & mask
        if torch.equal(grown, part):
            return part
        part = grown


def _around(
    low: Sequence[int], high: Sequence[int], shape: Sequence[int], margin: int = 24
) -> Place:
    a, b, c = (
        slice(max(0, int(lo) - margin), min(n, int(hi) + margin))
        for lo, hi, n in zip(low, high, shape, strict=True)
    )
    return a, b, c


def _rows(made: list[Painted], real: list[Painted], reach: float) -> list[list[list[Tensor]]]:
    """Synthetic tumours: before, after, outlined; beside each a real one: plain, outlined."""
    rows = []
    for k in range(max(len(made), len(real))):
        row = []
        for one, views in ((made[k : k + 1], 3), (real[k : k + 1], 2)):
            row += _views(one[0], views, reach) if one else []
        rows.append(row)
    return rows


def _views(one: Painted, views: int, reach: float) -> list[list[Tensor]]:
    """Three groups of tiles, one for each plane, of TILE_MM around a tumour; ``reach`` HU above and
    below the tissue around it are white and black."""
    middle = middle_of(one.mask)  # near the scan's edge it is not the crop's
    where = cube(middle, one.mask.shape, TILE_MM)
    at = [m - s.start for m, s in zip(middle, where, strict=True)]
    before, after, mask = one.before[where], one.after[where], one.mask[where]
    far = distance(mask, 8)
    around = before[(far > 2) & (far <= 8)]
    level = float(around.median()) if len(around) else float(before.median())
    groups = []
    for old, new, inside in zip(*(sections(v, at) for v in (before, after, mask)), strict=True):
        old, new = (shown(v, level - reach, level + reach) for v in (old, new))
        tiles = [old, new, outlined(new, inside)][3 - views :]
        groups.append([_padded(tile) for tile in tiles])
    return groups


def _padded(tile: Tensor) -> Tensor:
    """A tile that ends with the scan, with black, so that columns stay columns."""
    return F.pad(tile, (0, TILE_MM - tile.shape[1], 0, TILE_MM - tile.shape[0]))
