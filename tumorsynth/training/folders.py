"""Autoencoder folders (model.safetensors, card.json, CARD.md), and what a card says of a run."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from tumorsynth.generators.config import check_bounds
from tumorsynth.generators.folder import (
    CARD,
    FORMAT,
    MODEL,
    check_config,
    check_state,
    read_card,
    read_folder,
    staged_card_name,
    write_folder,
)
from tumorsynth.generators.store import bundled_folder, bundled_names
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.training.data import Case

KIND = "autoencoder"
UNMEASURED = "stopped before it was measured; the same command with --resume does it"


def save_autoencoder(autoencoder: Autoencoder, folder: Path, card: dict[str, Any]) -> Path:
    """Write an autoencoder folder; an interruption leaves an earlier one as it was.

    Args:
        autoencoder: the network, on any device.
        folder: where to write.
        card: fields of the card.

    Returns:
        The folder.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in autoencoder.state_dict().items()}
    raw = save(tensors)
    full = {
        **card,
        "kind": KIND,
        "format": FORMAT,
        "config": {"autoencoder": asdict(autoencoder.config)},
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    return write_folder(folder, raw, full)


@torch.random.fork_rng(devices=[])  # building a network draws first weights
def read_autoencoder(
    name_or_folder: str, flag: str = "--autoencoder"
) -> tuple[Autoencoder, dict[str, Any]]:
    """Read a frozen autoencoder and its card.

    Args:
        name_or_folder: an autoencoder folder, a generator folder, or a bundled generator's name.
        flag: the command's flag, for error messages.

    Returns:
        The autoencoder, on the CPU, and its card.

    Raises:
        FileNotFoundError: if there is no such folder or name.
        ValueError: if the files do not belong together or are of another version.
    """
    folder = find_autoencoder(name_or_folder, flag)
    card = read_card(folder)
    if card.get("kind") != KIND:
        return read_folder(folder).autoencoder, card
    raw = (folder / MODEL).read_bytes() if (folder / MODEL).is_file() else b""
    digest = hashlib.sha256(raw).hexdigest()
    if digest != card["sha256"] and (folder / staged_card_name(digest)).is_file():
        card = read_card(folder, staged_card_name(digest))  # a save was killed half-way
    if digest != card["sha256"]:
        raise ValueError(
            f"{folder / MODEL} is missing or not the file its card describes (sha256); restore it"
        )
    check_config(card, folder)
    try:
        tensors = load(raw)
        check_bounds(card["config"])
        config = AutoencoderConfig(**card["config"]["autoencoder"])
        with torch.device("meta"):  # no memory is allocated before the sizes are checked
            planned = Autoencoder(config)
    except Exception as error:  # torch raises errors of many types for absurd sizes
        raise ValueError(
            f"{folder} does not hold an autoencoder of this version: {error}; train it anew"
        ) from error
    check_state(planned, tensors, str(folder / MODEL))
    autoencoder = Autoencoder(config)
    autoencoder.load_state_dict(tensors)
    return autoencoder.eval().requires_grad_(False), card


def origin(card: dict[str, Any]) -> dict[str, Any]:
    """Return what a card says of another network that the training started from or builds on."""
    kept = ("licence", "data", "training", "init")
    return {
        "name": card["name"],
        "sha256": card["sha256"],
        **{k: card[k] for k in kept if k in card},
    }


def default_licence(init: dict[str, Any] | None, autoencoder: dict[str, Any] | None = None) -> str:
    """Return the licence text of a card where the user gave none.

    Args:
        init: card of the network that the training started from.
        autoencoder: card of the autoencoder that a denoiser was trained over.
    """
    text = "none stated (--licence); nothing freer than the terms of the scans trained on"
    if init is not None:
        text += f" and of what it started from, {init['name']}"
    if autoencoder is not None:
        text += f" and of its autoencoder, {autoencoder['name']}"
    return text


def training_facts(
    cases: Sequence[Case], held_out: Sequence[Case], fabric: Any, seconds: float
) -> dict[str, Any]:
    """Return what a card says of a training besides its settings: scans, hardware, duration."""
    return {
        "scans": [c.name for c in cases],
        "held_out": [c.name for c in held_out],
        "device": describe_device(fabric.device),
        "processes": fabric.world_size,
        "seconds": round(seconds),
    }


def describe_device(device: torch.device) -> str:
    """Return the name of the hardware that a process trains on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, threads: {torch.get_num_threads()})"


def find_autoencoder(name_or_folder: str, flag: str = "--autoencoder") -> Path:
    """Return the folder that `read_autoencoder` reads.

    Raises:
        FileNotFoundError: if there is none.
    """
    text = str(name_or_folder)
    bundled = bundled_folder() / text if Path(text).name == text else None
    for folder in (bundled, Path(text)):
        if folder is not None and os.path.isfile(folder / CARD):
            return folder
    why = "has no card.json: is its training finished?" if os.path.isdir(text) else "is not there"
    names = [n for n in bundled_names() if (bundled_folder() / n).is_dir()]
    raise FileNotFoundError(
        f"{flag} must be a folder written by `tumorsynth train`, or a bundled generator "
        f"({', '.join(names) or 'none ships yet'}), but {text} {why}"
    )
