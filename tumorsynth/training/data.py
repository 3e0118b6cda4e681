"""Training data: scans on the generator's grid, packed into one array file, their tumours, patches.

A pack is an ``.npz`` that needs numpy alone to read: ``hu_<k>`` (int16, clipped to PACKED_HU) and,
where a scan is annotated, ``label_<k>`` (uint8), RAS axes x, y, z at 1 mm, ``names``, and
``held_out`` (bool): not trained on, but measured in the end. Nothing here needs more than torch and
numpy; NIfTI is read in `tumorsynth.training.reading`.
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

from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.scans.nifti import write_atomic

PACKED_HU = (-1024, 600)  # what any window of a generator may need
LEAST_HU = 50  # between the darkest and the brightest voxel of any scan: fat and muscle alone


@dataclass
class Case:
    """One scan at 1 mm, RAS: ``hu`` int16 (X, Y, Z) in PACKED_HU, ``label`` uint8 or None.

    held_out: never trained on; the finished network is measured on it.
    """

    name: str
    hu: Tensor
    label: Tensor | None
    held_out: bool = False


Cases = list[Case] | Callable[[], list[Case]]  # or what reads them, once all else is checked


@dataclass(frozen=True)
class Tumor:
    """One annotated tumour: its case, the box of its voxels and its equivalent diameter."""

    case: int
    low: tuple[int, int, int]
    high: tuple[int, int, int]
    diameter_mm: float


# -- packs ----------------------------------------------------------------------------------------


def save_pack(cases: list[Case], path: Path) -> None:
    """Write a pack, whole or not at all."""
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
    """The cases of a pack; nothing in the file is executed."""
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


def given(cases: Cases) -> list[Case]:
    """The cases, read now where they are still to be read."""
    return cases() if callable(cases) else cases


def split(cases: list[Case]) -> tuple[list[Case], list[Case]]:
    """(to train on, held out). Raises ValueError where nothing is left to train on."""
    training = [case for case in cases if not case.held_out]
    if not training:
        raise ValueError(
            f"training needs at least one scan that is not held out, but all {len(cases)} are; "
            'list some under "training" in dataset.json'
        )
    return training, [case for case in cases if case.held_out]


# -- checks ---------------------------------------------------------------------------------------


class DataProblems(ValueError):
    """All that is wrong with the training data, each with the name of its case."""

    def __init__(self, problems: list[str]):
        super().__init__(
            f"{counted(len(problems), 'problem')} with the training data: " + ";\n".join(problems)
        )
        self.problems = problems


def complain(problems: list[str]) -> None:
    """Raise DataProblems with all of them, if there are any."""
    if problems:
        raise DataProblems(problems)


def hu_problem(hu: Tensor) -> str | None:
    """What is wrong with values that should be HU, or None."""
    values = hu.flatten()[:: max(1, hu.numel() // 1_000_000)].float()
    if not bool(torch.isfinite(values).all()):
        return "the image holds NaN or infinite values"

    def share(of: Tensor) -> float:
        return float(of.float().mean())

    low, high = float(values.min()), float(values.max())
    if low == high:
        return f"every voxel is {low:g}; give the CT in HU"
    whole = low == 0 and high <= 255 and not bool((values % 1).any())
    if whole and share(values == 0) > 0.2 and len(values.unique()) < 128:
        return f"whole numbers from 0 to {high:g} are a label map's and no HU; give the CT"
    if high - low < LEAST_HU:
        return f"values from {low:g} to {high:g} are no HU but scaled; give the CT in HU"
    # no body has more bone than air and more fat than other soft tissue (cut off at -200 HU or so,
    # air would count as fat), nor much above 590 HU, but air with its sign changed
    fat, soft = share((values > -250) & (values < -1)), share((values > -1) & (values < 250))
    air, bone = share(values <= -250), share(values >= 250)
    much = share(values > 590) > 0.1 and fat > 0.1 and air < 0.1
    if much or (low < -250 and fat > soft and bone > air):
        return "the values look like HU with their sign changed; multiply them by -1"
    # nor a tenth of its voxels at 900 to 1300 HU, but soft tissue stored with 1024 added
    if share((values > 900) & (values < 1300)) > 0.1:
        return "the values look like HU with 1024 added; subtract 1024"
    if low == 0:  # air and fat lie below
        return f"values from 0 to {high:g} hold no air and no fat: no HU; give the CT in HU"
    if share((values > HU_LOW) & (values < HU_HIGH)) < 0.01:
        return (
            f"hardly any voxel lies between {HU_LOW:g} and {HU_HIGH:g} HU (values from {low:g} to "
            f"{high:g}); give the CT in HU"
        )
    return None


def check_cases(cases: list[Case], patch_size: int) -> list[str]:
    """Problems of cases for a patch of this size, each with the name of its case."""
    problems = []
    for case in cases:
        wrong = hu_problem(case.hu)
        if wrong:
            problems.append(f"{case.name}: {wrong}")
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
    return problems + seen_before(cases)


def seen_before(cases: list[Case]) -> list[str]:
    """Scans that are held out though training sees the same voxels under another name."""
    if not any(c.held_out for c in cases):
        return []
    trained = {fingerprint(c)["hu"]: c.name for c in cases if not c.held_out}
    return [
        f"{c.name}: held out, but the same voxels as {trained[crc]}, which is trained on; leave "
        "it out of one of the two lists"
        for c in cases
        if c.held_out and (crc := fingerprint(c)["hu"]) in trained
    ]


def fingerprint(case: Case) -> dict[str, Any]:
    """Shape and checksums of a scan and of its label (None without): the same for the same."""

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
    min_diameter_mm: float = 4.5,
    max_diameter_mm: float | None = None,
) -> list[Tumor]:
    """Connected tumours (26 neighbours) of these equivalent diameters in the annotated cases.

    Raises DataProblems, naming every case and what its label holds, where there are none.
    """
    tumors: list[Tumor] = []
    without = []
    most = float("inf") if max_diameter_mm is None else max_diameter_mm
    for k, case in enumerate(cases):
        if case.label is None:
            without.append(f"{case.name}: no label")
            continue
        found = [Tumor(k, *part) for part in components(case.label == tumor_label)]
        tumors += [t for t in found if min_diameter_mm <= t.diameter_mm <= most]
        sizes = ", ".join(f"{t.diameter_mm:.1f}" for t in found)
        held = ", ".join(str(int(v)) for v in case.label.unique() if v)
        without.append(
            f"{case.name}: tumours of {sizes} mm, none from {min_diameter_mm:g} to {most:g} mm"
            if found
            else f"{case.name}: no voxels of tumour label {tumor_label}, but of {held or 'none'}"
        )
    if not tumors:
        complain([f"{w}; pass --tumor-label or other sizes" for w in without])
    return tumors


def components(mask: Tensor) -> list[tuple[tuple[int, int, int], tuple[int, int, int], float]]:
    """Box (low, high) and equivalent diameter in mm of each connected part of a 1 mm mask.

    Every voxel points at itself first; then, over all pairs of neighbours, what the one points at
    is made to point at what the other does where that is later, until nothing changes: every
    voxel then points at the last one of its part.
    """
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
    for dx, dy, dz in list(np.ndindex(3, 3, 3))[:13]:  # half of the neighbours: pairs count once
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


def counted(number: int, what: str) -> str:
    """ "1 scan", "2 scans" """
    return f"{number} {what}{'' if number == 1 else 's'}"


def to_unit(hu: Tensor, window: tuple[float, float]) -> Tensor:
    """HU -> [0, 1], clipped to the window."""
    low, high = window
    return ((hu.float() - low) / (high - low)).clamp(0, 1)


def random_patch(
    case: Case, side: int, rng: np.random.Generator, tissue: tuple[float, float], tries: int = 8
) -> Tensor:
    """A (side, side, side) HU patch, mostly in the range of ``tissue``, as float; axes x, y, z."""
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
    """Flips along all axes and a swap of x and y; the same for every channel of (C, X, Y, Z)."""
    flips = [axis for axis in (1, 2, 3) if rng.random() < 0.5]
    patches = patches.flip(flips)
    return patches.transpose(1, 2) if rng.random() < 0.5 else patches
