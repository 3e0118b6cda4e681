"""Generator folders: finding, checking, loading and writing them.

A folder holds ``model.safetensors`` (tensors named ``autoencoder.*`` and ``denoiser.*``),
``card.json`` (config, sha256 of the tensors, data, licence, metrics) and ``CARD.md`` (the same for
people). Nothing in a folder is executed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tumorsynth.devices import check_device, plain_defaults
from tumorsynth.generators.card import readable_card
from tumorsynth.generators.diffusion import Generator, build, config_of
from tumorsynth.generators.handcrafted import HandcraftedGenerator
from tumorsynth.generators.protocol import TumorGenerator

MODEL, CARD, READABLE = "model.safetensors", "card.json", "CARD.md"
HANDCRAFTED = "hu2023"
FORMAT = 1  # of the folder; raised when an older reader could not read it rightly

_loaded: dict[tuple[str, str], TumorGenerator] = {}
_usable: set[torch.device] = set()
_lock = threading.Lock()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a fork in the middle of another thread's loading
    os.register_at_fork(after_in_child=_new_lock)


def bundled_folder() -> Path:
    """Where the shipped generators lie: in the wheel, or in a source checkout."""
    package = Path(__file__).parents[1]
    packed = package / "_weights"
    return packed if packed.is_dir() else package.parent / "weights"


def bundled_names() -> list[str]:
    """Names that :func:`load_generator` knows without a path, the hand-crafted one included."""
    return sorted(p.parent.name for p in bundled_folder().glob(f"*/{CARD}")) + [HANDCRAFTED]


def default_generator() -> str:
    """``liver-early`` where it ships, else the hand-crafted baseline."""
    return "liver-early" if "liver-early" in bundled_names() else HANDCRAFTED


def load_generator(
    name_or_path: str | os.PathLike[str], device: torch.device | str | None = None
) -> TumorGenerator:
    """A bundled generator by name, a folder, or a hub id (``owner/name``, needs huggingface_hub).

    The same generator on the same device is loaded once per process and shared. ``device`` None
    is the CPU. Raises FileNotFoundError for an unknown name, ValueError for a folder whose files
    do not belong together.
    """
    device = torch.device(device if device is not None else "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if str(name_or_path) == HANDCRAFTED:
        key = (HANDCRAFTED, str(device))
        with _lock:
            if key not in _loaded:
                _loaded[key] = HandcraftedGenerator().to(device)
            return _loaded[key]
    folder = find_folder(name_or_path)
    # a folder whose files changed since it was loaded is read again, and checked again
    files = [path.stat() for path in (folder / CARD, folder / MODEL) if path.is_file()]
    stamp = [(file.st_mtime_ns, file.st_size) for file in files]
    key = (f"{folder.resolve()}@{stamp}", str(device))
    with _lock:
        # .to() moves a generator in place: one that its user moved elsewhere is read again
        if key not in _loaded or not _same_device(_loaded[key].device, device):
            generator = read_folder(folder).to(device)
            generator.source = os.fspath(name_or_path)
            _loaded[key] = generator
        return _loaded[key]


class Handle:
    """A generator held by name, folder or object; loaded on first use, once per device.

    A handle pickles and copies as what it was made from: a name or a folder, not the weights,
    unless the generator exists in memory alone.
    """

    def __init__(self, generator: str | os.PathLike[str] | TumorGenerator):
        if isinstance(generator, str | os.PathLike):
            self.source: str | None = os.fspath(generator)
            self._held: TumorGenerator | None = None
            if self.source != HANDCRAFTED:
                read_card(find_folder(self.source))  # a wrong name is said now, not in a worker
        elif isinstance(generator, TumorGenerator) and not isinstance(generator, type):
            # one without a source, such as the hand-crafted one, travels as it is
            self.source = getattr(generator, "source", None)
            self._held = generator
        else:
            raise TypeError(
                "generator must be a bundled name, a folder, a hub id or a loaded generator, got "
                f"{type(generator).__name__}; bundled are {', '.join(bundled_names())}"
            )

    def get(self, device: torch.device | str) -> TumorGenerator:
        """The generator on a device."""
        device = torch.device(device)
        if device.type != "cpu" and device not in _usable:
            check_device(device)  # in words, before torch's own
            _usable.add(device)
        if self._held is not None and _same_device(self._held.device, device):
            return self._held
        if self.source is None:
            assert self._held is not None
            self._held = copy.deepcopy(self._held).to(device)
            return self._held
        return load_generator(self.source, device)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "_held": None if self.source else self._held}

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (b.index is None or a.index == b.index)


def find_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a bundled name, a path or a hub id."""
    text = os.fspath(name_or_path)
    for folder in (bundled_folder() / text if Path(text).name == text else None, Path(text)):
        # os.path's: a name that no file can have (too long) is not there, either
        if folder is not None and os.path.isfile(folder / CARD):
            return folder
    if os.path.isdir(text):
        raise FileNotFoundError(
            f"a generator folder must hold {CARD} and {MODEL}, but {text} has no {CARD}; "
            "pass the folder that generator.save() or a training command wrote"
        )
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _from_hub(text)
    raise FileNotFoundError(
        f"no generator {text!r}: it must be one of {', '.join(bundled_names())}, a folder with "
        f"{CARD} and {MODEL}, or a hub id owner/name"
    )


