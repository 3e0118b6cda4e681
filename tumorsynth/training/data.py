"""Training data: scans at 1 mm, packs of them in one file, checks, tumours and patches.

A pack is an ``.npz`` file with ``names``, ``held_out`` (bool: measured and not trained on), and for
each scan k ``hu_<k>`` (int16, clipped to PACKED_HU) and, if annotated, ``label_<k>`` (uint8), axes
x, y, z in RAS at 1 mm. This module needs torch and NumPy alone; `tumorsynth.training.reading` reads
NIfTI.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.arguments import format_beside
from tumorsynth.atomic_writes import write_atomic
from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.intensity_check import describe, find_fault, sample_voxels

PACKED_HU = (-1024, 600)  # HU range of a pack: at least the window of any generator
MIN_HU_SPAN = 50  # between the darkest and the brightest voxel of a scan, even of soft tissue alone
MAX_CHECKED_VOXELS = 1_000_000  # of a scan, evenly spaced, in `hu_problem`
MIN_DIAMETER_MM = 4.5  # equivalent diameter of the tumours to learn from


@dataclass
class Case:
    """One scan at 1 mm in RAS.

    name: unique among the cases. hu: (X, Y, Z) int16 in PACKED_HU. label: (X, Y, Z) uint8, or None
    without annotation. held_out: the finished network is measured on it and never trained on it.
    """

    name: str
    hu: Tensor
    label: Tensor | None
    held_out: bool = False


Cases = list[Case] | Callable[[], list[Case]]  # or a function that reads them


@dataclass(frozen=True)
class Tumor:
    """One annotated tumour: index of its case, box of its voxels, equivalent diameter."""

    case: int
    low: tuple[int, int, int]
    high: tuple[int, int, int]
    diameter_mm: float


# -- packs ----------------------------------------------------------------------------------------


def save_pack(cases: list[Case], path: Path) -> None:
    """Write a pack; a failure leaves an earlier file as it was.

    Args:
        cases: the scans to pack.
        path: the .npz file to write.
    """
    arrays: dict[str, np.ndarray] = {
        "names": np.array([c.name for c in cases]),
        "held_out": np.array([c.held_out for c in cases], dtype=bool),
    }
    for k, case in enumerate(cases):
        arrays[f"hu_{k}"] = case.hu.numpy()
        if case.label is not None:
            arrays[f"label_{k}"] = case.label.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def load_pack(path: Path) -> list[Case]:
    """Read the cases of a pack; nothing in the file is executed.

    Args:
        path: a file of `save_pack` or ``tumorsynth train pack``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a pack.
    """
    try:
        pack = np.load(path, allow_pickle=False)
        held_out = pack["held_out"] if "held_out" in pack else np.zeros(len(pack["names"]), bool)
        return [
            Case(
                str(name),
                torch.from_numpy(pack[f"hu_{k}"]),
                torch.from_numpy(pack[f"label_{k}"]) if f"label_{k}" in pack else None,
                bool(held_out[k]),
            )
            for k, name in enumerate(pack["names"])
        ]
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a pack ({error}); make one with `tumorsynth train pack dataset.json`"
        ) from error


def read_cases_now(cases: Cases) -> list[Case]:
    """Return the cases; a function that reads them is called."""
    return cases() if callable(cases) else cases


def split_held_out(cases: list[Case]) -> tuple[list[Case], list[Case]]:
    """Return the cases to train on and the held-out ones.

    Raises:
        ValueError: if all cases are held out.
    """
    training = [case for case in cases if not case.held_out]
    if not training:
        raise ValueError(
            f"training needs at least one scan that is not held out, but all {len(cases)} are; "
            'list some under "training" in dataset.json'
        )
    return training, [case for case in cases if case.held_out]


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun: "1 scan", "2 scans"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


# -- checks ---------------------------------------------------------------------------------------


class DataProblems(ValueError):
    """All problems of the training data, each with the name of its case."""

    def __init__(self, problems: list[str]):
        super().__init__(
            f"{pluralize(len(problems), 'problem')} with the training data: " + ";\n".join(problems)
        )
        self.problems = problems


def raise_problems(problems: list[str]) -> None:
    """Raise DataProblems if there are any problems."""
    if problems:
        raise DataProblems(problems)


def hu_problem(hu: Tensor) -> str | None:
    """Return why the values of a scan (X, Y, Z) cannot be HU, or None."""
    values = hu.flatten()[:: max(1, hu.numel() // MAX_CHECKED_VOXELS)].float()
    if not bool(torch.isfinite(values).all()):
        return "the image holds NaN or infinite values"
    low, high = float(values.min()), float(values.max())
    if low == high:
        return f"every voxel is {low:g}; give the CT in HU"
    # few voxels do not decide: metal, a marker
    darkest, brightest = np.quantile(values.numpy(), [0.001, 0.999], method="nearest").tolist()
    if darkest == 0 and brightest <= 255 and _is_label_map(values):
        return f"whole numbers from 0 to {brightest:g} are a label map, not HU; give the CT"
    sampled = sample_voxels(hu)
    if (fault := find_fault(sampled)) is not None:
        return f"the values, {describe(sampled)}, {fault.found}; {fault.conversion}"
    if brightest - darkest < MIN_HU_SPAN:
        return f"values from {darkest:g} to {brightest:g} are scaled, not HU; give the CT in HU"
    if darkest == 0:  # air and fat lie below
        return (
            f"values from 0 to {brightest:g} hold no air and no fat, so are not HU; give the CT in "
            "HU"
        )
    if float(((values > HU_LOW) & (values < HU_HIGH)).float().mean()) < 0.01:
        return (
            f"less than 1 % of voxels lie between {HU_LOW:g} and {HU_HIGH:g} HU (values from "
            f"{low:g} to {high:g}); give the CT in HU"
        )
    return None


def _is_label_map(values: Tensor) -> bool:
    """Whether values from 0 to 255 are whole, many of them 0, and few different ones."""
    if bool((values % 1).any()) or float((values == 0).float().mean()) <= 0.2:
        return False
    return len(values.unique()) < 128


def check_cases(cases: list[Case], patch_size: int) -> list[str]:
    """Return the problems of cases for a patch of this size in mm, each with the case's name."""
    problems = []
    for case in cases:
        if problem := hu_problem(case.hu):
            problems.append(f"{case.name}: {problem}")
        if case.label is not None and case.label.shape != case.hu.shape:
            problems.append(
                f"{case.name}: a label must have its image's shape {tuple(case.hu.shape)}, "
                f"got {tuple(case.label.shape)}"
            )
        if min(case.hu.shape) < patch_size:
            problems.append(
                f"{case.name}: {' x '.join(map(str, case.hu.shape))} mm is smaller than the patch "
                f"of {patch_size} mm; lower --patch-size or leave the case out"
            )
    return problems + held_out_duplicates(cases)


