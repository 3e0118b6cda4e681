"""Label maps from TotalSegmentator, which runs as a program of its own where it is installed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.itk_formats.recognize import format_of
from tumorsynth.scans.volume_files import read_volume, write_volume

PROGRAM, TASK = "TotalSegmentator", "total"
SEGMENTATIONS = "segmentations"  # the folder of OUT that keeps the label maps
VOXELS_BESIDE = (".raw", ".zraw", ".raw.gz")  # of a header in NRRD or MetaImage
LEAST_VERSION = 2  # before, values had other names
HOW_TO_GET_A_LABEL = (
    f"install it with: pip install {PROGRAM} (an environment of its own is fine, on PATH), or run "
    "it elsewhere and give its folder of masks, or label the organ by hand: one file with 1 in the "
    "organ is enough"
)


@dataclass(frozen=True)
class Segmenter:
    """TotalSegmentator, version 2 or later.

    Args:
        program: path of the program.
        version: that it says it has.
        device: in its own words: cpu, gpu or gpu:1.
        fast: whether to use its model for 3 mm.
    """

    program: str
    version: str
    device: str = "cpu"
    fast: bool = False

    def make_label(self, ct: Path, label: Path) -> dict[str, Any]:
        """Make the label map of a CT, unless it is there; returns what is known about it.

        Args:
            ct: the CT.
            label: the file to write; a .json beside it says how it was made.

        Raises:
            ValueError: if the program fails.
        """
        name = label.name.removesuffix(".nii.gz")
        notes = label.with_name(f"{name}.json")
        about = {
            "program": PROGRAM,
            "version": self.version,
            "task": TASK,
            "fast": self.fast,
            "ct_sha256": _sha256(ct),
        }
        if label.is_file() and _read(notes) == about:
            return about
        label.parent.mkdir(parents=True, exist_ok=True)
        notes.unlink(missing_ok=True)
        made = label.with_name(f"{name}_unfinished_{os.getpid()}.nii.gz")
        converted = label.with_name(f"{name}_ct_{os.getpid()}.nii.gz")
        scan = ct
        if format_of(ct) is not None:  # so that label and CT share one grid
            scan = converted
            volume = read_volume(ct)
            write_volume(converted, volume, volume.stored)
        command = [self.program, "-i", str(scan), "-o", str(made), "--ml", "--task", TASK]
        command += ["--device", self.device, "--quiet"] + ["--fast"] * self.fast
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if run.returncode or not made.is_file():
                raise ValueError(
                    f"{PROGRAM} failed for {ct.name} ({_last_line(run.stderr, run.stdout)}); run "
                    f"it alone to see why: {PROGRAM} -i {ct.name} -o masks"
                )
            os.replace(made, label)
        finally:
            made.unlink(missing_ok=True)
            converted.unlink(missing_ok=True)
        text = json.dumps(about, indent=2) + "\n"
        write_atomic(notes, lambda file: file.write(text.encode()))
        return about


def find_segmenter(device: str, *, fast: bool = False) -> Segmenter:
    """Find the program on PATH, or beside Python.

    Args:
        device: where it shall run, in torch's words.
        fast: whether to use its model for 3 mm.

    Raises:
        ValueError: if it is not there, or too old.
    """
    beside = str(Path(sys.executable).parent)
    program = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=beside)
    if program is None:
        raise ValueError(f"--segment needs {PROGRAM}, which is not installed; {HOW_TO_GET_A_LABEL}")
    run = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace")
    version = re.search(r"\d+(\.\d+)+", run.stdout)
    if run.returncode or version is None:
        raise ValueError(
            f"{PROGRAM} must say its version, but {program} --version failed "
            f"({_last_line(run.stderr, run.stdout)}); install it again: pip install -U {PROGRAM}"
        )
    if int(version[0].split(".")[0]) < LEAST_VERSION:
        raise ValueError(
            f"{PROGRAM} must have version {LEAST_VERSION} or later, got {version[0]}; update it: "
            f"pip install -U {PROGRAM}"
        )
    words = device.replace("cuda", "gpu")
    return Segmenter(program, version[0], words, fast)


def _sha256(path: Path) -> str:
    """Hash a file, with the voxels beside a header, or all files of a folder of slices."""
    files = [path, *(path.with_suffix(suffix) for suffix in VOXELS_BESIDE)]
    digest = hashlib.sha256()
    for one in sorted(path.iterdir()) if path.is_dir() else files:
        if one.is_file():
            with one.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
    return digest.hexdigest()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _last_line(*texts: str) -> str:
    """The last line of the first text that has one."""
    lines = [text.strip().splitlines()[-1] for text in texts if text.strip()]
    return lines[0].strip()[-300:] if lines else "it said nothing"
