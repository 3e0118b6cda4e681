"""Many scans: killed, resumed, shared out among processes, and always the same files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tumorsynth as ts
from tumorsynth.commands.main import main
from tumorsynth.scans.collection import Task, duration, run_in_processes, try_scan
from tumorsynth.scans.pairing import find_pairs

nib = pytest.importorskip("nibabel")
proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds child processes in /proc")
NAMES = "abcdef"


def write_scans(folder, names=NAMES):
    folder.mkdir()
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij")
    organ = x**2 + y**2 + z**2 < 0.8
    for k, name in enumerate(names):
        noise = np.random.default_rng(k).normal(0, 10, organ.shape)
        ct = np.where(organ, 100, -100) + noise
        for ending, array in (("ct", ct.astype(np.int16)), ("label", organ.astype(np.uint8))):
            nib.save(nib.Nifti1Image(array, np.diag([2, 2, 2, 1])), folder / f"{name}_{ending}.nii")
    return folder


def words(folder, out, *more):
    every = ["synthesize", folder, "-o", out, "--generator", "hu2023", "--count", 1, *more]
    return [str(word) for word in every]


def start(*arguments):
    code = [sys.executable, "-m", "tumorsynth.commands.main", *words(*arguments)]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


def children(pid):
    """Processes of a parent that do scans (not Python's resource tracker)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def reports(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*_report.json")}


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans") / "in")


@pytest.fixture(scope="module")
def whole(scans, tmp_path_factory):
    """What one process makes of them, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(words(scans, out)) == 0
    return contents(out)


@proc
def test_killed_and_resumed_and_a_worker_killed(scans, whole, tmp_path):
    out = tmp_path / "out"
    first = start(scans, out, "--workers", 2)
    wait_for(lambda: len(reports(out)) >= 2, first)
    workers = children(first.pid)
    assert len(workers) == 2
    first.kill()
    first.communicate()
    end = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they do not outlive their parent
        assert time.monotonic() < end
        time.sleep(0.05)
    before = reports(out)
    assert len(before) < len(NAMES)
    (out / ".a_ct.nii.gz.123.part").write_bytes(b"half")  # as a kill during a write leaves it

    second = start(scans, out, "--workers", 2)
    wait_for(lambda: children(second.pid), second)
    os.kill(children(second.pid)[0], signal.SIGKILL)
    said, errors = second.communicate(timeout=600)
    assert (second.returncode, errors) == (0, "")
    assert f"{len(before)} of 6 scans are finished already" in said
    assert f"wrote {6 - len(before)} scans" in said
    assert contents(out) == whole  # nothing skipped, nothing left over, nothing else
    assert before.items() <= reports(out).items()  # nothing redone


def test_a_finished_run_is_left_and_a_lost_file_made_again(scans, whole, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in whole.items():
        (out / name).write_bytes(content)
    before = reports(out)
    assert main(words(scans, out)) == 0
    assert "6 of 6 scans are finished already\nwrote 0 scans" in capsys.readouterr().out
    (out / "c_label.nii.gz").unlink()
    assert main(words(scans, out)) == 0
    assert "wrote 1 scan " in capsys.readouterr().out
    assert contents(out) == whole
    assert {path.name[0] for path, at in reports(out).items() if at != before[path]} == {"c"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--seed", 1), "made with seed 0, now 1"),
        (("--size-mm", 5, 6), "made with options size_mm [8.0, 20.0], now [5.0, 6.0]"),
        (("--intensity", "-1000,1000,0,1"), "made with options intensity"),
    ],
)
def test_another_run_does_not_go_on_with_these(scans, whole, tmp_path, capsys, change, says):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in whole.items():
        (out / name).write_bytes(content)
    assert main(words(scans, out, *change)) == 2
    error = capsys.readouterr().err
    assert says in error and "--overwrite" in error
    assert contents(out) == whole


def test_files_of_somebody_else_are_not_replaced(scans, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b_ct.nii.gz").write_bytes(b"mine")
    assert main(words(scans, out)) == 2
    assert "b_ct.nii.gz exists" in capsys.readouterr().err
    assert contents(out) == {"b_ct.nii.gz": b"mine"}
    (out / ".b_unfinished").touch()  # with the mark of a killed run they are its own
    assert main(words(scans, out)) == 0
    assert not (out / ".b_unfinished").exists()
    for damaged in ("{", "[]", "{}"):
        (out / "a_report.json").write_text(damaged)
        assert main(words(scans, out)) == 2


def test_overwriting_can_be_gone_on_with(scans, tmp_path, monkeypatch):
    """Stopped in the middle of --overwrite: what is old is made anew, and what is new is kept."""
    from tumorsynth.commands import synthesis_run as command

    out, whole = tmp_path / "out", tmp_path / "whole"
    assert main(words(scans, whole)) == 0
    assert main(words(scans, out, "--seed", 5)) == 0
    tried = []

    def stop_at_the_third(*arguments):
        tried.append(arguments)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return try_scan(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(command, "try_scan", stop_at_the_third)
        assert main(words(scans, out, "--overwrite")) == 130
    new = reports(out)
    assert {path.name[0] for path in new} == {"a", "b"}
    assert main(words(scans, out)) == 0
    assert contents(out) == contents(whole) and new.items() <= reports(out).items()


def test_bad_scans_among_several_processes(tmp_path, capsys):
    folder = write_scans(tmp_path / "in", "abcd")
    raw = (folder / "b_ct.nii").read_bytes()
    (folder / "b_ct.nii").write_bytes(raw[: len(raw) // 2])
    (folder / "d_label.nii").unlink()
    out = tmp_path / "out"
    assert main(words(folder, out, "--workers", 2)) == 1
    said = capsys.readouterr()
    lines = sorted(said.err.splitlines())
    assert "2 of 4 scans failed" in lines[0]
    assert "b: b_ct.nii is cut short" in lines[1] and "d: no such file" in lines[2]
    assert "4 of 4]" in said.out + said.err or "[3 of 4" in said.out
    assert {path.name[0] for path in reports(out)} == {"a", "c"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert json.loads((out / "c_report.json").read_text())["seed"] == 2


@proc
@pytest.mark.parametrize("begun", [False, True], ids=["while workers start", "in the middle"])
def test_ctrl_c_ends_quietly(scans, tmp_path, begun):
    """A terminal's Ctrl-C goes to the workers too: one line, no traceback of anybody's."""
    code = [
        sys.executable,
        "-m",
        "tumorsynth.commands.main",
        *words(scans, tmp_path / "out", "--workers", 2),
    ]
    run = subprocess.Popen(
        code,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # of a shell's background job, which the tests may be, Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if begun:
        wait_for(lambda: reports(tmp_path / "out"), run)
    else:
        wait_for(lambda: children(run.pid), run)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=600)
    assert (run.returncode, errors) == (130, "tumorsynth: stopped\n")


class Losing(ts.SynthesizeTumor):
    """Whose device fails once, or for ever."""

    def __init__(self, flag, for_ever):
        super().__init__("hu2023", count=1, size_mm=(8, 20))
        self.flag, self.for_ever = flag, for_ever

    def forward(self, *arguments, **more):
        if self.for_ever or not self.flag.exists():
            self.flag.touch()
            raise RuntimeError("CUDA error: unspecified launch failure")
        return super().forward(*arguments, **more)


def test_a_lost_device_gets_a_new_process_and_then_stops_the_run(scans, tmp_path):
    tasks = [Task(case, k) for k, case in enumerate(find_pairs(scans, None))][:3]
    tmp_path = tmp_path / "out"
    tmp_path.mkdir()
    once = Losing(tmp_path / "flag", for_ever=False)
    found = list(run_in_processes(once, tasks, tmp_path, workers=1))
    assert [result.error for result in found] == [None] * 3 and len(reports(tmp_path)) == 3
    first = next(run_in_processes(Losing(tmp_path / "flag", True), tasks, tmp_path, workers=1))
    assert "the device was lost: CUDA error" in first.error and first.fatal == "see to the device"


def test_a_lost_device_stops_a_run_of_one_process(scans, tmp_path, monkeypatch, capsys):
    def lost(*arguments, **more):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("tumorsynth.scans.collection.synthesize_scan", lost)
    assert main(words(scans, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "the device was lost: CUDA error" in error
    assert "stopped, 5 scans not tried; see to the device, and give the same" in error


def test_durations():
    assert [duration(s) for s in (0, 41.4, 95, 5000, 12_000)] == [
        "0 s",
        "41 s",
        "2 min",
        "83 min",
        "3 h 20 min",
    ]
