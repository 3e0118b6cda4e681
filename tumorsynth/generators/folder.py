"""Read, check and write a generator folder.

A folder holds ``model.safetensors`` (tensors named ``autoencoder.*`` and ``denoiser.*``),
``card.json`` (config, sha256 of the tensors, data, licence, metrics) and ``CARD.md`` (the card for
people). Nothing in a folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tumorsynth.devices import plain_defaults
from tumorsynth.generators.card import readable_card
from tumorsynth.generators.config import build, config_of
from tumorsynth.generators.diffusion import Generator

MODEL, CARD, READABLE = "model.safetensors", "card.json", "CARD.md"
FORMAT = 1  # of the folder; raise it when older versions would misread a newer folder
PARTS = ("autoencoder", "denoiser")  # prefixes of tensor names
STALE_SECONDS = 3600  # age at which temporary files of an interrupted save are removed


def read_card(folder: Path, name: str = CARD) -> dict[str, Any]:
    """Read card.json and check the fields that loading needs.

    Args:
        folder: the generator folder.
        name: file name of the card.

    Raises:
        ValueError: if the file is not JSON, lacks a field or has another format.
    """
    path = folder / name
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bad UTF-8, huge numbers, deep nesting
        raise ValueError(f"{path} must be JSON: {error}; restore the folder") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path} must hold a JSON object; restore the folder")
    missing = [key for key in ("name", "format", "config", "sha256") if key not in card]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; restore the folder")
    if card["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {card['format']}, this version reads format {FORMAT}; "
            "install the version of tumorsynth that wrote it, or save the generator again"
        )
    return card


@plain_defaults()
def read_folder(folder: Path) -> Generator:
    """Load and check a generator folder, on the CPU.

    Raises:
        ValueError: if files are missing, damaged, or do not belong together.
    """
    card = read_card(folder)
    path = folder / MODEL
    if not path.is_file():
        raise ValueError(f"{folder} has no {MODEL}; restore the folder")
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    staged = staged_card_name(digest)
    if digest != card["sha256"] and (folder / staged).is_file():
        card = read_card(folder, staged)  # a save was interrupted between its renames
    if digest != card["sha256"]:
        raise ValueError(
            f"{path} must have the sha256 of its card, {card['sha256']}, but has {digest}; "
            "the file was changed or cut short: restore it"
        )
    try:
        tensors = load(raw)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}; restore it") from error
    with torch.device("meta"):  # check sizes before allocating memory for them
        planned = build(card["config"])
    check_config(card, folder)
    states = [
        {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        for part in PARTS
    ]
    for module, state in zip(planned[:2], states, strict=True):
        check_state(module, state, str(path))
    autoencoder, denoiser, sampler = build(card["config"])
    autoencoder.load_state_dict(states[0])
    denoiser.load_state_dict(states[1])
    stray = [k for k in tensors if not k.startswith(tuple(f"{part}." for part in PARTS))]
    if stray:
        raise ValueError(
            f"{path} holds tensors that do not belong to a generator: {stray[:5]}; restore it"
        )
    return Generator(autoencoder, denoiser, sampler, card)


def check_config(card: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the card's config does not match its checksum.

    Cards of early versions have no checksum: `tumorsynth info` says so.
    """
    own = config_digest(card["config"])
    if card.get("config_sha256", own) != own:
        raise ValueError(
            f"the config in {folder / CARD} must have its config_sha256, "
            f"{card['config_sha256']}, but has {own}; it was changed or damaged: restore it"
        )


def check_state(module: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Check that a state dict fits a module.

    Args:
        module: the network to fill.
        state: its tensors, by name.
        source: file that they come from, for the error.

    Raises:
        ValueError: naming what is missing, extra, of another shape or dtype, or not finite.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    wrong = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if own[k].shape != state[k].shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("extra", extra), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit {type(module).__name__} ({'; '.join(problems)}); "
            "use the files that belong together"
        )
    for k, tensor in state.items():
        if tensor.is_floating_point() != own[k].is_floating_point() or tensor.is_complex():
            raise ValueError(
                f"{k} in {source} must hold numbers like {own[k].dtype}, got {tensor.dtype}; "
                "restore the file"
            )
        if not bool(tensor.float().isfinite().all()):
            raise ValueError(
                f"{k} in {source} must be finite, but holds NaN or infinite numbers; "
                "restore the file, or train the generator again"
            )


def save_generator(generator: Generator, folder: Path) -> Path:
    """Write a generator folder safely, see `write_folder`.

    Args:
        generator: the generator to save.
        folder: where to; created if needed.

    Returns:
        ``folder``.

    Raises:
        ValueError: if ``folder`` is a file.
        TypeError: if the denoiser is of a type that a card cannot describe.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"a generator is saved into a folder, but {folder} is a file; choose another name"
        )
    tensors = {
        f"{part}.{k}": v.detach().cpu().contiguous()
        for part in PARTS
        for k, v in getattr(generator, part).state_dict().items()
    }
    raw = save(tensors)
    card = {
        **generator.card,
        "format": FORMAT,
        "config": config_of(generator.autoencoder, generator.denoiser, generator.sampler),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    return write_folder(folder, raw, card)


def write_folder(folder: Path, raw: bytes, card: dict[str, Any]) -> Path:
    """Write a model and its card so that the folder is whole at every moment.

    All files get temporary names first and are then renamed, the model before its card. Until the
    card is renamed, readers find it under a name that contains the model's hash. After a full disk
    or a kill, the folder holds the old generator or the new one.

    Args:
        folder: where to; created if needed.
        raw: the safetensors file.
        card: the card; its ``sha256`` and ``config_sha256`` are set here.

    Returns:
        ``folder``.
    """
    digest = hashlib.sha256(raw).hexdigest()
    card = {**_json_numbers(card), "sha256": digest}
    if "config" in card:
        card["config_sha256"] = config_digest(card["config"])
    files = {
        MODEL: raw,
        CARD: (json.dumps(card, indent=2, allow_nan=False) + "\n").encode(),
        READABLE: readable_card(card).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    staged: dict[str, Path] = {}
    try:
        for name, content in files.items():
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            staged[name] = Path(temporary)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        known = folder / staged_card_name(digest)
        os.replace(staged[CARD], known)
        staged[CARD] = known
        for name, path in staged.items():
            os.replace(path, folder / name)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk
            error.filename = str(folder / name)
        if staged.get(MODEL, folder).exists():  # the old model is still in place
            for path in staged.values():
                path.unlink(missing_ok=True)
        raise
    _remove_stale(folder)
    return folder


def config_digest(config: Any) -> str:
    """Return the sha256 of a config as JSON, whatever its layout and order of keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def staged_card_name(digest: str) -> str:
    """Return the temporary name of the card of a model with this sha256."""
    return f".{CARD}.{digest[:32]}"


def _remove_stale(folder: Path) -> None:
    """Remove what interrupted saves left behind."""
    prefixes = tuple(f".{name}." for name in (MODEL, CARD, READABLE))
    for path in folder.glob(".*"):
        if path.name.startswith(prefixes):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()


def _json_numbers(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _json_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
