"""Folders, names and reports as they should not be: one line of ours, and nothing harmed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import scan, write
from test_hostile_generators import LEAVES, places
from test_properties import tries

from tumorsynth.commands.main import main

nib = pytest.importorskip("nibabel")
SMALL = (24, 22, 16)


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate("ab"):
        write(tmp_path / "in", name, *scan(k, SMALL))
    return tmp_path / "in"


def words(*arguments):
    fixed = ("--generator", "hu2023", "--tumor-label", 99, "--count", 1, "--size-mm", 6, 8)
    return [str(word) for word in ("synthesize", *arguments, *fixed)]


def refused(capsys, *arguments):
    assert main(words(*arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("tumorsynth: ") and err.count("\n") == 1
    return err


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_results_never_go_among_the_scans(folder, tmp_path, capsys):
    before = files(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for out in (folder, folder / ".." / "in", link):
        assert "--out must not be the folder of the scans" in refused(capsys, folder, "-o", out)
    for kind in ("cts", "labels"):
        (tmp_path / kind).mkdir()
        ending = {"cts": "ct", "labels": "label"}[kind]
        for name in "ab":
            (tmp_path / kind / f"{name}.nii.gz").write_bytes(before[f"{name}_{ending}.nii.gz"])
    for out in (tmp_path / "cts", tmp_path / "labels"):
        said = refused(capsys, tmp_path / "cts", tmp_path / "labels", "-o", out)
        assert "--out must not be the folder of the scans" in said
    assert files(folder) == before


def test_links_in_the_folder_of_results(folder, tmp_path, capsys):
    out, precious = tmp_path / "out", tmp_path / "precious"
    out.mkdir()
    precious.write_text("mine")
    (out / "a_ct.nii.gz").symlink_to(folder / "a_ct.nii.gz")
    assert "is an input and would be replaced" in refused(capsys, folder, "-o", out)
    (out / "a_ct.nii.gz").unlink()
    (out / "a_ct.nii.gz").symlink_to(precious)
    assert "exists; choose another" in refused(capsys, folder, "-o", out)
    (out / f".a_label.nii.gz.{os.getpid()}.part").symlink_to(precious)  # our own next name
    before = files(folder)
    assert main(words(folder, "-o", out, "--overwrite")) == 0
    assert precious.read_text() == "mine" and files(folder) == before
    assert not any(path.is_symlink() for path in out.iterdir())


def test_names_that_differ_by_case_alone(tmp_path, capsys):
    for name in ("Case1", "case1"):
        write(tmp_path / "in", name, *scan(0, SMALL))
    said = refused(capsys, tmp_path / "in", "-o", tmp_path / "out")
    assert "'Case1' and 'case1'; rename one" in said


ODD_NAMES = [b"a\nb", b"caf\xe9", b"\x1b[2Jx", "日本".encode(), b"-$(id)$ " + b"x" * 200]


def test_names_that_are_no_words(tmp_path):
    """In a process of its own, whose stdout is strict about what text is."""
    folder = os.fsencode(tmp_path / "in")
    write(tmp_path / "in", "good", *scan(0, SMALL))
    for name in ODD_NAMES:
        for ending in (b"_ct.nii.gz", b"_label.nii.gz"):
            with open(os.path.join(folder, b"good" + ending), "rb") as source:
                try:
                    target = open(os.path.join(folder, name + ending), "wb")
                except OSError:
                    pytest.skip("this disk takes no such names")
                with target:
                    target.write(source.read())
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "tumorsynth.commands.main", *words(tmp_path / "in", "-o", out)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert len(list(out.iterdir())) == 4 * (len(ODD_NAMES) + 1)
    lines = done.stdout.splitlines()
    assert len(lines) == len(ODD_NAMES) + 2 and b"\x1b" not in done.stdout + done.stderr


def test_a_name_too_long_fails_its_scan_alone(tmp_path, capsys):
    write(tmp_path / "in", "good", *scan(0, SMALL))
    write(tmp_path / "in", "x" * 236, *scan(1, SMALL))
    assert main(words(tmp_path / "in", "-o", tmp_path / "out")) == 1
    said = capsys.readouterr()
    assert "File name too long" in said.err and "1 of 2 scans failed" in said.err
    assert (tmp_path / "out" / "good_report.json").is_file()


def test_two_runs_at_once_into_one_folder(folder, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)  # as another run holds it
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "only one run may write into a folder" in refused(capsys, folder, "-o", out)
    os.close(handle)
    assert main(words(folder, "-o", out)) == 0
    assert len(list(out.iterdir())) == 8  # and no file tells of it


def test_an_output_that_nobody_reads(folder, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "tumorsynth.commands.main", *words(folder, "-o", tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run.stdout.close()
    assert run.wait(600) == 1 and run.stderr.read() == b""
    run.stderr.close()
    assert main(words(folder, "-o", tmp_path / "out")) == 0


# -- reports ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    pair = write(folder / "in", "a", *scan(0, SMALL))
    assert main(words(*pair, "-o", folder / "out")) == 0
    return pair, json.loads((folder / "out" / "a_report.json").read_text())


def test_a_report_of_another_kind_is_no_finished_scan(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(folder, "-o", out)) == 0
    capsys.readouterr()
    report = out / "a_report.json"
    for text in ("[" * 100_000, "\0", '{"tumorsynth": "0.0.1"}', "1" * 5000, "[]"):
        report.write_text(text)
        assert "a_report.json" in refused(capsys, folder, "-o", out)
    report.unlink()
    report.mkdir()
    assert "cannot be read" in refused(capsys, folder, "-o", out)


@tries(15)
@given(data=st.data())
def test_reports_changed_anywhere(made, tmp_path_factory, capfd, data):
    """Replayed or refused in one line: never more than the tumours of a report."""
    pair, report = made
    report = copy.deepcopy(report)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(report))))
        held = report
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = copy.deepcopy(data.draw(st.sampled_from([*LEAVES, "../../x", "cuda"])))
    folder = tmp_path_factory.mktemp("replay")
    (folder / "report.json").write_text(json.dumps(report))
    code = main([str(w) for w in ("replay", folder / "report.json", *pair, "-o", folder / "out")])
    err = capfd.readouterr().err
    assert code in (0, 1, 2) and "unexpected" not in err, err
    assert err.count("\n") <= 2
    assert {p.name for p in folder.iterdir()} <= {"report.json", "out"}
    assert not Path(folder.parent / "x").exists()