def held_out_duplicates(cases: list[Case]) -> list[str]:
    """Return a problem for each held-out scan whose voxels are trained on under another name."""
    if not any(c.held_out for c in cases):
        return []
    trained = {fingerprint(c)["hu"]: c.name for c in cases if not c.held_out}
    return [
        f"{c.name}: held out, but the same voxels as {trained[crc]}, which is trained on; remove "
        "it from one of the two lists"
        for c in cases
        if c.held_out and (crc := fingerprint(c)["hu"]) in trained
    ]


def fingerprint(case: Case) -> dict[str, Any]:
    """Return the shape and the checksums of a scan and of its label (None without one)."""

    def checksum(volume: Tensor) -> int:
        return zlib.crc32(volume.contiguous().numpy().data)

    return {
        "shape": list(case.hu.shape),
        "hu": checksum(case.hu),
        "label": None if case.label is None else checksum(case.label),
    }


# -- tumours --------------------------------------------------------------------------------------


def find_tumors(
    cases: list[Case],
    tumor_label: int,
    min_diameter_mm: float = MIN_DIAMETER_MM,
    max_diameter_mm: float | None = None,
) -> list[Tumor]:
    """Find the annotated tumours: 26-connected components of the tumour label.

    Args:
        cases: the scans; those without a label are passed over.
        tumor_label: label value of tumours.
        min_diameter_mm: smallest equivalent diameter.
        max_diameter_mm: largest equivalent diameter; None for no limit.

    Raises:
        DataProblems: if there are none; it names every case and what its label holds.
    """
    tumors: list[Tumor] = []
    reasons = []  # why each case has none
    largest = float("inf") if max_diameter_mm is None else max_diameter_mm
    for k, case in enumerate(cases):
        if case.label is None:
            reasons.append(f"{case.name}: no label")
            continue
        own = [Tumor(k, *part) for part in connected_components(case.label == tumor_label)]
        tumors += [t for t in own if min_diameter_mm <= t.diameter_mm <= largest]
        sizes = ", ".join(format_beside(t.diameter_mm, (min_diameter_mm, largest)) for t in own)
        values = ", ".join(str(int(v)) for v in case.label.unique() if v)
        reasons.append(
            f"{case.name}: tumours of {sizes} mm, none from {min_diameter_mm:g} to {largest:g} mm"
            if own
            else f"{case.name}: no voxels of tumour label {tumor_label}, but of {values or 'none'}"
        )
    if not tumors:
        raise_problems([f"{w}; pass --tumor-label or other sizes" for w in reasons])
    return tumors


