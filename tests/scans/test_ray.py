"""`--engine ray`: the files of one process, whoever is killed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tumorsynth.commands.main import main

nib = pytest.importorskip("nibabel")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray, of the extra ray"
)
slow = (
    needs_ray,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds Ray's processes in /proc"),
)
SCANS = 8


def words(folder, out, *more):
    every = ["synthesize", folder, "-o", out, "--generator", "hu2023", "--tumor-label", 99, *more]
    return [str(word) for word in every]


def start(*arguments, own_group=False, **environment):
    code = [sys.executable, "-m", "tumorsynth.commands.main", *words(*arguments, "--engine", "ray")]
    return subprocess.Popen(
        code,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "", **environment},
        start_new_session=own_group,
    )


def reports(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*_report.json")}


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def at_work(pid):
    """Those below a process that are in the middle of a scan: Ray names them so."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            each = int(status.parent.name)
            parents[each] = int(status.read_text().rpartition(")")[2].split()[1])
            names[each] = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
    return [
        each
        for each, name in names.items()
        if name.startswith(b"ray::_Processor.process") and pid == parents.get(parents[each])
    ]


def ancestors(pid):
    """The command lines above a process."""
    while pid > 1:
        folder = Path(f"/proc/{pid}")
        yield (folder / "cmdline").read_bytes()
        pid = int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=["token", "disabled"])
def cluster(request):
    """A Ray cluster of one node that was there before, with a token or without: the environment to
    join it, and who is at work in it."""
    environment = {"RAY_AUTH_MODE": request.param}
    if request.param == "token":
        environment["RAY_AUTH_TOKEN"] = "0123456789abcdef" * 4
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a socket's path must be short
    address = f"127.0.0.1:{free_port()}"
    words = [
        *("start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"),
        *(f"--port={address.partition(':')[2]}", "--include-dashboard=false"),
        *(f"--temp-dir={folder}", "--object-store-memory=80000000", "--disable-usage-stats"),
    ]
    # --block: this process ends the others with it, and `ray stop` would end everybody's
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )

    def workers():
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.read_bytes().startswith(b"ray::_Processor.process"):
                    pid = int(path.parent.name)
                    if any(str(folder).encode() in line for line in ancestors(pid)):
                        found.append(pid)
            except OSError:
                continue
        return found

    try:
        for line in head.stdout:
            if "--block" in line:  # it says so when all is up
                break
        yield {"RAY_ADDRESS": address, **environment}, workers
    finally:
        head.terminate()
        head.stdout.close()
        head.wait(300)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    from tumorsynth.phantom import make_phantom
    from tumorsynth.scans import nifti

    folder = tmp_path_factory.mktemp("scans")
    for k in range(SCANS):
        phantom = make_phantom(spacing=(4.0, 4.0, 4.0), seed=k)
        stored = (phantom.image[0].round().short().numpy(), phantom.label[0].numpy())
        for ending, array in zip(("ct", "label"), stored, strict=True):
            path = folder / f"phantom{k}_{ending}.nii.gz"
            volume = nifti.new_volume(path.name, array, phantom.affine)
            nifti.write_volume(path, volume, array)
    return folder


