"""Disks full or read-only, files cut anywhere: a clear line, and nothing half-written."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from test_collection import NAMES, contents, scans, whole, words  # noqa: F401 (fixtures)

from tumorsynth.commands.main import main
from tumorsynth.scans.nifti import read_volume

nib = pytest.importorskip("nibabel")
ROOT = Path(__file__).resolve().parents[2]


def on_own_disk(folder: Path, options: str, script: str) -> subprocess.CompletedProcess:
    """Run Python in a mount namespace where ``folder`` is a small disk of its own; or skip."""
    mounted = f"mount -t tmpfs -o {options} tmpfs {folder}"
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True).returncode
    ):
        pytest.skip("needs a mount namespace (unshare -rm)")
    return subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            f'{mounted} && exec "$@"',
            "sh",
            sys.executable,
            "-c",
            script,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )


FULL = """
import json, os, sys
from pathlib import Path
from tumorsynth.commands.main import main
out = Path({out!r})
fill = out / "fill"
room = os.statvfs(out).f_bavail * 4096 - 300_000  # for the first scans, not for all
fill.write_bytes(bytes(room))
code = main({words!r})
print("CODE", code, sorted(p.name for p in out.iterdir()))
fill.unlink()
code = main({words!r})
print("CODE", code, sorted(p.name for p in out.iterdir()))
"""


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(scans, whole, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    out.mkdir()
    script = FULL.format(out=str(out), words=words(scans, out))
    done = on_own_disk(out, "size=4m", script)
    lines = done.stdout.splitlines()
    first, second = (line for line in lines if line.startswith("CODE"))
    assert first.startswith("CODE 1 "), done
    assert "No space left" in done.stderr and "not tried; make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert ".part" not in first
    reports = first.count("_report.json")
    assert 0 < reports < len(NAMES)
    assert second == f"CODE 0 {sorted(whole)}"
    assert f"{reports} of {len(NAMES)} scans are finished already" in done.stdout


READ_ONLY = """
import sys
from tumorsynth.commands.main import main
from tiny import tiny_generator
print("CODE", main({words!r}))
print("CODE", main({words!r} + ["--workers", "2"]))
try:
    tiny_generator().save({out!r})
except OSError as error:
    print("SAVE", error)
"""


def test_a_read_only_folder_is_said_once(scans, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    out.mkdir()
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n" + READ_ONLY.format(
        out=str(out), words=words(scans, out)
    )
    done = on_own_disk(out, "ro,size=1m", script)
    assert done.stdout.count("CODE 1") == 2, done
    assert "SAVE" in done.stdout and "Read-only file system" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and "Traceback" not in done.stderr, lines
    assert "Read-only file system" in lines[0] and "5 scans not tried" in lines[1]


LIMIT = """
import resource, sys
from tumorsynth.commands.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
sys.exit(main({words!r}))
"""


def test_a_write_that_fails_leaves_no_half_file(scans, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", LIMIT.format(words=words(scans, out))],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "6 of 6 scans failed" in done.stderr
    assert f"File too large: '{out}/" in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in out.iterdir()} == {f".{name}_unfinished" for name in NAMES}
    assert main(words(scans, out)) == 0  # these marks are its own: it goes on
    assert len(list(out.iterdir())) == 4 * len(NAMES)


def test_a_nifti_cut_or_changed_anywhere_is_refused_or_whole(tmp_path):
    """300 lengths and 300 changed bytes, zipped and not: a ValueError or the very voxels."""
    rng = np.random.default_rng(0)
    values = rng.integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([2, 2, 2, 1])), tmp_path / "a.nii")
    plain = (tmp_path / "a.nii").read_bytes()
    path, refused = tmp_path / "b.nii.gz", 0
    for raw, zipped in ((gzip.compress(plain), True), (plain, False)):
        for k in range(300):
            if k % 2:
                damaged = raw[: int(rng.integers(len(raw)))]
            else:
                damaged = bytearray(raw)
                damaged[int(rng.integers(len(raw)))] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            try:
                stored = read_volume(path).stored
            except ValueError as error:
                refused += 1
                assert "b.nii.gz" in str(error)
            else:  # what has no checksum may hold another number
                assert not (k % 2) and (not zipped or (stored == values).all())
    assert refused > 400


@pytest.mark.parametrize("dims", [(30000, 30000, 30000), (2000, 2000, 2000), (64, 64, 64)])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_size_that_is_not_there_is_refused_before_memory_is_had(tmp_path, dims, zipped):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[40:56] = struct.pack("<8h", 3, *dims, 1, 1, 1, 1)
    path = tmp_path / "big.nii.gz"
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    tracemalloc.start()
    with pytest.raises(ValueError, match="big.nii.gz is cut short"):
        read_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
