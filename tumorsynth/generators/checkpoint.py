"""A restricted reader of torch checkpoints from other people.

A torch checkpoint is a zip archive with a pickle in it, and unpickling normally runs whatever the
file says. This reader replaces the few globals that published DiffTumor checkpoints hold by inert
stand-ins, and refuses files with any other global. Tensors are read only on request: optimiser
moments, discriminators and the perceptual network stay on the disk.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Published files hold well under 1 MiB of pickle. These limits bound the time and memory that any
# file can cost to seconds and a few hundred MiB.
MAX_PICKLE_BYTES = 8 << 20
MAX_OPCODES = 1_000_000
MAX_ZIP_ENTRIES = 100_000
MAX_EXPANDED_VALUES = 1 << 28  # of a tensor larger than its storage (a stride of 0)
# typed as Any: type checkers disagree about its methods
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]
SET_OPCODES = ("EMPTY_SET", "ADDITEMS", "FROZENSET")
AGAIN = "download the file again from its authors"


class CheckpointError(ValueError):
    """A checkpoint is damaged or not the expected one; the message names the file."""


class _Inert:
    """Stand-in for an object that is not needed (omegaconf nodes). Stores and runs nothing.

    Its __setstate__ keeps a pickle from setting attributes.
    """

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Dict(dict):
    """Stand-in for OrderedDict, defaultdict and Counter; constructor arguments are dropped."""

    __slots__ = ()

    def __init__(self, *args: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class _Named(_Inert):
    """Stand-in for a type that is named and never called: typing.Any, list, dict, int."""

    __slots__ = ()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint whose values are still on the disk.

    Args:
        archive: the checkpoint.
        key: name of the storage.
        dtype: of the stored values.
        offset: of the first value, in values.
        shape: of the tensor.
        stride: of the tensor, in values.
    """

    archive: _Archive
    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """Read the values.

        Raises:
            CheckpointError: if the file is damaged, or the tensor is far larger than its storage.
        """
        entry = self.archive.storage_entry(self.key)
        if math.prod(self.shape) > max(entry.file_size, MAX_EXPANDED_VALUES):
            raise self.archive.error(
                f"holds a tensor of shape {self.shape} out of {entry.file_size} stored bytes"
            )
        data = bytearray(self.archive.read(entry))
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0)
        view = flat.to(self.dtype).as_strided(self.shape, self.stride, self.offset)
        # copy a part, which would keep the whole storage in memory
        return view.clone() if view.numel() < flat.numel() else view

    def __setstate__(self, state: object) -> None:
        """Refuse the BUILD opcode, which would change what has been checked."""
        raise TypeError("a tensor's description cannot be changed")


class _Storage(NamedTuple):
    archive: _Archive
    key: str
    dtype: torch.dtype
    numel: int


class _StorageType(_Inert):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _RebuildTensor(_Inert):
    """Stand-in for torch._utils._rebuild_tensor_v2: checks everything, reads nothing."""

    __slots__ = ()

    def __call__(
        self, storage: object, offset: object, shape: object, stride: object, *rest: object
    ) -> LazyTensor:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without a storage")
        if not (_sizes(shape) and _sizes(stride) and _sizes((offset,))):
            raise storage.archive.error("holds a tensor whose shape is no tuple of sizes")
        assert isinstance(shape, tuple) and isinstance(stride, tuple) and isinstance(offset, int)
        reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=False))
        if len(shape) != len(stride) or (0 not in shape and reach > storage.numel):
            raise storage.archive.error(
                f"holds a tensor of shape {shape}, stride {stride} and offset {offset} that does "
                f"not fit its storage of {storage.numel} values"
            )
        return LazyTensor(storage.archive, storage.key, storage.dtype, offset, shape, stride)


def _sizes(value: object) -> bool:
    """Whether this is a short tuple of non-negative integers."""
    return (
        isinstance(value, tuple)
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < 2**48 for n in value)
    )


_GLOBALS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Dict,
    ("collections", "Counter"): _Dict,
    ("omegaconf.base", "ContainerMetadata"): _Inert,
    ("omegaconf.base", "Metadata"): _Inert,
    ("omegaconf.dictconfig", "DictConfig"): _Inert,
    ("omegaconf.listconfig", "ListConfig"): _Inert,
    ("omegaconf.nodes", "AnyNode"): _Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("typing", "Any"): _Named(),
    # pickle protocol 2 uses the Python 2 names of builtins
    **{(m, n): _Named() for m in ("builtins", "__builtin__") for n in ("list", "dict", "int")},
    ("__builtin__", "long"): _Named(),
    **{
        ("torch", f"{name}Storage"): _StorageType(dtype)
        for name, dtype in {
            "Float": torch.float32,
            "Double": torch.float64,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
            "Bool": torch.bool,
        }.items()
    },
}


