"""Measure a generator on scans it has not seen, for its card.

    python -m tumorsynth.training.evaluate RUN/gen heldout.npz --organ-label 1 --tumor-label 2

Prints JSON: reconstruction error in the organ, and contrast and noise of real and synthetic
tumours against the organ around them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from tumorsynth.generator import Generator
from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.synthesizer import SynthesizeTumor
from tumorsynth.training.data import Case, find_tumors, load_pack, to_unit

NOISE_SIGMA_MM = 1.5  # what a Gaussian of this width leaves behind counts as noise
SIDE = 96


@torch.no_grad()
def reconstruction(generator: Generator, case: Case, organ_labels: list[int]) -> dict[str, float]:
    """Error of the autoencoder in the organ's voxels, over 96^3 crops, in HU."""
    assert case.label is not None
    hu = case.hu.float()
    organ = torch.isin(case.label, torch.tensor(organ_labels, dtype=case.label.dtype))
    error: list[np.ndarray] = []
    noise_in: list[np.ndarray] = []
    noise_out: list[np.ndarray] = []
    for corner in np.ndindex(*(max(1, -(-n // SIDE)) for n in hu.shape)):
        where = tuple(
            slice(max(0, min(c * SIDE, n - SIDE)), max(0, min(c * SIDE, n - SIDE)) + SIDE)
            for c, n in zip(corner, hu.shape, strict=True)
        )
        inside = organ[where]
        sides = [n - n % 4 for n in inside.shape]
        inside = inside[: sides[0], : sides[1], : sides[2]]
        crop = hu[where][: sides[0], : sides[1], : sides[2]]
        if inside.float().mean() < 0.05:
            continue
        x = (to_unit(crop) * 2 - 1)[None, None].permute(0, 1, 4, 2, 3).contiguous()
        out = generator.autoencoder(x).permute(0, 1, 3, 4, 2)[0, 0].clamp(-1, 1)
        recon = (out + 1) / 2 * (HU_HIGH - HU_LOW) + HU_LOW
        core = ndimage.binary_erosion(inside.numpy(), iterations=4)
        error.append((recon - crop)[inside].numpy())
        for values, volume in ((noise_in, crop), (noise_out, recon)):
            values.append(_noise(volume.numpy())[core])
    rmse = float(np.sqrt(np.mean(np.concatenate(error) ** 2)))
    return {
        "rmse_hu": round(rmse, 2),
        "psnr_db": round(float(20 * np.log10((HU_HIGH - HU_LOW) / rmse)), 2),
        "bias_hu": round(float(np.concatenate(error).mean()), 2),
        "scan_noise_hu": round(float(np.concatenate(noise_in).std()), 2),
        "reconstruction_noise_hu": round(float(np.concatenate(noise_out).std()), 2),
    }


def _noise(volume: np.ndarray) -> np.ndarray:
    return volume - ndimage.gaussian_filter(volume, NOISE_SIGMA_MM)


def tumor_statistics(hu: np.ndarray, tumor: np.ndarray, organ: np.ndarray) -> tuple[float, ...]:
    """Contrast of a tumour's core to the organ 2 to 8 mm away, and noise inside and outside, HU."""
    core = ndimage.binary_erosion(tumor, iterations=1)
    core = core if core.sum() >= 20 else tumor
    distance = ndimage.distance_transform_edt(~tumor)
    shell = organ & (distance > 2) & (distance < 8)
    if not shell.any():
        return (float("nan"),) * 3
    noise = _noise(hu)
    return (
        float(hu[core].mean() - np.median(hu[shell])),
        float(noise[core].std()),
        float(noise[shell].std()),
    )


def summary(rows: list[tuple[float, ...]]) -> dict[str, Any]:
    table = np.array([row for row in rows if np.isfinite(row).all()])
    contrast, inside, outside = table.T
    return {
        "tumours": len(table),
        "contrast_hu": [round(float(v), 1) for v in np.percentile(contrast, [5, 50, 95])],
        "noise_inside_hu": round(float(np.median(inside)), 1),
        "noise_outside_hu": round(float(np.median(outside)), 1),
        "noise_ratio": round(float(np.median(inside / outside)), 2),
    }


def tumors(
    generator: Generator, case: Case, organ_labels: list[int], tumor_label: int, calls: int
) -> dict[str, Any]:
    """The same statistics for the real tumours of a case and for synthetic ones in its organ."""
    assert case.label is not None
    hu, label = case.hu.float()[None], case.label[None]
    organ = np.isin(case.label.numpy(), organ_labels)
    out: dict[str, Any] = {}
    try:
        real = find_tumors([case], tumor_label)
    except ValueError:
        real = []
    rows = []
    for t in real:
        where = _around(t.low, t.high, case.hu.shape)
        mask = case.label[where].numpy() == tumor_label
        rows.append(tumor_statistics(hu[0][where].numpy(), mask, organ[where]))
    if rows:
        out["real"] = summary(rows)
    synth = SynthesizeTumor(
        generator, organ_labels, tumor_label=tumor_label, count=3, size_mm=(8, 20)
    )
    rows = []
    for seed in range(calls):
        image, new_label = synth(hu, label, seed=seed)
        for record in synth.report:
            if not record["applied"]:
                continue
            centre = record["centre_voxel"]
            where = _around(centre, centre, case.hu.shape)
            new = (new_label[0][where] == tumor_label) & (label[0][where] != tumor_label)
            parts, _ = ndimage.label(new.numpy())
            at = tuple(c - part.start for c, part in zip(centre, where, strict=True))
            mask = parts == parts[at]
            healthy = organ[where] & ~new.numpy()
            rows.append(tumor_statistics(image[0][where].numpy(), mask, healthy))
    out["synthetic"] = summary(rows)
    return out


def _around(
    low: tuple[int, ...], high: tuple[int, ...], shape: torch.Size
) -> tuple[slice, slice, slice]:
    a, b, c = (
        slice(max(0, int(lo) - 24), min(n, int(hi) + 24))
        for lo, hi, n in zip(low, high, shape, strict=True)
    )
    return a, b, c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("generator", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--organ-label", type=int, nargs="+", default=[1])
    parser.add_argument("--tumor-label", type=int, default=2)
    parser.add_argument("--calls", type=int, default=10, help="of three tumours each")
    args = parser.parse_args()
    from tumorsynth.weights import read_folder

    generator = read_folder(args.generator)
    result = {}
    for case in load_pack(args.pack):
        if case.label is None:
            continue
        result[case.name] = {
            "reconstruction": reconstruction(generator, case, args.organ_label),
            **tumors(generator, case, args.organ_label, args.tumor_label, args.calls),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