@pytest.fixture(scope="module")
def whole(scans, tmp_path_factory):
    """What one process makes of them, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(words(scans, out, "--engine", "processes", "--workers", 1)) == 0
    return contents(out)


def with_marks(test):
    for mark in slow:
        test = mark(test)
    return test


@with_marks
def test_a_worker_killed_in_the_middle(scans, whole, tmp_path):
    out = tmp_path / "out"
    run = start(scans, out, "--workers", 2)
    wait_for(lambda: len(reports(out)) >= 2, run)
    os.kill(wait_for(lambda: at_work(run.pid), run)[0], signal.SIGKILL)
    said, errors = run.communicate(timeout=600)
    assert (run.returncode, errors) == (0, "")
    assert f"wrote {SCANS} scans" in said
    assert contents(out) == whole


@with_marks
def test_a_killed_run_is_gone_on_with_and_a_bad_scan_passed_over(scans, whole, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for path in scans.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    bad = folder / "phantom4_ct.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-999])

    first = start(folder, out, "--workers", 2)
    wait_for(lambda: len(reports(out)) >= 2, first)
    workers = wait_for(lambda: at_work(first.pid), first)
    first.kill()
    first.communicate()
    end = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they do not outlive their parent
        assert time.monotonic() < end
        time.sleep(0.05)
    before = reports(out)
    assert len(before) < SCANS - 1

    second = start(folder, out, "--workers", 2)
    said, errors = second.communicate(timeout=600)
    assert second.returncode == 1
    lines = errors.splitlines()
    assert len(lines) == 2 and lines[0].startswith("tumorsynth: phantom4: phantom4_ct.nii.gz")
    assert lines[1] == f"tumorsynth: 1 of {SCANS} scans failed"
    assert f"{len(before)} of {SCANS} scans are finished already" in said
    assert contents(out) == {k: v for k, v in whole.items() if "phantom4" not in k}
    assert before.items() <= reports(out).items()  # nothing redone


@with_marks
def test_a_cluster_that_is_there_with_a_worker_killed(scans, whole, tmp_path, cluster):
    there, workers = cluster
    out = tmp_path / "out"
    run = start(scans, out, **there)
    wait_for(lambda: len(reports(out)) >= 2, run)
    os.kill(wait_for(workers, run)[0], signal.SIGKILL)
    said, errors = run.communicate(timeout=600)
    assert (run.returncode, errors) == (0, "")
    assert f"wrote {SCANS} scans" in said
    assert contents(out) == whole
    again = start(scans, out, **there)  # the cluster is still there
    said, errors = again.communicate(timeout=600)
    assert (again.returncode, errors) == (
        0,
        "",
    ) and f"{SCANS} of {SCANS} scans are finished" in said


@with_marks
@pytest.mark.parametrize("everybody", [False, True])
def test_ctrl_c_is_quiet_and_can_be_gone_on_with(scans, whole, tmp_path, everybody):
    """Sent to the command alone, and, as by a terminal, to all of its process group."""
    out = tmp_path / "out"
    run = start(scans, out, "--workers", 2, own_group=True)
    wait_for(lambda: len(reports(out)) >= 2, run)
    wait_for(lambda: at_work(run.pid), run)
    (os.killpg if everybody else os.kill)(run.pid, signal.SIGINT)
    said, errors = run.communicate(timeout=600)
    assert (run.returncode, errors) == (130, "tumorsynth: stopped\n")
    before = reports(out)
    assert 2 <= len(before) < SCANS
    again = start(scans, out, "--workers", 2)
    said, errors = again.communicate(timeout=600)
    assert (again.returncode, errors) == (0, "")
    assert contents(out) == whole
    assert before.items() <= reports(out).items()


@with_marks
def test_a_cluster_that_is_not_there(scans, tmp_path):
    run = start(scans, tmp_path / "out", RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    said, errors = run.communicate(timeout=600)
    assert run.returncode == 2 and errors.count("\n") == 1, errors
    assert "RAY_ADDRESS must name a Ray cluster that answers" in errors


def test_missing_ray_is_named_with_its_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tumorsynth.scans.ray", raising=False)
    assert main(words(tmp_path, tmp_path / "out", "--engine", "ray")) == 2
    assert 'pip install "tumorsynth[ray]"' in capsys.readouterr().err


def test_unknown_engine(tmp_path, capsys):
    assert main(words(tmp_path, tmp_path / "out", "--engine", "dask")) == 2
    assert "--engine must be processes or ray, got 'dask'" in capsys.readouterr().err


@needs_ray
def test_ray_hands_out_the_gpus():
    from tumorsynth.scans.ray import run_on_ray

    with pytest.raises(ValueError, match="give --device cuda, got cuda:0,cuda:1"):
        next(run_on_ray(None, [], Path(), devices=("cuda:0", "cuda:1")))
