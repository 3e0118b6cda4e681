"""Is a crop that is not in HU noticed, and is a crop in HU let through?

    python -m benchmarks.reliability.intensity_scales FOLDER [--crops 200]

FOLDER holds CTs in HU (NAME_ct.nii.gz) and label maps (NAME_label.nii.gz). Random crops of each
scan, and the whole scan, go through `find_fault` as they are and as people prepare CT (clipped,
padded, noisy, denoised, with metal), and so do crops and scans that were resampled to cubic voxels:
none may be refused. Then an eighth of the crops go through it in each wrong scale: which share is
refused? They go through once more with one voxel of 30000: does the answer stay? A crop of
background alone, one value, can tell nothing and is not counted.

Scans with the label of an organ go through it with the label, too: whole, and in crops of about
96^3 around the organ. What is not refused there goes through `SynthesizeTumor`: does it paint?

The limits of the rules were set on every second scan, `tuned`; the others are `held_out`. Each half
has its JSON.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tumorsynth as ts
from benchmarks.common import write
from benchmarks.reliability.equalised import (
    equalised,
    equalised_bytes,
    equalised_in_bins,
    equalised_in_parts,
)
from tumorsynth.affines import voxel_sizes
from tumorsynth.intensity_check import (
    MIN_VALUES,
    find_fault,
    sample_organ,
    sample_voxels,
)
from tumorsynth.scans.nifti import read_volume

SIZES: dict[str, tuple[int, int, int] | None] = {
    "16x64x64": (16, 64, 64),
    "32^3": (32, 32, 32),
    "64^3": (64, 64, 64),
    "96^3": (96, 96, 96),
    "128x128x64": (128, 128, 64),
    "whole scan": None,
}
DENOISED = ("16x64x64", "32^3", "64^3")  # sizes that are filtered, too
RESAMPLED_MM = (1.0, 2.0, 3.0)
RESAMPLED_SIDE = 64  # voxels of a resampled crop
RESAMPLED = tuple(
    f"{part} in voxels of {mm:g} mm" for mm in RESAMPLED_MM for part in ("64^3", "whole scan")
)
Change = Callable[[np.ndarray], np.ndarray]
Counts = Mapping[str, Any]
HALVES = ("tuned", "held_out")


def windowed(low: float, high: float, to_low: float, to_high: float) -> Change:
    """HU to the values of a window."""
    return lambda hu: (hu.clip(low, high) - low) / (high - low) * (to_high - to_low) + to_low


def replaced(value: float, part: float) -> Change:
    """Replace a share of the voxels by one value."""

    def change(hu: np.ndarray) -> np.ndarray:
        flat = hu.flatten()
        flat[: int(part * len(flat))] = value
        return flat.reshape(hu.shape)

    return change


def noisy(hu: np.ndarray) -> np.ndarray:
    return hu + np.random.default_rng(0).normal(0, 60, hu.shape)


GOOD: dict[str, Change] = {
    "as it is": lambda hu: hu,
    "clipped to -175..250": lambda hu: hu.clip(-175, 250),
    "clipped to -200..300": lambda hu: hu.clip(-200, 300),
    "clipped to -1000..1000": lambda hu: hu.clip(-1000, 1000),
    "clipped to -100..240": lambda hu: hu.clip(-100, 240),
    "a third padded with -3024": replaced(-3024, 1 / 3),
    "a third padded with -2000": replaced(-2000, 1 / 3),
    "half padded with -1024": replaced(-1024, 1 / 2),
    "half padded with 0": replaced(0, 1 / 2),
    "0 beyond soft tissue": lambda hu: np.where((hu > -20) & (hu < 250), hu, 0),
    "2 % metal": replaced(3071, 0.02),
    "noise of 60 HU more": noisy,
    "in steps of 8 HU": lambda hu: (hu / 8).round() * 8,
    "clipped to -500..500": lambda hu: hu.clip(-500, 500),
    "clipped to -1000..400": lambda hu: hu.clip(-1000, 400),
    "clipped to 0..80": lambda hu: hu.clip(0, 80),
}


def like_mr(hu: np.ndarray) -> np.ndarray:
    """Bright fat, grey organs, a dark and noisy background."""
    noise = np.abs(np.random.default_rng(0).normal(0, 8, hu.shape))
    tissue = np.where(hu < -40, 700 - (hu + 100) / 2, 300 + 2 * (hu - 50))
    return np.where(hu < -300, noise, tissue.clip(0))


def equalised_like(scan: np.ndarray) -> dict[str, tuple[str, Change]]:
    """Ranks of the values in the scan that a crop is of."""
    whole = np.sort(scan, axis=None)
    return {"equalised before the crop": ("equalised", lambda hu: equalised(hu, whole))}


WRONG: dict[str, tuple[str, Change]] = {
    "HU / 2": ("HU/2", lambda hu: hu / 2),
    "HU x 2": ("HU x 2", lambda hu: hu * 2),
    "HU / 10": ("HU/10", lambda hu: hu / 10),
    "HU / 100": ("HU/100", lambda hu: hu / 100),
    "HU / 1000": ("HU/1000", lambda hu: hu / 1000),
    "-160..240 to 0..255, whole": ("0-255", lambda hu: windowed(-160, 240, 0, 255)(hu) // 1),
    "-175..250 to 0..255": ("0-255", windowed(-175, 250, 0, 255)),
    "-1000..1000 to 0..255, whole": ("0-255", lambda hu: windowed(-1000, 1000, 0, 255)(hu) // 1),
    "-200..300 to 0..255": ("0-255", windowed(-200, 300, 0, 255)),
    "-1000..400 to 0..255, whole": ("0-255", lambda hu: windowed(-1000, 400, 0, 255)(hu) // 1),
    "-160..240 to 0..100": ("0 to 100", windowed(-160, 240, 0, 100)),
    "-160..240 to -128..127, whole": (
        "-128 to 127",
        lambda hu: windowed(-160, 240, 0, 255)(hu) // 1 - 128,
    ),
    "(HU + 160) / 400 x 255": ("scaled", lambda hu: (hu + 160) / 400 * 255),
    "(HU + 1024) / 3072 x 255": ("0-255", lambda hu: (hu + 1024) / 3072 * 255),
    "-175..250 to 0..1": ("[0, 1]", windowed(-175, 250, 0, 1)),
    "-175..250 to -1..1": ("[-1, 1]", windowed(-175, 250, -1, 1)),
    "z-scores of the crop": ("z-scores", lambda hu: (hu - hu.mean()) / max(1e-6, hu.std())),
    "z-scores as nnU-Net": ("z-scores", lambda hu: (hu.clip(-160, 240) - 100) / 40),
    "HU + 100": ("scaled", lambda hu: hu + 100),
    "HU - 1024": ("HU-1024", lambda hu: hu - 1024),
    "HU + 1024": ("HU+1024", lambda hu: hu + 1024),
    "HU + 1024, a quarter -2000": ("HU+1024", lambda hu: replaced(-2000, 1 / 4)(hu + 1024)),
    "HU + 32768": ("HU+32768", lambda hu: hu + 32768),
    "int16 read as uint16": ("unsigned", lambda hu: np.where(hu < 0, hu + 65536, hu)),
    "-HU": ("sign", lambda hu: -hu),
    "-HU, clipped to -1000..1000": ("sign", lambda hu: -hu.clip(-1000, 1000)),
    "as in MR": ("no CT", like_mr),
    "equalised": ("equalised", equalised),
    "equalised, whole": ("equalised", lambda hu: equalised(hu).round()),
    "equalised in 256 bins": ("equalised", equalised_in_bins),
    "-160..240 to 0..255, equalised": ("equalised", lambda hu: equalised_bytes(hu, -160, 240)),
}
IN_PARTS = {"equalised in parts": ("equalised", equalised_in_parts)}  # voxels by their place
KINDS = (*WRONG, *equalised_like(np.zeros(1)), *IN_PARTS)


ORGANS = {"ircadb_p01": (1, 3, 4), "totalseg_example": (1, 2, 3, 4)}  # others: 1
NO_ORGANS = ("ibsi", "adrenal")  # their label is a tumour
AROUND_ORGAN = (96, 96, 96)
PARTS = (*SIZES, *RESAMPLED, "whole scan, with label", "96^3 around the organ")


def answer(values: np.ndarray, organ: np.ndarray | None = None) -> str | None:
    under = None if organ is None else lambda: np.sort(organ.astype(np.float32))
    fault = find_fault(np.sort(values.astype(np.float32)), under)
    return None if fault is None else fault.kind


def with_bright_voxel(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[1:], [30000.0]])


def cut(volume: torch.Tensor, at: Sequence[int], sides: Sequence[int]) -> torch.Tensor:
    return volume[tuple(slice(a, a + s) for a, s in zip(at, sides, strict=True))]


def crop(hu: torch.Tensor, size: tuple[int, int, int] | None, rng: np.random.Generator) -> Any:
    if size is None:
        return hu.float()
    sides = [min(a, b) for a, b in zip(rng.permutation(size).tolist(), hu.shape, strict=True)]
    at = [int(rng.integers(0, n - s + 1)) for n, s in zip(hu.shape, sides, strict=True)]
    return cut(hu, at, sides).float()


def measure(hu: torch.Tensor, crops: int, counts: Counts) -> None:
    """Count what becomes of the crops of one scan."""
    rng = np.random.default_rng(0)
    pointwise = WRONG | equalised_like(sample_voxels(hu))
    for name, size in SIZES.items():
        for k in range(crops if size else 1):
            part = crop(hu, size, rng)
            values = sample_voxels(part)
            values = rng.permutation(values)  # so that what is replaced is anywhere
            found = counts[name]
            if (values != values[0]).sum() < MIN_VALUES:
                found["one value"]["crops"] += 1
                continue
            found["all"]["crops"] += 1
            for kind, change in GOOD.items():
                found["false alarms"][kind] += answer(change(values)) is not None
            if k % 8:
                continue
            found["in wrong scales"]["crops"] += 1
            if name in DENOISED:
                even = F.avg_pool3d(part[None, None], 3, stride=1)[0, 0]
                found["denoised"]["crops"] += 1
                found["false alarms"]["denoised"] += answer(sample_voxels(even)) is not None
            images = {kind: (right, change(values)) for kind, (right, change) in pointwise.items()}
            for kind, (right, change) in IN_PARTS.items():
                images[kind] = right, sample_voxels(torch.from_numpy(change(part.numpy())))
            for kind, (right, image) in images.items():
                said = answer(image)
                found["refused"][kind] += said is not None
                found["named"][kind] += said == right
                bright = answer(with_bright_voxel(image))
                found["bright"]["crops"] += 1
                found["bright"]["other answer"] += (bright is None) != (said is None)


def resampled(
    hu: torch.Tensor, spacing: Sequence[float], mm: float, rng: np.random.Generator | None
) -> torch.Tensor:
    """Return a random crop in cubic voxels of so many mm; the whole scan without a generator."""
    axes = list(zip(hu.shape, spacing, strict=True))
    sides = [max(2, round(n * s / mm)) for n, s in axes]
    if rng is not None:
        sides = [min(RESAMPLED_SIDE, side) for side in sides]
        voxels = [
            min(max(2, round(side * mm / s)), n) for side, (n, s) in zip(sides, axes, strict=True)
        ]
        at = [int(rng.integers(0, n - v + 1)) for v, n in zip(voxels, hu.shape, strict=True)]
        hu = cut(hu, at, voxels)
    return F.interpolate(hu[None, None].float(), sides, mode="trilinear")[0, 0]


def measure_resampled(
    hu: torch.Tensor, spacing: Sequence[float], mm: float, crops: int, counts: Counts
) -> None:
    """Count false alarms in crops and in the whole of a scan that is resampled to cubic voxels."""
    rng = np.random.default_rng(0)
    for name in (name for name in RESAMPLED if name.endswith(f" {mm:g} mm")):
        for _ in range(1 if name.startswith("whole") else crops):
            part = resampled(hu, spacing, mm, None if name.startswith("whole") else rng)
            values = rng.permutation(sample_voxels(part))
            if (values != values[0]).sum() < MIN_VALUES:
                counts[name]["one value"]["crops"] += 1
                continue
            counts[name]["all"]["crops"] += 1
            for kind, change in GOOD.items():
                counts[name]["false alarms"][kind] += answer(change(values)) is not None


def measure_with_organ(
    hu: torch.Tensor,
    label: torch.Tensor,
    affine: np.ndarray,
    organ: int,
    crops: int,
    counts: Counts,
) -> None:
    """Count what becomes of a scan and of crops around its organ in each wrong scale."""
    rng = np.random.default_rng(organ)
    voxels = (label == organ).nonzero()
    wrong = WRONG | equalised_like(sample_voxels(hu)) | IN_PARTS
    for k in range(crops + 1):
        sides, at = list(hu.shape), [0, 0, 0]
        if k > 0:
            sides = [min(a, b) for a, b in zip(AROUND_ORGAN, hu.shape, strict=True)]
            middle = voxels[int(rng.integers(len(voxels)))].tolist()
            limits = zip(middle, sides, hu.shape, strict=True)
            at = [max(0, min(m - s // 2, n - s)) for m, s, n in limits]
        part, marked = cut(hu, at, sides).float(), cut(label, at, sides)
        found = counts["whole scan, with label" if k == 0 else "96^3 around the organ"]
        found["all"]["crops"] += 1
        values, under = sample_voxels(part), sample_organ(part, marked, (organ,))
        for kind, change in GOOD.items():
            if "padded" in kind or "metal" in kind:  # these replace voxels by their place
                continue
            found["false alarms"][kind] += answer(change(values), change(under)) is not None
        masked = torch.where(marked == organ, part, 0)
        said = answer(sample_voxels(masked), under)
        found["false alarms"]["0 beyond the organ"] += said is not None
        for kind, (right, change) in wrong.items():
            image = torch.from_numpy(change(part.numpy()).astype(np.float32))
            said = answer(sample_voxels(image), sample_organ(image, marked, (organ,)))
            found["refused"][kind] += said is not None
            found["named"][kind] += said == right
            if said is None:
                report = skip_code(image, marked, affine, organ)
                found["painted"][kind] += report == "painted"


def skip_code(image: torch.Tensor, label: torch.Tensor, affine: np.ndarray, organ: int) -> str:
    """Return "painted", "refused", or the code of the skip."""
    synth = ts.SynthesizeTumor(
        "hu2023", organ_labels=organ, tumor_label=99, count=1, size_mm=10.0, gate=False
    )
    try:
        synth(image[None], label[None], affine=affine, seed=0)
    except ValueError:
        return "refused"
    return "painted" if synth.report[0]["applied"] else str(synth.report[0]["code"])


def summary(counts: Counts) -> dict[str, Any]:
    result: dict[str, Any] = {}
    kinds = [*GOOD, "denoised", "0 beyond the organ"]
    for size, found in counts.items():
        crops = found["all"]["crops"]
        wrong = max(1, found["in wrong scales"]["crops"] or crops)

        def shares(key: str, found: Any = found, crops: int = wrong) -> dict[str, float]:
            return {kind: round(found[key][kind] / crops, 3) for kind in KINDS}

        result[size] = {
            "crops": crops,
            "false alarms": {kind: found["false alarms"][kind] for kind in kinds},
            "share refused": shares("refused"),
            "share named right": shares("named"),
        }
        if size in RESAMPLED:
            alarms = result[size]["false alarms"]
            result[size] = {"crops": crops, "false alarms": {kind: alarms[kind] for kind in GOOD}}
        elif size in SIZES:
            result[size] |= {
                "crops in wrong scales": wrong,
                "crops of one value, not counted": found["one value"]["crops"],
                "denoised crops": found["denoised"]["crops"],
                "a bright voxel": dict(found["bright"]),
            }
        else:
            result[size]["share painted"] = shares("painted")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", choices=HALVES, nargs="+", default=HALVES, help="of the scans")
    parser.add_argument("--crops", type=int, default=200, help="of each size, for each scan")
    parser.add_argument("--organ-crops", type=int, default=10, help="of each labelled organ")
    parser.add_argument("-o", "--output", default="intensity_scales")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(args.folder.glob("*_ct.nii*"))
    if not files:
        parser.error(f"{args.folder} holds no NAME_ct.nii.gz")
    for half in args.half:
        counts: Counts = {part: defaultdict(Counter) for part in PARTS}
        chosen = files[HALVES.index(half) :: 2]
        for k, file in enumerate(chosen, 1):
            name = file.name.split("_ct.nii")[0]
            scan = read_volume(file)
            hu = torch.from_numpy(scan.values())
            measure(hu, args.crops, counts)
            for mm in RESAMPLED_MM:
                measure_resampled(hu, voxel_sizes(scan.affine).tolist(), mm, args.crops, counts)
            labels = file.with_name(file.name.replace("_ct.nii", "_label.nii"))
            if labels.exists() and not name.startswith(NO_ORGANS):
                label = torch.from_numpy(read_volume(labels).integers())
                for organ in ORGANS.get(name, (1,)):
                    measure_with_organ(hu, label, scan.affine, organ, args.organ_crops, counts)
            print(f"{half}: {k} of {len(chosen)} scans", flush=True)
        names = [file.name.split("_ct.nii")[0] for file in chosen]
        write(f"{args.output}_{half}", {"scans": names, "sizes": summary(counts)})


if __name__ == "__main__":
    main()