def connected_components(
    mask: Tensor,
) -> list[tuple[tuple[int, int, int], tuple[int, int, int], float]]:
    """Find the 26-connected components of a mask (X, Y, Z) at 1 mm.

    Returns:
        For each component its first and last + 1 voxel along each axis, and its equivalent
        diameter in mm.
    """
    # Each voxel starts with its own number. Neighbours take the larger number of the two until
    # nothing changes; each component then has the number of its last voxel.
    voxels = mask.nonzero()
    if not len(voxels):
        return []
    start = voxels.min(0).values
    stop = voxels.max(0).values + 1
    box = mask[tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))]
    index = torch.arange(len(voxels))
    numbered = torch.full(box.shape, -1)
    numbered[box] = index
    numbered = F.pad(numbered, (1,) * 6, value=-1)
    pairs = []
    for dx, dy, dz in list(np.ndindex(3, 3, 3))[:13]:  # half of the 26: each pair once
        x, y, z = box.shape
        other = numbered[dx : dx + x, dy : dy + y, dz : dz + z][box]
        pairs.append(torch.stack([index, other])[:, other >= 0])
    one, other = torch.cat(pairs, 1)
    number = index
    while True:
        later = torch.maximum(number[one], number[other])
        moved = number.clone()
        for end in (one, other):
            moved.scatter_reduce_(0, number[end], later, "amax")
        moved = moved[moved]
        if torch.equal(moved, number):
            break
        number = moved
    parts = []
    for value in number.unique():
        own = voxels[number == value]
        low, high = own.min(0).values.tolist(), (own.max(0).values + 1).tolist()
        parts.append((tuple(low), tuple(high), float((6 * len(own) / np.pi) ** (1 / 3))))
    return parts


# -- patches --------------------------------------------------------------------------------------


def to_unit(hu: Tensor, window: tuple[float, float]) -> Tensor:
    """Map HU to [0, 1], clipped to the window."""
    low, high = window
    return ((hu.float() - low) / (high - low)).clamp(0, 1)


def random_patch(
    case: Case, side: int, rng: np.random.Generator, tissue: tuple[float, float], tries: int = 8
) -> Tensor:
    """Sample a patch (side, side, side) in HU, float.

    Patches with less than half of their voxels in the HU range ``tissue`` are sampled again, at
    most ``tries`` times. Scans smaller than the patch are padded with their last voxels.
    """
    hu = case.hu
    pad = [max(0, side - n) for n in hu.shape]
    if any(pad):
        hu = F.pad(
            hu.float()[None, None],
            (0, pad[2], 0, pad[1], 0, pad[0]),
            mode="replicate",
        )[0, 0]
    patch = hu
    for _ in range(tries):
        at = [int(rng.integers(0, n - side + 1)) for n in hu.shape]
        patch = hu[at[0] : at[0] + side, at[1] : at[1] + side, at[2] : at[2] + side]
        if ((patch > tissue[0]) & (patch < tissue[1])).float().mean() > 0.5:
            break
    return patch.float()


def augment(patches: Tensor, rng: np.random.Generator) -> Tensor:
    """Flip (C, X, Y, Z) along random axes and swap x and y at random, the same for all channels."""
    flips = [axis for axis in (1, 2, 3) if rng.random() < 0.5]
    patches = patches.flip(flips)
    return patches.transpose(1, 2) if rng.random() < 0.5 else patches
