"""Recognise NRRD, MetaImage and DICOM by their first bytes. Imports SimpleITK only when asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEAD_BYTES = 1024  # of a file, which tell its kind
MAX_FILES_TRIED = 20  # of a folder

NRRD, META, DICOM = "NRRD", "MetaImage", "DICOM"


def require_simpleitk() -> Any:
    """Import SimpleITK; if it is missing, the error says how to install it."""
    try:
        import SimpleITK
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "NRRD, MetaImage and DICOM need SimpleITK; install it with: "
            'pip install "tumorsynth[itk]"'
        ) from error
    return SimpleITK


@contextmanager
def quiet_simpleitk() -> Iterator[Any]:
    """SimpleITK without the warnings that it prints: what matters is checked here."""
    sitk = require_simpleitk()
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield sitk
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def format_of(path: Path) -> str | None:
    """Return NRRD, META or DICOM for such a file or a folder of slices; None for anything else."""
    if path.is_dir():
        return DICOM if is_dicom_folder(path) else None
    head = head_of(path)
    if head.startswith(b"NRRD000"):
        return NRRD
    if is_meta(head):
        return META
    return DICOM if is_dicom(head) else None


def is_dicom_folder(folder: Path) -> bool:
    """Return whether a folder itself, not its subfolders, holds DICOM files."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return any(is_dicom(head_of(path)) for path in files[:MAX_FILES_TRIED])


def is_dicom(head: bytes) -> bool:
    """Return whether a file of this beginning is DICOM."""
    if head[128:132] == b"DICM":
        return True
    # without a preamble: group 0008, a small element, then a VR of two letters or a length
    first = head[:2] in (b"\x08\x00", b"\x02\x00") and head[3:4] == b"\0"
    return first and (head[4:6].isalpha() and head[4:6].isupper() or head[6:8] == b"\0\0")


def is_meta(head: bytes) -> bool:
    """Return whether a file of this beginning is a MetaImage."""
    return re.match(rb"\s*\w+\s*=", head) is not None and (
        re.search(rb"^\s*(ObjectType|NDims)\s*=", head, re.M) is not None
    )


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""
