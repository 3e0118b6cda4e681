"""The GPU session keeps what its parts have found, whatever ends a part or the session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks" / "gpu"
gpu_session = pytest.importorskip(
    "benchmarks.gpu.gpu_session", reason="needs the benchmarks beside the tests"
)

NOT_NEEDED = "monai nibabel torchio typer lightning pytorch_lightning matplotlib".split()
PATIENCE_S = 500
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def read(archive: Path) -> dict[str, str]:
    with zipfile.ZipFile(archive) as found:
        assert found.testzip() is None
        return {name: found.read(name).decode() for name in found.namelist()}


def rows(found: dict[str, str], part: str) -> list[dict]:
    return json.loads(found.get(f"{part}.json", '{"rows": []}'))["rows"]


def ended(found: dict[str, str]) -> dict[str, str]:
    return {part["part"]: part["ended"] for part in json.loads(found["session.json"])["parts"]}


def blocked(folder: Path) -> dict[str, str]:
    """An environment in which the packages that a lent machine lacks cannot be imported."""
    folder.mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in NOT_NEEDED)]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def command(out: Path, *parts: str) -> list[str]:
    script = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--device", "cpu", "--tiny"]
    script += ["--minutes", "25"]
    return [*script, "--repeats", "1", "--commit", "abc", "--out", str(out), "--parts", *parts]


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the session ended too early"
        time.sleep(0.05)


@on_linux
@pytest.mark.timeout(600)
def test_a_session_killed_midway_leaves_what_it_has_found(tmp_path):
    out = tmp_path / "out"
    archive = out / gpu_session.ARCHIVE
    process = subprocess.Popen(
        command(out, "search", "training"),
        env={**blocked(tmp_path / "blocked"), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: archive.exists() and rows(read(archive), "training"), process)
        assert len(gpu_session.marked(f"{process.pid}.training")) >= 1
    finally:
        process.kill()
        printed = process.communicate()[0]
    found = read(archive)
    environment = json.loads(found["search.json"])["environment"]
    assert {"cpu", "gpu", "torch", "numpy", "python"} < set(environment)
    assert environment["commit"] == "abc"
    assert [row["way"] for row in rows(found, "search")] == ["tables of 32 voxels"]
    assert rows(found, "training")[0]["what"] == "denoiser"
    assert ended(found) == {"search": "exit 0", "training": "running"}
    assert "'what': 'denoiser'" in printed and "== search: exit 0" in printed
    assert [path.name for path in out.glob("[!.]*")] == [gpu_session.ARCHIVE]


@on_linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_session_that_is_ended_takes_its_part_along(tmp_path, number):
    script, archive = tmp_path / "hanging.py", tmp_path / gpu_session.ARCHIVE
    script.write_text(HANGING)
    program = "import sys; sys.argv[1:] = ['--out', sys.argv[1]]\n"
    program += "import benchmarks.gpu.gpu_session as g\n"
    program += f"g.PARTS = [g.Part('hanging', 600.0, {str(script)!r})]; g.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    wait_for(
        lambda: archive.exists() and "one row" in read(archive).get("hanging.log", ""), process
    )
    mark = f"{process.pid}.hanging"
    assert len(gpu_session.marked(mark)) == 2
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    found = read(archive)
    (part,) = rows(found, "hanging")
    assert ended(found) == {"hanging": "running" if number == signal.SIGKILL else "stopped"}
    end = time.monotonic() + 20
    while part in gpu_session.marked(mark):
        assert time.monotonic() < end, "the part outlived its session"
        time.sleep(0.05)
    left = gpu_session.marked(mark)
    for pid in left:  # a killed session cannot end what left its part's process group
        os.kill(pid, signal.SIGKILL)
    assert len(left) == (number == signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_five_parts_need_five_packages(tmp_path):
    first = [part.name for part in gpu_session.PARTS[:5]]
    environment = blocked(tmp_path / "blocked")
    process = subprocess.run(
        command(tmp_path / "out", *first), env=environment, capture_output=True, text=True
    )
    found = read(tmp_path / "out" / gpu_session.ARCHIVE)
    assert ended(found) == dict.fromkeys(first, "exit 0"), process.stdout
    assert all(rows(found, part) for part in first)
    assert process.returncode == 0
    assert "MONAI's U-Net: not measured" in found["training.log"]
    assert {row["what"] for row in rows(found, "probe")} == {
        "operator",
        "synchronisation",
        "copy",
        "convolution",
        "nanmedian(1)",
        "profile of a call",
    }


HANGING = """
import os, subprocess, sys, time
from pathlib import Path
child = "import time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
Path(sys.argv[sys.argv.index("-o") + 1] + ".json").write_text(f'{{"rows": [{os.getpid()}]}}')
print("one row")
time.sleep(600)
"""
FAILING = "print('a reason'); raise SystemExit(3)"
FINE = "print('fine')"


def session_of(monkeypatch, tmp_path, scripts: dict[str, str], *options: str) -> dict[str, str]:
    """The archive of a session of these scripts, whose exit message is under "exit"."""
    parts = []
    for name, text in scripts.items():
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        parts.append(gpu_session.Part(name, 5.0 if name == "hanging" else 60.0, str(script)))
    monkeypatch.setattr(gpu_session, "PARTS", parts)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(out), *options])
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    message = ""
    try:
        gpu_session.main()
    except SystemExit as error:
        message = str(error.code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return {**read(out / gpu_session.ARCHIVE), "exit": message}


@on_linux
def test_a_part_that_hangs_dies_with_its_children_and_the_next_ones_run(monkeypatch, tmp_path):
    scripts = {"hanging": HANGING, "failing": FAILING, "fine": FINE}
    found = session_of(monkeypatch, tmp_path, scripts)
    assert ended(found) == {
        "hanging": "killed after its 5 s",
        "failing": "exit 3",
        "fine": "exit 0",
    }
    assert found["exit"] == "failed: hanging, failing"
    assert len(rows(found, "hanging")) == 1 and found["hanging.log"] == "one row\n"
    assert found["failing.log"] == "a reason\n"
    assert not gpu_session.marked(f"{os.getpid()}.hanging")


def test_a_second_session_adds_to_the_archive(monkeypatch, tmp_path):
    session_of(monkeypatch, tmp_path, {"one": FINE, "two": FINE})
    found = session_of(monkeypatch, tmp_path, {"two": FAILING, "three": FINE})
    assert ended(found) == {"one": "exit 0", "two": "exit 3", "three": "exit 0"}
    assert found["earlier_two.log"] == "fine\n" and found["two.log"] == "a reason\n"


def test_what_cannot_run_is_skipped_with_its_reason(monkeypatch, tmp_path, capsys):
    original = next(part for part in gpu_session.PARTS if part.name == "original")
    monkeypatch.setattr(gpu_session, "find_spec", lambda name: None)
    for given, reason in ((None, "pass --original CHECKOUT"), (tmp_path, "needs einops_exts")):
        args = gpu_session.argparse.Namespace(original=given)
        assert reason in original.missing(args)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--parts", "original"])
    gpu_session.main()
    assert "original: skipped: pass --original" in capsys.readouterr().out
    assert ended(read(tmp_path / gpu_session.ARCHIVE))["original"].startswith("skipped: pass")


def test_a_file_that_is_no_archive_is_left_alone(monkeypatch, tmp_path):
    archive = tmp_path / gpu_session.ARCHIVE
    archive.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="not a zip archive; move it away"):
        gpu_session.main()
    assert archive.read_text() == "mine"