class _Archive:
    """A torch zip archive whose directory has been checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{path.name} is not a whole zip checkpoint as torch.save writes it ({error}); "
                f"{AGAIN}"
            ) from error
        if len(self.zip.infolist()) > MAX_ZIP_ENTRIES:
            raise self.error(f"holds more than {MAX_ZIP_ENTRIES} entries")
        self.entries = {info.filename: info for info in self.zip.infolist()}
        self._check_entries(path.stat().st_size)
        pickles = [name for name in self.entries if PurePosixPath(name).parts[1:] == ("data.pkl",)]
        if len(pickles) != 1:
            raise self.error(f"holds {len(pickles)} data.pkl where one belongs")
        self.root = PurePosixPath(pickles[0]).parts[0]
        if self.entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise self.error(f"holds a data.pkl of more than {MAX_PICKLE_BYTES} bytes")
        order = self.entries.get(f"{self.root}/byteorder")
        if order is not None and self.read(order) != b"little":
            raise self.error("was not written in little-endian byte order")
        self.pickle = self.entries[pickles[0]]

    def _check_entries(self, size_on_disk: int) -> None:
        """Refuse compression (zip bombs), unsafe names and overlapping entries."""
        infos = self.zip.infolist()
        if len(infos) != len(self.entries):
            raise self.error("holds two entries of one name")
        for info in infos:
            path = PurePosixPath(info.filename)
            if path.is_absolute() or ".." in path.parts or set(info.filename) & set("\\:\0"):
                raise self.error(f"holds an entry with the unsafe name {info.filename!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise self.error(
                    f"holds {info.filename!r} compressed or encrypted, torch.save does neither"
                )
            if info.file_size != info.compress_size:
                raise self.error(f"declares two sizes for {info.filename!r}")
        if sum(info.file_size for info in infos) > size_on_disk:
            raise self.error("declares more bytes than the file has")

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} {what}; {AGAIN}")

    def read(self, info: zipfile.ZipInfo) -> bytes:
        try:
            data = self.zip.read(info)  # checks the CRC
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
            raise self.error(f"is damaged at {info.filename!r} ({error})") from error
        if len(data) != info.file_size:
            raise self.error(f"is cut short at {info.filename!r}")
        return data

    def storage_entry(self, key: str) -> zipfile.ZipInfo:
        name = f"{self.root}/data/{key}"
        if name not in self.entries:
            raise self.error(f"lacks the storage {name!r}")
        return self.entries[name]


class _Unpickler(_PythonUnpickler):
    """Python's unpickler in its pure-Python form, which allows checking the keys of dicts.

    Keys are hashed. Deeply nested tuples take forever to hash, and so do many large integers with
    the same hash; strings and small integers do not.
    """

    dispatch = dict(_PythonUnpickler.dispatch)

    def __init__(self, archive: _Archive, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.archive = archive

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
                raise self.archive.error(
                    f"holds a dict with a key that is no string or small integer, but "
                    f"{type(key).__name__}"
                )

    def _one_item(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def _items(self) -> None:
        self._check_keys(self.stack[::2])  # keys and values since the mark alternate
        super().load_setitems()

    def _dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    dispatch[pickle.SETITEM[0]] = _one_item
    dispatch[pickle.SETITEMS[0]] = _items
    dispatch[pickle.DICT[0]] = _dict

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise self.archive.error(
                f"holds {module}.{name}, which no DiffTumor checkpoint does: it was refused and "
                "nothing was run"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str() as key, str(), int() as numel):
                entry = self.archive.storage_entry(key)
                if numel * kind.dtype.itemsize != entry.file_size:
                    raise self.archive.error(
                        f"declares {numel} values of {kind.dtype} in {entry.filename!r}, "
                        f"which has {entry.file_size} bytes"
                    )
                return _Storage(self.archive, key, kind.dtype, numel)
        raise self.archive.error("describes a storage in an unknown way")


def read_checkpoint(path: str | PathLike[str]) -> Any:
    """Read a torch zip checkpoint without executing anything in it.

    Args:
        path: the checkpoint.

    Returns:
        Dicts, lists, numbers, strings and `LazyTensor` objects. Everything else that published
        checkpoints hold is an inert stand-in.

    Raises:
        CheckpointError: for an unknown global, a compressed or overlapping entry, a tensor beyond
            its storage, or a damaged file.
    """
    archive = _Archive(Path(path))
    data = archive.read(archive.pickle)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise archive.error(f"holds a pickle of more than {MAX_OPCODES} steps")
            if opcode.name.startswith("EXT"):  # a cached extension would bypass find_class
                raise archive.error("holds a pickle extension code")
            if opcode.name in SET_OPCODES:  # sets hash their members
                raise archive.error("holds a set, which no DiffTumor checkpoint does")
            if opcode.name.endswith("PUT") and argument >= MAX_OPCODES:  # type: ignore[operator]
                raise archive.error("asks for a memo larger than itself")
        return _Unpickler(archive, data).load()
    except CheckpointError:
        raise
    except Exception as error:  # on malicious bytes the unpickler raises nearly anything
        raise archive.error(f"holds a damaged pickle ({type(error).__name__}: {error})") from error
