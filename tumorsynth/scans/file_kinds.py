"""What a file is that is no NIfTI: its kind, by its first bytes, and how to get a NIfTI of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from tumorsynth.itk_formats.recognize import is_dicom, is_dicom_folder

DICOM_FIX = "convert its series to NIfTI, for example with: dcm2niix -z y FOLDER"
ITK_FIX = (
    "convert it, for example with SimpleITK: sitk.WriteImage(sitk.ReadImage({name!r}), "
    "'{stem}.nii.gz')"
)
ARRAY_FIX = (
    "it holds no voxel size: save the array with nib.save(nib.Nifti1Image(array, affine), "
    "'{stem}.nii.gz')"
)
PAGE_FIX = "download the file itself: a server sent this in its place"
UNPACK_FIX = "unpack it and give the .nii or .nii.gz in it"
EXPORT_FIX = "export the scan as .nii.gz"

# what the first bytes are of, and what to do
_MAGIC: list[tuple[bytes, str, str]] = [
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the content with: git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer", "fetch the content with: git annex get {name}"),
    (b"NRRD0", "an NRRD file", ITK_FIX),
    (b"\x93NUMPY", "a NumPy array", ARRAY_FIX),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT_FIX),
    (b"MATLAB 5.0", "a MATLAB file", EXPORT_FIX),
    (b"CDF\x01", "a MINC or NetCDF file", EXPORT_FIX),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", EXPORT_FIX),
    (b"\xff\xd8\xff", "a JPEG picture", EXPORT_FIX),
    (b"GIF8", "a GIF picture", EXPORT_FIX),
    (b"II*\0", "a TIFF picture", EXPORT_FIX),
    (b"MM\0*", "a TIFF picture", EXPORT_FIX),
    (b"%PDF", "a PDF document", EXPORT_FIX),
    (b"Rar!", "a RAR archive", UNPACK_FIX),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK_FIX),
    (b"BZh", "compressed with bzip2", UNPACK_FIX),
    (b"\xfd7zXZ", "compressed with xz", UNPACK_FIX),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK_FIX),
    (b"\x1f\x8b", "compressed with gzip many times over", UNPACK_FIX),
]


def _is_mgh(head: bytes) -> bool:
    """Version 1, then axes of a plausible length, all big-endian."""
    numbers = [int.from_bytes(head[k : k + 4], "big") for k in range(0, 20, 4)]
    return len(head) >= 284 and numbers[0] == 1 and all(0 < n < 2**15 for n in numbers[1:])


def _starts_page(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(starts)


_TESTS: list[tuple[Callable[[bytes], bool], str, str]] = [
    (is_dicom, "a DICOM file", DICOM_FIX),
    (_is_mgh, "an MGH file of FreeSurfer", "convert it: mri_convert {name} {stem}.nii.gz"),
    (lambda head: head[257:262] == b"ustar", "a tar archive", UNPACK_FIX),
    (lambda head: b".npy" in head[:100] and head[:2] == b"PK", "a NumPy archive", ARRAY_FIX),
    (lambda head: head[:4] == b"PK\x03\x04", "a zip archive", UNPACK_FIX),
    (lambda head: b".git/annex/objects/" in head, "a git-annex pointer", _MAGIC[1][2]),
    (lambda head: re.match(rb"\s*(ObjectType|NDims)\s*=", head) is not None, "a MetaImage file",
     ITK_FIX),
    (_starts_page(b"<!doctype html", b"<html", b"<head"), "an HTML page", PAGE_FIX),
    (_starts_page(b"<?xml", b"<error"), "an XML document", PAGE_FIX),
    (_starts_page(b"{", b"["), "a JSON document", PAGE_FIX),
]  # fmt: skip


def describe_kind(head: bytes, path: Path) -> str:
    """Say what a file is that is no NIfTI, and what to do.

    Args:
        head: its first HEAD_BYTES, after decompression.
        path: of the file, for the message.

    Returns:
        The message: "NAME is not a NIfTI file but ...; ...".
    """
    what, fix = _kind(head)
    fix = _filled(fix, path)
    if not what:
        return f"{path.name} is not a NIfTI file; {fix}"
    return f"{path.name} is not a NIfTI file but {what}; {fix}"


def _kind(head: bytes) -> tuple[str, str]:
    """Return what a file is, "" if that is unknown, and what to do."""
    if not head:
        return "empty", "copy or export it again"
    for magic, what, fix in _MAGIC:
        if head.startswith(magic):
            return what, fix
    for matches, what, fix in _TESTS:
        if matches(head):
            return what, fix
    text = _beginning_of_text(head)
    return (f"a text that begins with {text!r}" if text else ""), "give a .nii or .nii.gz"


def _beginning_of_text(head: bytes) -> str:
    """The first words of a text; "" if these bytes are no text."""
    text = head.decode("utf-8", errors="replace").rstrip("\ufffd")  # a letter that was cut
    words = " ".join(text.split())
    return words[:40] if words.isprintable() and "\ufffd" not in words else ""


def _filled(fix: str, path: Path) -> str:
    name = path.name
    return fix.replace("{name!r}", repr(name)).replace("{name}", name).replace(
        "{stem}", name.split(".")[0] or name
    )  # fmt: skip


def check_is_there(path: Path) -> None:
    """Raise FileNotFoundError if a path leads to nothing; a dangling link is named as one."""
    if path.exists():
        return
    if not path.is_symlink():
        raise FileNotFoundError(f"no such file or folder: {path}")
    target = os.readlink(path)
    if "annex/objects" in target.replace("\\", "/"):
        raise FileNotFoundError(
            f"{path.name} is a git-annex link whose content is not here; fetch it with: "
            f"git annex get {path.name} (or datalad get)"
        )
    raise FileNotFoundError(f"{path} is a link to {target}, which does not exist; copy the file")


def check_is_file(path: Path) -> None:
    """Raise an error unless a path leads to a file; a folder of DICOM slices is named as one."""
    check_is_there(path)
    if path.is_dir():
        what = describe_folder(path)
        raise ValueError(
            f"a scan must be a file, but {path} is a folder{what or '; give a file in it'}"
        )
    if not path.is_file():
        raise ValueError(f"a scan must be a file, but {path} is a device or a pipe")


def describe_folder(folder: Path) -> str:
    """Say what to do with a folder of DICOM slices: " of DICOM slices; ..."; "" for others."""
    if not is_dicom_folder(folder):
        return ""
    return " of DICOM slices, one scan; give the folder that holds it"
