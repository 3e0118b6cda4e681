"""Open a NIfTI file whatever its name: gzipped or not, one file or a pair of .hdr and .img."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from tumorsynth.itk_formats.recognize import HEAD_BYTES
from tumorsynth.scans.file_kinds import describe_kind

GZIP = b"\x1f\x8b"
MAX_GZIP_LAYERS = 3  # a file that was gzipped twice is common
MAX_DEFLATE_RATIO = 1032  # bytes that one byte of a gzip can stand for
SINGLE, PAIR = (b"n+1\0", b"n+2\0"), (b"ni1\0", b"ni2\0")  # magic of a NIfTI file, and of a header


class OpenedNifti(NamedTuple):
    """A file at the first byte of its header.

    Attributes:
        file: seekable, in one piece even for a pair.
        version: 1 or 2.
        max_bytes: that it can hold by its size on disk.
    """

    file: BinaryIO
    version: int
    max_bytes: int


@contextmanager
def open_nifti(path: Path) -> Iterator[OpenedNifti]:
    """Open a NIfTI file, or a pair by the name of its .hdr or .img.

    Raises:
        ValueError: if it is no NIfTI; the message says what it is, and what to do.
    """
    with ExitStack() as stack:
        header_path = _header_of(path)
        file, max_bytes = stack.enter_context(_unzipped(header_path))
        head = file.read(HEAD_BYTES)
        version = _version(head)
        if version is None:
            raise ValueError(describe_kind(head, path))
        file.seek(0)
        if _magic(head, version) in PAIR:
            image_path = _other_half(
                header_path, "hdr", "img", "is the header of a pair and needs its voxels"
            )
            image, max_bytes = stack.enter_context(_unzipped(image_path))
            file = _joined(file.read(), image.read(), version)
            max_bytes += HEAD_BYTES
        elif _magic(head, version) not in SINGLE and _is_named(header_path, "hdr"):
            raise ValueError(
                f"{path.name} is of an Analyze 7.5 pair, whose header does not say how the scan "
                "lies in the patient; convert the pair to NIfTI with the tool that wrote it"
            )
        yield OpenedNifti(file, version, max_bytes)


@contextmanager
def _unzipped(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file without its layers of gzip; also yields how many bytes it can hold."""
    with ExitStack() as stack:
        file: BinaryIO = stack.enter_context(path.open("rb"))
        max_bytes = path.stat().st_size
        for _ in range(MAX_GZIP_LAYERS):
            zipped = file.read(2) == GZIP
            file.seek(0)
            if not zipped:
                break
            file = cast(BinaryIO, stack.enter_context(gzip.GzipFile("", "rb", fileobj=file)))
            max_bytes *= MAX_DEFLATE_RATIO
        yield file, max_bytes


def _version(head: bytes) -> int | None:
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}  # type: ignore[arg-type]
    return 1 if 348 in sizes else 2 if 540 in sizes else None


def _magic(head: bytes, version: int) -> bytes:
    return head[344:348] if version == 1 else head[4:8]


def _joined(header: bytes, voxels: bytes, version: int) -> BinaryIO:
    """Return a pair as the one file that it would be."""
    import nibabel

    kind: Any = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    size = kind.template_dtype.itemsize
    one = kind(header[:size].ljust(size, b"\0"), check=False)
    offset = max(0, int(one["vox_offset"]))
    one["magic"] = SINGLE[version - 1]
    one["vox_offset"] = size + 4
    return io.BytesIO(one.binaryblock + bytes(4) + voxels[offset:])


def _header_of(path: Path) -> Path:
    """Return the .hdr of an .img; any other path, and a single file named so, as it is."""
    if not _is_named(path, "img"):
        return path
    with _unzipped(path) as (file, _):
        head = file.read(HEAD_BYTES)
    if (version := _version(head)) and _magic(head, version) in SINGLE:
        return path
    return _other_half(path, "img", "hdr", "is one half of a pair and needs its header")


def _is_named(path: Path, suffix: str) -> bool:
    return re.search(rf"\.{suffix}(\.gz)*$", path.name, re.I) is not None


def _other_half(path: Path, old: str, new: str, needs: str) -> Path:
    """Return the other file of a pair: the same name in any case, gzipped or not.

    Args:
        path: of the one file.
        old: its suffix.
        new: suffix of the other.
        needs: what the message says of the one file if the other is missing.
    """
    stem = re.sub(rf"\.{old}(\.gz)*$", "", path.name, flags=re.I)
    names = re.compile(rf"{re.escape(stem)}\.{new}(\.gz)*", re.I)
    found = next((p for p in sorted(path.parent.iterdir()) if names.fullmatch(p.name)), None)
    if found is None:
        raise ValueError(
            f"{path.name} {needs}, but there is no {_renamed(path, old, new)} beside it; copy both"
        )
    return found


def _renamed(path: Path, old: str, new: str) -> str:
    new = new.upper() if f".{old.upper()}" in path.name else new
    return re.sub(rf"\.{old}((\.gz)*)$", rf".{new}\1", path.name, flags=re.I)