def _from_hub(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"no folder {repository!r} here, and reading it as a hub id needs huggingface_hub: "
            'pip install "tumorsynth[hub]"'
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=[MODEL, CARD, READABLE]))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise FileNotFoundError(
            f"no generator {repository!r}: it is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}); bundled are {', '.join(bundled_names())}"
        ) from error


def read_card(folder: Path, name: str = CARD) -> dict[str, Any]:
    """card.json, checked for what loading needs."""
    path = folder / name
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number or depth to harm
        raise ValueError(f"{path} must be JSON: {error}; restore the folder") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path} must hold a JSON object; restore the folder")
    missing = [key for key in ("name", "format", "config", "sha256") if key not in card]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; restore the folder")
    if card["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {card['format']}, this version reads format {FORMAT}; "
            "install the version of tumorsynth that wrote it, or save the generator anew"
        )
    return card


@plain_defaults()
def read_folder(folder: Path) -> Generator:
    """Load and check one generator folder, on the CPU."""
    card = read_card(folder)
    path = folder / MODEL
    if not path.is_file():
        raise ValueError(f"{folder} has no {MODEL}; restore the folder")
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    staged = _staged_card(digest)
    if digest != card["sha256"] and (folder / staged).is_file():
        card = read_card(folder, staged)  # a save was killed between its renames
    if digest != card["sha256"]:
        raise ValueError(
            f"{path} must have the sha256 of its card, {card['sha256']}, but has {digest}; "
            "the file was changed or cut short: restore it"
        )
    try:
        tensors = load(raw)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}; restore it") from error
    with torch.device("meta"):  # without memory: what a config asks for, the tensors have to hold
        planned = build(card["config"])
    check_config(card, folder)
    parts = ("autoencoder.", "denoiser.")
    states = [{k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in parts]
    for module, state in zip(planned[:2], states, strict=True):
        check_state(module, state, str(path))
    autoencoder, denoiser, sampler = build(card["config"])
    autoencoder.load_state_dict(states[0])
    denoiser.load_state_dict(states[1])
    stray = [k for k in tensors if not k.startswith(("autoencoder.", "denoiser."))]
    if stray:
        raise ValueError(f"{path} holds tensors that are no part of a generator: {stray[:5]}")
    return Generator(autoencoder, denoiser, sampler, card)


def check_config(card: dict[str, Any], folder: Path) -> None:
    """ValueError where a card's config is not the one that was written. Cards of earlier versions
    have no checksum of it: `tumorsynth info` says so."""
    own = config_digest(card["config"])
    if card.get("config_sha256", own) != own:
        raise ValueError(
            f"the config in {folder / CARD} must have its config_sha256, "
            f"{card['config_sha256']}, but has {own}; it was changed or damaged: restore it"
        )


def check_state(module: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """ValueError that names what in a state is missing, extra, of another shape or kind of number,
    or not finite."""
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
                "restore the file, or train it anew"
            )


def save_generator(generator: Generator, folder: Path) -> Path:
    """Write a generator folder, see `write_folder`.

    A full disk, a kill at any moment or a card that is not JSON leaves an earlier generator there
    as it was, or the new one.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"a generator is saved into a folder, but {folder} is a file")
    tensors = {
        f"{part}.{k}": v.detach().cpu().contiguous()
        for part, module in (
            ("autoencoder", generator.autoencoder),
            ("denoiser", generator.denoiser),
        )
        for k, v in module.state_dict().items()
    }
    raw = save(tensors)
    card = {
        **generator.card,
        "format": FORMAT,
        "config": config_of(generator),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    return write_folder(folder, raw, card)


def write_folder(folder: Path, raw: bytes, card: dict[str, Any]) -> Path:
    """Write a model and its card, all files under temporary names, and only then into place.

    The model goes first. Until the card follows, the reader finds the card that belongs to this
    model under the temporary name that its hash gives it, so that no moment has a broken folder.
    """
    digest = hashlib.sha256(raw).hexdigest()
    card = {**_finite(card), "sha256": digest}
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
        known = folder / _staged_card(digest)
        os.replace(staged[CARD], known)
        staged[CARD] = known
        for name, path in staged.items():
            os.replace(path, folder / name)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk's
            error.filename = str(folder / name)
        if staged.get(MODEL, folder).exists():  # the old model is in place: as if nothing had been
            for path in staged.values():
                path.unlink(missing_ok=True)
        raise
    for path in folder.glob(".*"):  # left by a save that was killed, an hour ago or more
        if path.name.startswith(tuple(f".{name}." for name in files)):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()
    return folder


def _finite(value: Any) -> Any:
    """The same for JSON, which knows no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _staged_card(digest: str) -> str:
    return f".{CARD}.{digest[:32]}"


def config_digest(config: Any) -> str:
    """sha256 of a config as JSON, whatever its layout and order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
