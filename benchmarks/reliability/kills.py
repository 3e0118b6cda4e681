"""Is a collection that was killed again and again the same as one that never was?

    python -m benchmarks.reliability.kills [--scans 40] [--seed 0]

`tumorsynth synthesize FOLDER` is killed (SIGKILL) at random moments, up to 1.5 times as long as a
scan takes, and given again until it is through. Each run is a fork of this process, which has
imported everything: so the kills fall into the work. One process works at a time; the test suite
kills runs of several, and workers. POSIX only.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import tumorsynth.scans.preview
import tumorsynth.synthesizer  # noqa: F401 (imported before the forks)
from benchmarks.common import write
from tumorsynth.commands.main import main as tumorsynth_main


def write_scans(folder: Path, count: int) -> None:
    folder.mkdir()
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij")
    organ = x**2 + y**2 + z**2 < 0.8
    for k in range(count):
        ct = np.where(organ, 100, -100) + np.random.default_rng(k).normal(0, 10, organ.shape)
        for ending, array in (("ct", ct.astype(np.int16)), ("label", organ.astype(np.uint8))):
            image = nib.Nifti1Image(array, np.diag([2, 2, 2, 1]))
            nib.save(image, folder / f"scan{k:03d}_{ending}.nii")


def start(words: list[str]) -> int:
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os._exit(tumorsynth_main(words))
    return child


def reports(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*_report.json")}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(given.seed)
    found = {"scans": given.scans, "kills": 0, "of_these_with_half_a_file": 0}
    found |= {"of_these_within_a_scan_s_files": 0, "finished_scans_made_again": 0}
    with tempfile.TemporaryDirectory() as folder:
        scans, whole, out = (Path(folder) / name for name in ("in", "whole", "out"))
        write_scans(scans, given.scans)
        words = ["synthesize", str(scans), "--generator", "hu2023", "--count", "1", "-o"]
        began = time.monotonic()
        if tumorsynth_main([*words, str(whole)]) != 0:
            sys.exit("the run that nobody killed failed")
        one = (time.monotonic() - began) / given.scans
        done: dict[str, int] = {}
        while True:
            child = start([*words, str(out)])
            end = time.monotonic() + rng.uniform(0, 1.5 * one)
            while time.monotonic() < end and os.waitpid(child, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
            else:
                if time.monotonic() < end:
                    break  # it was through
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):
                break
            found["kills"] += 1
            names = [path.name for path in out.iterdir()] if out.is_dir() else []
            found["of_these_with_half_a_file"] += any(name.endswith(".part") for name in names)
            found["of_these_within_a_scan_s_files"] += any("unfinished" in name for name in names)
            now = reports(out)
            found["finished_scans_made_again"] += sum(now.get(k) != at for k, at in done.items())
            done = now
        now = reports(out)
        found["finished_scans_made_again"] += sum(now.get(k) != at for k, at in done.items())
        expected, made = contents(whole), contents(out)
        found["files"] = len(expected)
        found["files_missing"] = len(expected.keys() - made.keys())
        found["files_left_over"] = len(made.keys() - expected.keys())
        found["files_with_other_bytes"] = sum(
            made.get(k) not in (v, None) for k, v in expected.items()
        )
    print(found)
    write("kills", found)


if __name__ == "__main__":
    main()
