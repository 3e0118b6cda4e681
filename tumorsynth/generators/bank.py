"""The file of a bank of lesions: one .safetensors with voxels, masks and a card.

Nothing in a bank is executed. It holds voxels of its user's own scans: whoever passes it on passes
these on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.generators.lesions import Lesion

SUFFIX = ".safetensors"
FORMAT = 1  # raise it when older versions would misread a newer bank
KIND = "copy-paste"
NUMBERS = ("diameter_mm", "level_hu", "contrast_hu", "edge_mm")  # of a lesion, in the card
TENSORS = {  # of a bank, with the dtype of each
    "hu": torch.int16,
    "mask_bits": torch.uint8,
    "shape": torch.int64,
    "to_mm": torch.float64,
    "centre": torch.float64,
}


def is_bank(name_or_path: str | os.PathLike[str]) -> bool:
    """Return whether this names the file of a bank, rather than a generator."""
    text = os.fspath(name_or_path)
    return text.endswith(SUFFIX) and not os.path.isdir(text)


def check_bank_path(path: Path) -> None:
    """Raise ValueError unless a bank can be written to this path."""
    if path.suffix != SUFFIX:
        raise ValueError(f"a bank's name must end in {SUFFIX}, got {path.name}; rename it")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"{path} must be a file in an existing folder; make the folder first")


def write_bank(
    path: str | os.PathLike[str], lesions: Sequence[Lesion], card: dict[str, Any]
) -> None:
    """Write a bank, under a temporary name that is then renamed.

    Args:
        path: the file, which must end in .safetensors.
        lesions: what it holds.
        card: entries about the bank, for JSON.

    Raises:
        ValueError: for another ending, or a folder that does not exist.
    """
    path = Path(path)
    check_bank_path(path)
    entries = [
        {name: getattr(one, name) for name in (*NUMBERS, "outline", "source")} for one in lesions
    ]
    document = {**card, "kind": KIND, "format": FORMAT, "lesions": entries}
    raw = save(_tensors(lesions), {"card": json.dumps(document, allow_nan=False)})
    write_atomic(path, lambda file: file.write(raw))


def read_bank(path: str | os.PathLike[str]) -> tuple[list[Lesion], dict[str, Any]]:
    """Read a bank and check it.

    Returns:
        The lesions, and the card with the sha256 of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no bank, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no bank {path}; make one with tumorsynth train bank")
    raw = path.read_bytes()
    try:
        with safe_open(path, "pt") as file:
            card = json.loads((file.metadata() or {})["card"])
        tensors = load(raw)
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.name} must be a bank of lesions, but cannot be read as one "
            f"({type(error).__name__}); make it again with tumorsynth train bank"
        ) from error
    if not isinstance(card, dict) or card.get("kind") != KIND:
        raise ValueError(f"{path.name} is no bank of lesions; give a file of tumorsynth train bank")
    if card.get("format") != FORMAT:
        raise ValueError(
            f"{path.name} has format {card.get('format')}, this version reads {FORMAT}; make the "
            "bank again"
        )
    try:
        lesions = _lesions(tensors, card.pop("lesions"))
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path.name} is damaged: its parts do not fit together ({error}); make it again"
        ) from error
    return lesions, {**card, "sha256": hashlib.sha256(raw).hexdigest()}


def _tensors(lesions: Sequence[Lesion]) -> dict[str, torch.Tensor]:
    """Return all lesions as few flat tensors; a mask takes a bit for a voxel."""
    bits = [torch.from_numpy(np.packbits(one.mask.flatten().numpy())) for one in lesions]
    return {
        "hu": torch.cat([one.hu.flatten() for one in lesions]),
        "mask_bits": torch.cat(bits),
        "shape": torch.tensor([list(one.hu.shape) for one in lesions]),
        "to_mm": torch.stack([one.to_mm for one in lesions]),
        "centre": torch.stack([one.centre for one in lesions]),
    }


def _lesions(tensors: dict[str, torch.Tensor], entries: Sequence[Any]) -> list[Lesion]:
    for name, dtype in TENSORS.items():
        if tensors[name].dtype != dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}")
    shapes = [[int(n) for n in row] for row in tensors["shape"]]
    sizes = [math.prod(shape) for shape in shapes]
    if not entries or len(entries) != len(shapes) or min(min(shape) for shape in shapes) < 1:
        raise ValueError(f"{len(entries)} lesions, {len(shapes)} shapes")
    hu = tensors["hu"].split(sizes)
    bits = tensors["mask_bits"].split([-(-size // 8) for size in sizes])
    lesions = []
    for k, (entry, shape, size) in enumerate(zip(entries, shapes, sizes, strict=True)):
        mask = torch.from_numpy(np.unpackbits(bits[k].numpy())[:size].astype(bool))
        numbers = {name: float(entry[name]) for name in NUMBERS}
        if not all(map(math.isfinite, numbers.values())) or not bool(mask.any()):
            raise ValueError(f"lesion {k} is empty")
        lesions.append(
            Lesion(
                hu=hu[k].reshape(shape).clone(),
                mask=mask.reshape(shape),
                to_mm=tensors["to_mm"][k].clone(),
                centre=tensors["centre"][k].clone(),
                outline=str(entry["outline"]),
                source=str(entry["source"]),
                **numbers,
            )
        )
    return lesions
