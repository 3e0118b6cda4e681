"""The files of a run: their names, what may be replaced, and one run per folder."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tumorsynth.scans.pairing import Pair
from tumorsynth.scans.volume_files import written_suffix


def output_paths(
    out: Path, name: str, ct: str = ".nii.gz", label: str = ".nii.gz"
) -> dict[str, Path]:
    """The files of one scan: ct, label, report and preview.

    Args:
        out: the folder of the results.
        name: of the scan.
        ct: suffix of the CT, see `volume_files.written_suffix`.
        label: suffix of the label map.
    """
    endings = {
        "ct": f"ct{ct}",
        "label": f"label{label}",
        "report": "report.json",
        "preview": "preview.png",
    }
    return {key: out / f"{name}_{ending}" for key, ending in endings.items()}


def output_paths_of(pair: Pair, out: Path) -> dict[str, Path]:
    """The files that `synthesize_scan` writes for a pair."""
    suffixes = (written_suffix(path.name) for path in (pair.ct, pair.label))
    paths = output_paths(out, pair.name, *suffixes)
    if pair.places is None:
        return paths
    return {**paths, "ct": out / pair.places.ct, "label": out / pair.places.label}


def unfinished_marker(out: Path, name: str) -> Path:
    """An empty file that exists while the files of a scan are being written."""
    return out / f".{name}_unfinished"


def find_unfinished(
    pairs: Sequence[Pair],
    out: Path,
    *,
    overwrite: bool,
    mismatch: Callable[[int, Path], str | None] | None = None,
    beside_scans: bool = False,
) -> list[int]:
    """List the scans that a run into a folder still has to process.

    Files without a report are replaced only beside the marker of an interrupted run.

    Args:
        pairs: the scans.
        out: the folder of the results; it need not exist.
        overwrite: replace earlier results.
        mismatch: for a run that resumes: called as ``mismatch(k, report)`` for an existing report
            of ``pairs[k]``, says why it is not the report that this run would write, or None. By
            default nothing resumes.
        beside_scans: whether a run that resumes may write into the folder of the scans.

    Returns:
        Indices of the unfinished scans.

    Raises:
        ValueError: if the run would replace an input or, without ``overwrite``, other results.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file; choose another name")
    slices = [pair.ct for pair in pairs if pair.ct.is_dir()]
    if any(out.resolve() == folder.resolve() for folder in slices):
        raise ValueError(f"--out must not be a folder of slices, got {out}; choose another")
    folders = {path.parent.resolve() for pair in pairs for path in (pair.ct, pair.label)}
    if mismatch is not None and not beside_scans and out.resolve() in folders:
        raise ValueError(
            f"--out must not be the folder of the scans, got {out}: the next run would take the "
            "results for scans; choose another"
        )
    _check_names(pairs)
    inputs = {path.resolve() for pair in pairs for path in (pair.ct, pair.label)}
    in_the_way: list[Path] = []
    unfinished: list[int] = []
    reason = ""
    for k, pair in enumerate(pairs):
        paths = output_paths_of(pair, out)
        for path in paths.values():
            if path.resolve() in inputs:
                raise ValueError(f"{path} is an input and would be replaced; choose another --out")
        existing = [path for path in paths.values() if path.exists()]
        marker = unfinished_marker(out, pair.name)
        if mismatch is not None and not overwrite and paths["report"].exists():
            why = mismatch(k, paths["report"])
            if why is None and len(existing) == len(paths):
                marker.unlink(missing_ok=True)
                continue
            if why is not None:
                in_the_way += existing
                reason = reason or f" ({paths['report'].name}: {why})"
        elif not marker.exists():
            in_the_way += existing
        unfinished.append(k)
    if in_the_way and not overwrite:
        more = len(in_the_way) - 1
        exist = f" and {more} more exist" if more else " exists"
        raise ValueError(f"{in_the_way[0]}{exist}{reason}; choose another --out or add --overwrite")
    return unfinished


def _check_names(pairs: Sequence[Pair]) -> None:
    first_with: dict[str, str] = {}
    for pair in pairs:
        folded = unicodedata.normalize("NFC", pair.name).casefold()
        first = first_with.setdefault(folded, pair.name)
        if first != pair.name:
            raise ValueError(
                "names of scans must differ by more than upper and lower case, which some disks "
                f"do not tell apart, got {first!r} and {pair.name!r}; rename one"
            )


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold an existing folder for this run. The lock ends with the process, however it ends.

    Raises:
        ValueError: if another run holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"only one run may write into a folder, but another one writes into {folder}; wait "
            "until it ends, or choose another --out"
        ) from None
    except OSError:  # a disk without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def mark_unfinished(pairs: Sequence[Pair], out: Path) -> None:
    """Mark existing results as unfinished, so that an interrupted --overwrite can resume."""
    for pair in pairs:
        paths = output_paths_of(pair, out)
        if any(path.exists() for path in paths.values()):
            unfinished_marker(out, pair.name).touch()
            paths["report"].unlink(missing_ok=True)


def remove_partial_files(pairs: Sequence[Pair], out: Path) -> None:
    """Remove the temporary files of an interrupted run. Call before writing anything."""
    results = [p for pair in pairs for p in output_paths_of(pair, out).values()]
    names = {path.name for path in results}
    for folder in {out, *(path.parent for path in results)}:
        for path in list(folder.iterdir()) if folder.is_dir() else []:
            name, _, process = path.name.removeprefix(".").removesuffix(".part").rpartition(".")
            is_partial = path.name == f".{name}.{process}.part" and process.isdigit()
            if is_partial and name in names and path.is_dir():  # of a format with several files
                shutil.rmtree(path, ignore_errors=True)
            elif is_partial and name in names:
                path.unlink(missing_ok=True)
