"""Find a generator by name, folder or hub id, and load it once per process and device."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from tumorsynth.arguments import is_bool, known_keywords
from tumorsynth.devices import check_device
from tumorsynth.generators.bank import is_bank
from tumorsynth.generators.copy_paste import CopyPaste
from tumorsynth.generators.folder import CARD, MODEL, READABLE, read_card, read_folder
from tumorsynth.generators.handcrafted import HandcraftedGenerator
from tumorsynth.generators.protocol import MEMBERS, TumorGenerator, missing_members
from tumorsynth.placement.settings import OwnShape

HANDCRAFTED = "hu2023"

_loaded: dict[tuple[str, str], TumorGenerator] = {}
_usable: set[torch.device] = set()
_lock = threading.Lock()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a fork may copy the lock while another thread holds it
    os.register_at_fork(after_in_child=_new_lock)


def bundled_folder() -> Path:
    """Return the folder of the shipped generators, in the wheel or in a source checkout."""
    package = Path(__file__).parents[1]
    packed = package / "_weights"
    return packed if packed.is_dir() else package.parent / "weights"


def bundled_names() -> list[str]:
    """Return the names that `load_generator` knows without a path."""
    return sorted(p.parent.name for p in bundled_folder().glob(f"*/{CARD}")) + [HANDCRAFTED]


def default_generator() -> str:
    """Return ``liver-early`` where it is bundled, else the hand-crafted baseline."""
    return "liver-early" if "liver-early" in bundled_names() else HANDCRAFTED


@known_keywords
def load_generator(
    name_or_path: str | os.PathLike[str], device: torch.device | str | None = None
) -> TumorGenerator:
    """Load a generator.

    The same generator on the same device is loaded once per process and shared.

    Args:
        name_or_path: a bundled name ("liver-early", "lung", "hu2023"), a folder, a hub id
            (``owner/name``, needs huggingface_hub), or a bank of lesions (.safetensors).
        device: where to load it; None is the CPU.

    Returns:
        A `tumorsynth.Generator`, the hand-crafted generator for "hu2023", or a
        `tumorsynth.CopyPaste` for a bank.

    Raises:
        FileNotFoundError: if there is no generator of that name.
        ValueError: if the folder's files are damaged or do not belong together.

    Examples:
        >>> generator = ts.load_generator("liver-early", device="cuda")
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
    if is_bank(name_or_path):
        return _load_bank(Path(name_or_path), device)
    folder = find_folder(name_or_path)
    # reload a folder whose files have changed
    files = [path.stat() for path in (folder / CARD, folder / MODEL) if path.is_file()]
    stamp = [(file.st_mtime_ns, file.st_size) for file in files]
    key = (f"{folder.resolve()}@{stamp}", str(device))
    with _lock:
        # reload a generator that its user has moved to another device, since .to() works in place
        if key not in _loaded or not _same_device(_loaded[key].device, device):
            generator = read_folder(folder).to(device)
            generator.source = os.fspath(name_or_path)
            _loaded[key] = generator
        return _loaded[key]


def _load_bank(path: Path, device: torch.device) -> TumorGenerator:
    if not path.is_file():
        raise FileNotFoundError(f"no bank {path}; make one with tumorsynth train bank")
    file = path.stat()
    key = (f"{path.resolve()}@{file.st_mtime_ns},{file.st_size}", str(device))
    with _lock:
        if key not in _loaded or not _same_device(_loaded[key].device, device):
            _loaded[key] = CopyPaste.load(path).to(device)
        return _loaded[key]


class Handle:
    """A generator held by name, folder or object; loaded on first use, once per device.

    A handle pickles and copies as what it was made from. The weights of a named generator stay
    behind, but its ``precision`` travels, to another device too; a generator that exists in memory
    alone travels with its handle.

    Args:
        generator: a bundled name, a folder, a hub id or an object with the members of
            `TumorGenerator`.

    Raises:
        FileNotFoundError: if there is no generator of that name.
        TypeError: if an object is not a generator, naming the members that it lacks.
        ValueError: if its crop_size, crop_multiple, window or device cannot be used.
    """

    def __init__(self, generator: str | os.PathLike[str] | TumorGenerator):
        self._held: TumorGenerator | None = None
        self._precision: str | None = None  # what it was when the handle was pickled
        self._copies: dict[str, TumorGenerator] = {}  # with a precision of their own, by device
        if isinstance(generator, str | os.PathLike):
            self.source: str | None = os.fspath(generator)
            if is_bank(self.source):
                load_generator(self.source)
            elif self.source != HANDCRAFTED:
                read_card(find_folder(self.source))  # fail fast, before workers start
            return
        _check_members(generator)
        self.source = getattr(generator, "source", None)
        self._held = generator

    @property
    def own_shapes(self) -> Sequence[OwnShape]:
        """The shapes that the generator brings along, if it does."""
        held = self._held
        if held is None and self.source is not None and is_bank(self.source):
            held = load_generator(self.source)
        return tuple(getattr(held, "own_shapes", ()))

    def get(self, device: torch.device | str) -> TumorGenerator:
        """Return the generator on a device.

        Raises:
            ValueError: if torch cannot compute on the device.
        """
        device = torch.device(device)
        if device.type != "cpu" and device not in _usable:
            check_device(device)  # for a clearer error than torch's own
            _usable.add(device)
        if self._held is not None and _same_device(self._held.device, device):
            return self._held
        if self.source is None:
            assert self._held is not None
            self._held = copy.deepcopy(self._held).to(device)
            return self._held
        return self._with_precision(load_generator(self.source, device))

    def _with_precision(self, loaded: TumorGenerator) -> TumorGenerator:
        """Return a loaded generator, or a copy where this handle's has another precision."""
        wanted = self._precision if self._held is None else getattr(self._held, "precision", None)
        if wanted is None or getattr(loaded, "precision", wanted) == wanted:
            return loaded
        place = str(loaded.device)
        if place not in self._copies:
            self._copies[place] = copy.deepcopy(loaded)
        own: Any = self._copies[place]
        own.precision = wanted
        return self._copies[place]

    def __getstate__(self) -> dict[str, Any]:
        if self.source is None:
            return {"source": None, "_held": self._held, "_precision": None, "_copies": {}}
        known = self._held or next(
            (one for one in _loaded.values() if getattr(one, "source", None) == self.source), None
        )
        precision = self._precision or getattr(known, "precision", None)
        return {"source": self.source, "_held": None, "_precision": precision, "_copies": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self


def find_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundled name, a path or a hub id.

    Raises:
        FileNotFoundError: if there is none.
        ImportError: if a hub id needs huggingface_hub and it is not installed.
    """
    text = os.fspath(name_or_path)
    for folder in (bundled_folder() / text if Path(text).name == text else None, Path(text)):
        # os.path.isfile is False for names that are too long, where Path.is_file raises
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
    except Exception as error:  # the hub client raises many types; all mean that there is none
        raise FileNotFoundError(
            f"no generator {repository!r}: there is no such folder, and the hub did not provide it "
            f"({type(error).__name__}); bundled are {', '.join(bundled_names())}"
        ) from error


def _check_members(generator: object) -> None:
    """Raise TypeError unless an object has the members of `TumorGenerator`."""
    missing = missing_members(generator)
    if not missing and not isinstance(generator, type):
        _check_values(generator)
        return
    found = f"got {type(generator).__name__}"
    if isinstance(generator, type):
        found = f"got the class {generator.__name__}, not an instance of it"
    elif len(missing) < len(MEMBERS):
        found += f", which lacks {', '.join(missing)}"
    raise TypeError(
        "generator must be a bundled name, a folder, a hub id, or an object with the members of "
        f"TumorGenerator, {found}; bundled are {', '.join(bundled_names())}"
    )


def _check_values(generator: Any) -> None:
    """Raise ValueError unless the members that size and scale a crop can be used."""
    for name in ("crop_size", "crop_multiple"):
        value = getattr(generator, name)
        if is_bool(value) or not isinstance(value, Integral) or value < 1:
            raise ValueError(
                f"the generator's {name} must be a whole number of at least 1, got {value!r}; "
                "set it to 64 or 1"
            )
    try:
        low, high = (float(end) for end in generator.window)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            "the generator's window must be two numbers in HU, the lower first, got "
            f"{generator.window!r}; set it to (-175.0, 250.0)"
        )
    if not isinstance(generator.device, torch.device):
        raise ValueError(
            f"the generator's device must be a torch.device, got {generator.device!r}; "
            "set it to torch.device('cpu')"
        )


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (b.index is None or a.index == b.index)
