"""Is a crop that is not in HU noticed, and is a crop in HU let through?

    python -m benchmarks.reliability.intensity_scales FOLDER [--crops 200]

FOLDER holds CTs in HU (NAME_ct.nii.gz). Random crops of each scan, and the whole scan, go through
`find_fault` as they are and as people prepare CT (clipped, padded, noisy, denoised, with metal):
none may be refused. Then the same crops go through it in each wrong scale: which share is refused?
A quarter of them go through once more with one voxel of 30000: does the answer stay?
A crop of the background alone, one value, can tell nothing and is not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import write
from tumorsynth.intensity_check import MIN_VALUES, find_fault, sample_voxels
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
Change = Callable[[np.ndarray], np.ndarray]


def windowed(low: float, high: float, to_low: float, to_high: float) -> Change:
    """HU to the values of a window."""
    return lambda hu: (hu.clip(low, high) - low) / (high - low) * (to_high - to_low) + to_low


def replaced(value: float, part: float) -> Change:
    """Replace a share of the voxels by one value."""
    return lambda hu: np.concatenate(
        [hu[int(part * len(hu)) :], np.full(int(part * len(hu)), value)]
    )


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
}
WRONG: dict[str, tuple[str, Change]] = {
    "HU / 10": ("HU/10", lambda hu: hu / 10),
    "HU / 100": ("HU/100", lambda hu: hu / 100),
    "HU / 1000": ("HU/1000", lambda hu: hu / 1000),
    "-160..240 to 0..255, whole": ("0-255", lambda hu: windowed(-160, 240, 0, 255)(hu) // 1),
    "-175..250 to 0..255": ("0-255", windowed(-175, 250, 0, 255)),
    "-1000..1000 to 0..255, whole": ("0-255", lambda hu: windowed(-1000, 1000, 0, 255)(hu) // 1),
    "-175..250 to 0..1": ("[0, 1]", windowed(-175, 250, 0, 1)),
    "-175..250 to -1..1": ("[-1, 1]", windowed(-175, 250, -1, 1)),
    "z-scores of the crop": ("z-scores", lambda hu: (hu - hu.mean()) / max(1e-6, hu.std())),
    "z-scores as nnU-Net": ("z-scores", lambda hu: (hu.clip(-160, 240) - 100) / 40),
    "HU + 1024": ("HU+1024", lambda hu: hu + 1024),
    "HU + 1024, a quarter -2000": ("HU+1024", lambda hu: replaced(-2000, 1 / 4)(hu + 1024)),
    "HU + 32768": ("HU+32768", lambda hu: hu + 32768),
    "int16 read as uint16": ("unsigned", lambda hu: np.where(hu < 0, hu + 65536, hu)),
    "-HU": ("sign", lambda hu: -hu),
    "-HU, clipped to -1000..1000": ("sign", lambda hu: -hu.clip(-1000, 1000)),
}


def answer(values: np.ndarray) -> str | None:
    fault = find_fault(np.sort(values.astype(np.float32)))
    return None if fault is None else fault.kind


def with_bright_voxel(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[1:], [30000.0]])


def crop(hu: torch.Tensor, size: tuple[int, int, int] | None, rng: np.random.Generator) -> Any:
    if size is None:
        return hu.float()
    sides = [min(a, b) for a, b in zip(rng.permutation(size).tolist(), hu.shape, strict=True)]
    at = [int(rng.integers(0, n - s + 1)) for n, s in zip(hu.shape, sides, strict=True)]
    return hu[tuple(slice(a, a + s) for a, s in zip(at, sides, strict=True))].float()


def measure(hu: torch.Tensor, crops: int, counts: dict[str, dict[str, Counter[str]]]) -> None:
    """Count what becomes of the crops of one scan."""
    rng = np.random.default_rng(0)
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
            if name in DENOISED and k % 4 == 0:
                even = F.avg_pool3d(part[None, None], 3, stride=1)[0, 0]
                found["denoised"]["crops"] += 1
                found["false alarms"]["denoised"] += answer(sample_voxels(even)) is not None
            for kind, (right, change) in WRONG.items():
                said = answer(change(values))
                found["refused"][kind] += said is not None
                found["named"][kind] += said == right
                if k % 4 == 0:
                    bright = answer(with_bright_voxel(change(values)))
                    found["bright"]["crops"] += 1
                    found["bright"]["other answer"] += (bright is None) != (said is None)


def summary(counts: dict[str, dict[str, Counter[str]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for size, found in counts.items():
        crops = max(1, found["all"]["crops"])

        def shares(key: str, found: Any = found, crops: int = crops) -> dict[str, float]:
            return {kind: round(found[key][kind] / crops, 3) for kind in WRONG}

        result[size] = {
            "crops": found["all"]["crops"],
            "crops of one value, not counted": found["one value"]["crops"],
            "denoised crops": found["denoised"]["crops"],
            "false alarms": {kind: found["false alarms"][kind] for kind in [*GOOD, "denoised"]},
            "share refused": shares("refused"),
            "share named right": shares("named"),
            "a bright voxel": dict(found["bright"]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crops", type=int, default=200, help="of each size, for each scan")
    parser.add_argument("-o", "--output", default="intensity_scales")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keys = ("all", "one value", "denoised", "false alarms", "refused", "named", "bright")
    counts = {size: {key: Counter[str]() for key in keys} for size in SIZES}
    files = sorted(args.folder.glob("*_ct.nii*"))
    if not files:
        parser.error(f"{args.folder} holds no NAME_ct.nii.gz")
    for k, file in enumerate(files, 1):
        measure(torch.from_numpy(read_volume(file).values()), args.crops, counts)
        print(f"{k} of {len(files)} scans", flush=True)
        write(args.output, {"scans": k, "sizes": summary(counts)})


if __name__ == "__main__":
    main()
