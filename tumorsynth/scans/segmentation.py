"""Label maps from TotalSegmentator, which runs as a program of its own where it is installed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.itk_formats.recognize import format_of
from tumorsynth.label_maps.reading import read_label_map
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.volume import Volume
from tumorsynth.scans.volume_files import check_same_grid, read_volume, write_volume

PROGRAM, TASK = "TotalSegmentator", "total"
NAMES = "totalsegmentator"  # the label map of the task's values
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

    def read_scan(
        self,
        ct: Path,
        label: Path,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> tuple[Volume, Volume, dict[str, Any]]:
        """Read a CT and its label map, which is made unless it is there and fits.

        Args:
            ct: the CT.
            label: the label map that is kept; a .json beside it says how it was made.
            reading: how to read the files.

        Returns:
            The CT, its label map, and what is known about the label map.

        Raises:
            ValueError: if the program fails or makes no label map of the CT. None is kept then.
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
            image = read_volume(ct, reading)
            try:
                return image, _read_label(label, image, reading), about
            except ValueError:
                pass  # it is made again
        label.parent.mkdir(parents=True, exist_ok=True)
        for old in (notes, label):
            old.unlink(missing_ok=True)
        made = label.with_name(f"{name}_unfinished_{os.getpid()}.nii.gz")
        try:
            self._segment(ct, made)
            image = read_volume(ct, reading)
            try:
                mask = replace(_read_label(made, image, reading), name=label.name)
            except ValueError as error:
                raise ValueError(
                    f"{PROGRAM} made no label map that fits {ct.name} ({_reason(error, made)}); "
                    f"{self._alone(ct)}"
                ) from error
            os.replace(made, label)
        finally:
            made.unlink(missing_ok=True)
        text = json.dumps(about, indent=2) + "\n"
        write_atomic(notes, lambda file: file.write(text.encode()))
        return image, mask, about

    def _segment(self, ct: Path, made: Path) -> None:
        """Run the program on a CT."""
        scan = ct
        converted = made.with_name(f"ct_of_{made.name}")
        if format_of(ct) is not None:  # so that label and CT share one grid
            scan = converted
            volume = read_volume(ct)
            write_volume(converted, volume, volume.stored)
        command = [self.program, "-i", str(scan), "-o", str(made), "--ml", "--task", TASK]
        command += ["--device", self.device, "--quiet"] + ["--fast"] * self.fast
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace")
        finally:
            converted.unlink(missing_ok=True)
        if run.returncode or not made.is_file():
            raise ValueError(
                f"{PROGRAM} failed for {ct.name} ({_last_line(run.stderr, run.stdout)}); "
                f"{self._alone(ct)}"
            )

    def _alone(self, ct: Path) -> str:
        command = [self.program, "-i", os.path.abspath(ct), "-o", "masks"]
        return f"run it alone to see why: {shlex.join(command)}"


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


def _read_label(path: Path, image: Volume, reading: Reading) -> Volume:
    """Read a label map; raise ValueError unless it is one of the task, on the CT's grid."""
    label = read_volume(path, reading)
    check_same_grid(image, label, "CT and segmentation", reading)
    named = read_label_map(NAMES)
    assert named is not None
    foreign = named.foreign(label.held_values(), 0)
    if foreign:
        raise ValueError(f"{path.name} holds {foreign[0]}, which is no value of the task {TASK!r}")
    return label


def _reason(error: Exception, made: Path) -> str:
    """Return an error's first clause, in words that do without the temporary file."""
    words = str(error).split("; ")[0].replace(made.name, "the segmentation")
    return words.replace("a label must", "it must")


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
