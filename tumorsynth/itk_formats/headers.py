"""What SimpleITK reads without a word, although the header says otherwise: refused here.

ITK takes any unit for mm and any NRRD space for LPS, ignores a MetaImage's slope and offset, and
raises no error where the compressed voxels of a MetaImage are damaged, or the checksum of an NRRD.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import numpy as np

MAX_HEADER_BYTES = 1 << 20
LPS_OR_FLIPPED = {
    "left-posterior-superior", "lps", "right-anterior-superior", "ras",
    "left-anterior-superior", "las",
}  # fmt: skip
MILLIMETRES = {"mm", "millimeter", "millimeters", "millimetre", "millimetres", "?", ""}
META_DTYPES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4,
    "MET_LONG": 4, "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}  # fmt: skip


def check_header(path: Path, format_: str) -> None:
    """Raise ValueError if SimpleITK would read a file wrongly.

    Args:
        path: the file; of a pair, its header.
        format_: "NRRD" or "MetaImage".
    """
    with path.open("rb") as file:
        head = file.read(MAX_HEADER_BYTES)
    if format_ == "NRRD":
        _check_nrrd(path, head)
    else:
        _check_meta(path, head)


def voxels_are_elsewhere(path: Path, format_: str) -> bool:
    """Return whether a file is a header, whose voxels are in files of their own.

    Args:
        path: the file.
        format_: "NRRD" or "MetaImage".
    """
    with path.open("rb") as file:
        head = file.read(MAX_HEADER_BYTES)
    if format_ == "NRRD":
        fields = re.split(rb"\r?\n\r?\n", head, maxsplit=1)[0]
        return re.search(rb"^data ?file:", fields, re.M | re.I) is not None
    return re.search(rb"^\s*ElementDataFile\s*=\s*LOCAL\b", head, re.M | re.I) is None


def _fields(lines: list[str], separator: str) -> dict[str, str]:
    pairs = (line.partition(separator) for line in lines if separator in line)
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _check_nrrd(path: Path, head: bytes) -> None:
    name = path.name
    end = re.search(rb"\r?\n\r?\n", head)
    text = head[: end.start() if end else len(head)].decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if ":=" not in line and line[:1] != "#"]
    fields = _fields(lines, ":")
    space = fields.get("space", "").lower()
    if fields.get("space dimension") == "3":
        space = "none, with a space dimension of 3"
    if space and space not in LPS_OR_FLIPPED:
        raise ValueError(
            f"{name} must say how its axes lie in the patient, but its space is {space}; write it "
            "with the space left-posterior-superior or right-anterior-superior"
        )
    units = re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", "")))
    _check_units(name, units)
    values = fields.get("space directions") or fields.get("spacings") or ""
    if re.search(r"\b(nan|inf)", values, re.I) and "none" not in values.lower():
        raise ValueError(f"{name} must give finite voxel sizes, got {values}; repair its header")
    data = fields.get("data file", fields.get("datafile", ""))
    if "%" in data or data.upper().startswith("LIST") or (not data and end is None):
        return  # of several files, or cut, which ITK checks
    voxels = _voxels_beside(path, data) if data else path
    skips = any(_number(fields.get(f"{what} skip", "0")) for what in ("line", "byte"))
    zipped = fields.get("encoding", "").lower() in ("gz", "gzip")
    if zipped and not skips and _unzipped_size(voxels, 0 if data or not end else end.end()) is None:
        raise ValueError(f"{voxels.name} is cut short or damaged; copy it again")


def _check_meta(path: Path, head: bytes) -> None:
    found = re.search(rb"^\s*ElementDataFile\s*=\s*([^\r\n]*)\r?\n?", head, re.M | re.I)
    if found is None:
        raise ValueError(f"{path.name} is cut short: it names no ElementDataFile; copy it again")
    fields = _fields(head[: found.end()].decode("utf-8", "replace").splitlines(), "=")
    _check_units(path.name, [fields.get("distanceunits", "")])
    slope = fields.get("elementtointensityfunctionslope", "1")
    offset = fields.get("elementtointensityfunctionoffset", "0")
    if (_number(slope), _number(offset)) != (1, 0):
        raise ValueError(
            f"{path.name} must store its values themselves, but has a slope of {slope} and an "
            f"offset of {offset} (ElementToIntensityFunction); apply them and save it again"
        )
    data = found.group(1).decode("utf-8", "replace").strip()
    local = data.upper() == "LOCAL"
    if not local and (data.upper().startswith("LIST") or "%" in data):
        return  # of several files, which ITK checks
    voxels = path if local else _voxels_beside(path, data)
    sizes = [int(n) for n in re.findall(r"\d+", fields.get("dimsize", ""))]
    channels = int(_number(fields.get("elementnumberofchannels", "1")) or 1)
    itemsize = META_DTYPES.get(fields.get("elementtype", "").upper(), 0)
    expected = math.prod(sizes) * channels * itemsize
    skipped = found.end() if local else max(0, int(_number(fields.get("headersize", "0")) or 0))
    if fields.get("compresseddata", "").lower() == "true":
        held = _unzipped_size(voxels, skipped)
        whole = held is not None and (held == expected or not itemsize)
    else:
        whole = voxels.stat().st_size - skipped >= expected
    if not whole:
        raise ValueError(f"{voxels.name} is cut short or damaged; copy it again")


def _voxels_beside(path: Path, data: str) -> Path:
    """Return the file of voxels that a header names."""
    voxels = path.parent / data
    if not voxels.is_file():
        raise ValueError(
            f"{path.name} is the header of a pair and needs its voxels, but there is no {data} "
            "beside it; copy both"
        )
    return voxels


def _unzipped_size(path: Path, skipped: int) -> int | None:
    """Return how many bytes the compressed voxels are; None if they are damaged."""
    unzip = zlib.decompressobj(47)  # zlib or gzip
    size = 0
    with path.open("rb") as file:
        file.seek(skipped)
        try:
            while not unzip.eof and (part := file.read(1 << 20)):
                size += len(unzip.decompress(part))
        except zlib.error:
            return None
    return size if unzip.eof else None


def _check_units(name: str, units: list[str]) -> None:
    wrong = [unit for unit in units if unit.lower() not in MILLIMETRES]
    if wrong:
        raise ValueError(
            f"{name} must give its voxel sizes in mm, but its header says {wrong[0]!r}; convert "
            "them and save it again"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan
