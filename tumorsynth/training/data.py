"""Training data: scans brought to the generator's grid, packed into one array file, and patches.

A pack is an ``.npz`` that needs numpy alone to read: ``hu_<k>`` (int16, clipped to the window) and,
where a scan is annotated, ``label_<k>`` (uint8), RAS axes x, y, z at 1 mm, and ``names``.

    python -m tumorsynth.training.data dataset.json -o pack.npz

``dataset.json`` is Decathlon-style: {"training": [{"image": ..., "label": ...}, ...]}; the label is
optional for the autoencoder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HU_LOW, HU_HIGH = -175, 250


@dataclass
class Case:
    """One scan at 1 mm, RAS: ``hu`` int16 (X, Y, Z) in the window, ``label`` uint8 or None."""

    name: str
    hu: Tensor
    label: Tensor | None


def load_case(image: Path, label: Path | None) -> Case:
    """Read a NIfTI scan (and label), to RAS, 1 mm, the window; cropped to the body."""
    import nibabel as nib

    scan = nib.as_closest_canonical(nib.load(image))
    spacing = np.asarray(scan.header.get_zooms()[:3], dtype=float)
    size = [max(1, round(n * s)) for n, s in zip(scan.shape[:3], spacing, strict=True)]
    hu = torch.from_numpy(np.asarray(scan.dataobj, dtype=np.float32))[None, None]
    hu = F.interpolate(hu, size=size, mode="trilinear", align_corners=False)[0, 0]
    box = _body_box(hu)
    mask = None
    if label is not None:
        seg = nib.as_closest_canonical(nib.load(label))
        if seg.shape[:3] != scan.shape[:3]:
            raise ValueError(
                f"{label}: a label must have its image's shape {scan.shape}, got {seg.shape}"
            )
        mask = torch.from_numpy(np.asarray(seg.dataobj).astype(np.float32))[None, None]
        mask = F.interpolate(mask, size=size, mode="nearest-exact")[0, 0].byte()[box].clone()
    hu = hu[box].round().clamp(HU_LOW, HU_HIGH).short().clone()
    return Case(Path(image).name.split(".nii")[0], hu, mask)


def _body_box(hu: Tensor) -> tuple[slice, slice, slice]:
    body = hu > -300
    slices = []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        share = body.float().mean(dim=other)
        inside = (share > 0.02).nonzero().flatten()
        low, high = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, hu.shape[axis])
        slices.append(slice(low, high))
    return slices[0], slices[1], slices[2]


def save_pack(cases: list[Case], path: Path) -> None:
    arrays: dict[str, np.ndarray] = {"names": np.array([c.name for c in cases])}
    for k, case in enumerate(cases):
        arrays[f"hu_{k}"] = case.hu.numpy()
        if case.label is not None:
            arrays[f"label_{k}"] = case.label.numpy()
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load_pack(path: Path) -> list[Case]:
    pack = np.load(path, allow_pickle=False)
    return [
        Case(
            str(name),
            torch.from_numpy(pack[f"hu_{k}"]),
            torch.from_numpy(pack[f"label_{k}"]) if f"label_{k}" in pack else None,
        )
        for k, name in enumerate(pack["names"])
    ]


def to_unit(hu: Tensor) -> Tensor:
    """HU in the window -> [0, 1]."""
    return (hu.float() - HU_LOW) / (HU_HIGH - HU_LOW)


def random_patch(case: Case, side: int, rng: np.random.Generator, tries: int = 8) -> Tensor:
    """A (side, side, side) HU patch, mostly body, as float; axes x, y, z."""
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
        # mostly soft tissue: neither lung, air nor saturated
        if ((patch > -50) & (patch < 240)).float().mean() > 0.5:
            break
    return patch.float()


def augment(patches: Tensor, rng: np.random.Generator) -> Tensor:
    """Flips along all axes and a swap of x and y; the same for every channel of (C, X, Y, Z)."""
    flips = [axis for axis in (1, 2, 3) if rng.random() < 0.5]
    patches = patches.flip(flips)
    return patches.transpose(1, 2) if rng.random() < 0.5 else patches


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack the scans of a dataset.json for training.")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    root = args.dataset.parent
    cases = []
    for entry in json.loads(args.dataset.read_text())["training"]:
        label = entry.get("label")
        case = load_case(root / entry["image"], root / label if label else None)
        print(case.name, tuple(case.hu.shape), "annotated" if label else "")
        cases.append(case)
    save_pack(cases, args.output)


if __name__ == "__main__":
    main()
