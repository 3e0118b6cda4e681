"""The reader study: blinding, the study's file, the table, the server's walls."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import json
import math
import re
import shutil
import socket
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="needs the extra reader-study")
pytest.importorskip("starlette", reason="needs the extra reader-study")
stats = pytest.importorskip("scipy.stats", reason="needs the extra reader-study")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra reader-study")

from tumorsynth.commands.main import main  # noqa: E402
from tumorsynth.commands.reader_study import _prepare as prepare  # noqa: E402
from tumorsynth.reader_study import blinding, server  # noqa: E402
from tumorsynth.reader_study.blinding import Scan, blind, differences, find_scans  # noqa: E402
from tumorsynth.reader_study.results import row, share, study_results  # noqa: E402
from tumorsynth.reader_study.store import Answer, Refused, Store  # noqa: E402

STATIC = server.STATIC
SPACING = (0.8, 0.7, 2.0)


def scan_array(seed: int = 0, shape: tuple[int, int, int] = (40, 36, 20)) -> np.ndarray:
    return np.random.default_rng(seed).normal(60, 15, shape).round().astype(np.int16)


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None, **header) -> Path:
    image = nibabel.Nifti1Image(values, np.diag([*SPACING, 1]) if affine is None else affine)
    for field, value in header.items():
        image.header[field] = value
    nibabel.save(image, path)
    return path


def label_array(shape, *boxes, value: int = 2) -> np.ndarray:
    label = np.ones(shape, np.uint8)
    for low, high in boxes:
        label[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    return label


@pytest.fixture
def scans(tmp_path):
    """Two folders with a scan and its label each: real has one lesion, synthetic two."""
    boxes = {"real": [((10, 10, 5), (18, 18, 9))]}
    boxes["synthetic"] = [((30, 28, 14), (36, 34, 17)), ((4, 4, 3), (13, 13, 8))]
    for seed, (truth, where) in enumerate(boxes.items()):
        folder = tmp_path / truth
        folder.mkdir()
        values = scan_array(seed)
        write(folder / f"{truth}_ct.nii.gz", values)
        write(folder / f"{truth}_label.nii.gz", label_array(values.shape, *where))
    return tmp_path


# ---- blinding


def test_the_same_voxels_give_the_same_file_however_they_came(tmp_path):
    hu = scan_array()
    plain = write(tmp_path / "a_real.nii", hu)
    flipped = np.diag([-0.8, 0.7, 2.0, 1.0])
    flipped[:3, 3] = 17, -4, 3
    turned = np.array([[0, -0.8, 0, 9], [0.7, 0, 0, 1], [0, 0, 2.0, -800], [0, 0, 0, 1]], float)
    noise = np.random.default_rng(1).uniform(-0.4, 0.4, hu.shape)
    shifted = nibabel.Nifti1Image((hu + 1024).astype(np.uint16), np.diag([*SPACING, 1]))
    shifted.header.set_slope_inter(1, -1024)
    nibabel.save(shifted, tmp_path / "scaled.nii.gz")
    written = [
        write(tmp_path / "b.nii.gz", hu, descrip=b"synthetic", intent_name=b"fake", aux_file=b"x"),
        write(tmp_path / "c.nii", (hu + noise).astype(np.float32)),
        write(tmp_path / "d.nii", hu[::-1], flipped),
        write(tmp_path / "e.nii.gz", np.swapaxes(hu, 0, 1)[:, ::-1], turned),
        tmp_path / "scaled.nii.gz",
    ]
    (first,) = blind(Scan("real", plain, None), tumor_label=2)
    for path in written:
        (other,) = blind(Scan("synthetic", path, None), tumor_label=2)
        assert other.nifti() == first.nifti(), path.name
    back = nibabel.Nifti1Image.from_bytes(first.nifti())
    assert np.array_equal(np.asarray(back.dataobj), hu)
    assert back.header.get_zooms() == pytest.approx(SPACING)


def test_header_and_size_depend_on_the_grid_alone(scans):
    files = [
        blind(scan, tumor_label=2, field_mm=20)[0].nifti()
        for truth in ("real", "synthetic")
        for scan in find_scans(scans / truth, truth)
    ]
    assert files[0] != files[1]
    assert files[0][:352] == files[1][:352]
    assert len(files[0]) == len(files[1])
    assert not re.search(rb"real|synth|nii", files[1][:352])


def test_values_are_cut_to_one_range_and_nan_is_air(tmp_path):
    values = scan_array().astype(np.float32)
    values[0, 0, :3] = -3000, 9000, np.nan
    (case,) = blind(Scan("real", write(tmp_path / "x.nii", values), None), tumor_label=2)
    assert case.hu.dtype == np.int16
    assert case.hu[0, 0, :3].tolist() == [-1024, 3071, -1024]


@pytest.mark.parametrize("flip", [False, True])
def test_mark_is_the_lesions_centre_in_the_field(tmp_path, flip):
    hu = scan_array()
    hu[33, 20, 10] = 1234
    label = label_array(hu.shape, ((31, 18, 9), (36, 23, 12)))
    affine = np.diag([-0.8 if flip else 0.8, 0.7, 2.0, 1.0])
    ct = write(tmp_path / "s_ct.nii", hu, affine)
    mask = write(tmp_path / "s_label.nii", label, affine)
    (case,) = blind(Scan("real", ct, mask), tumor_label=2, field_mm=16)
    assert case.hu.shape == (20, 23, 8)
    assert case.hu[case.mark] == 1234


def test_field_moves_into_the_scan_so_that_all_have_one_size(scans):
    (scan,) = find_scans(scans / "synthetic", "synthetic")
    cases = blind(scan, tumor_label=2, lesions="each", field_mm=14)
    assert {case.hu.shape for case in cases} == {(18, 20, 7)}
    assert [round(case.traits.diameter_mm, 1) for case in cases] == sorted(
        [round((6 * n * np.prod(SPACING) / np.pi) ** (1 / 3), 1) for n in (108, 405)], reverse=True
    )
    assert len({case.source for case in cases}) == 2
    assert len(blind(scan, tumor_label=2)) == 1


def test_a_label_without_the_lesion_is_refused(scans):
    (scan,) = find_scans(scans / "real", "real")
    with pytest.raises(ValueError, match="real_label.nii.gz holds none .* value 7"):
        blind(scan, tumor_label=7)


def test_scans_are_found_with_all_their_labels_or_none(scans, tmp_path):
    real = scans / "real"
    assert find_scans(real, "real")[0].label == real / "real_label.nii.gz"
    write(real / "more_ct.nii", scan_array())
    with pytest.raises(ValueError, match="more_ct.nii in .* has no more_label"):
        find_scans(real, "real")
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(ValueError, match="--real: the folder .* holds no .nii"):
        find_scans(plain, "real")
    write(plain / "b.nii", scan_array())
    write(plain / "a.nii.gz", scan_array())
    assert [s.ct.name for s in find_scans(plain, "real")] == ["a.nii.gz", "b.nii"]
    with pytest.raises(ValueError, match="a.nii.gz in .* has no a.nii.gz"):
        find_scans(plain, "real", labels=real)


def test_what_still_tells_is_said(tmp_path):
    def traits(truth, values, **options):
        affine = np.diag([*options.pop("spacing", SPACING), 1])
        path = write(tmp_path / f"{truth}.nii", values, affine)
        return blind(Scan(truth, path, None), tumor_label=2)[0].traits

    hu = scan_array()
    real = traits("real", hu)
    assert differences([real, traits("synthetic", scan_array(3))]) == []
    assert any("dtype" in d for d in differences([real, traits("synthetic", hu.astype(np.int32))]))
    (words,) = differences([real, traits("synthetic", (hu + 0.5).astype(np.float32))])[1:]
    assert words.startswith("rounding differed and is now equal")
    (words,) = differences([real, traits("synthetic", hu, spacing=(0.8, 0.7, 5.0))])
    assert words.startswith("spacing differs") and "0.8 x 0.7 x 5 mm" in words
    (words,) = differences([real, traits("synthetic", np.clip(hu, 60, None))])
    assert words.startswith("lowest value differs: median -7 against 60 HU")
    assert any("shape" in d for d in differences([real, traits("synthetic", hu[:20])]))


def test_marks_in_one_folder_alone_are_refused(scans):
    (marked,) = blind(find_scans(scans / "real", "real")[0], tumor_label=2)
    bare = Scan("synthetic", scans / "synthetic" / "synthetic_ct.nii.gz", None)
    with pytest.raises(ValueError, match="marks must not distinguish"):
        differences([marked.traits, blind(bare, tumor_label=2)[0].traits])


def test_vault_keeps_volumes_in_no_named_file(tmp_path, monkeypatch):
    monkeypatch.setattr(blinding.tempfile, "tempdir", str(tmp_path))
    vault = blinding.Vault()
    reads = [vault.put(bytes([k]) * 1000 * (k + 1)) for k in range(5)]
    assert list(tmp_path.iterdir()) == []
    for k in (3, 0, 4, 1, 2):
        assert reads[k]() == bytes([k]) * 1000 * (k + 1)


def test_served_cases_keep_their_ids_until_a_scan_changes(scans, tmp_path, capsys):
    found = [(find_scans(scans / truth, truth), 2) for truth in ("real", "synthetic")]
    store = Store(tmp_path / "a.sqlite")
    first = prepare(store, found, lesions="each", field_mm=12)
    again = prepare(store, found, lesions="each", field_mm=12)
    assert len(first) == 3
    assert {k: v.volume() for k, v in first.items()} == {k: v.volume() for k, v in again.items()}
    assert "warning: lesion diameter" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="give the same folders and options"):
        prepare(store, found, lesions="each", field_mm=10)
    changed = scan_array(0)
    changed[14, 14, 7] += 1
    write(scans / "real" / "real_ct.nii.gz", changed)
    with pytest.raises(ValueError, match="other cases: 1 of them"):
        prepare(store, found, lesions="each", field_mm=12)


# ---- the study's file


def test_the_file_with_the_truth_is_its_owners_alone(tmp_path):
    a_store(tmp_path / "a.sqlite")
    assert {p.stat().st_mode & 0o777 for p in tmp_path.glob("a.sqlite*")} == {0o600}


def a_store(path: Path, count: int = 6) -> Store:
    store = Store(path)
    store.set_up(
        [("real" if k % 2 else "synthetic", f"{k}.nii 1", f"{k:064}") for k in range(count)]
    )
    return store


def answer_all(store: Store, name: str, right, confidence=lambda case: 3) -> None:
    """right: of a case's number (its source) whether the reader is."""
    reader = store.reader(name)
    for case, truth, source in store.db.execute("SELECT id, truth, source FROM cases").fetchall():
        number = int(source.partition(".")[0])
        other = {"real": "synthetic", "synthetic": "real"}[truth]
        store.save(reader, case, truth if right(number) else other, confidence(number), 2.0)
    store.finish(reader)


def test_each_reader_has_an_order_of_their_own_for_ever(tmp_path):
    store = a_store(tmp_path / "a.sqlite", 20)
    one, two = store.order(store.reader("One")), store.order(store.reader("Two"))
    assert sorted(one) == sorted(two) and one != two
    store.close()
    again = a_store(tmp_path / "a.sqlite", 20)
    assert again.order(again.reader("ONE ")) == one
    assert [r.name for r in again.readers()] == ["One", "Two"]


def test_one_answer_per_case_changeable_until_the_end(tmp_path):
    store = a_store(tmp_path / "a.sqlite", 2)
    reader = store.reader("R")
    first, second = store.order(reader)
    store.save(reader, first, "real", 1, 2.5)
    store.save(reader, first, "synthetic", 5, 1.5)
    (found,) = store.answers(reader)
    assert (found.answer, found.confidence, found.seconds) == ("synthetic", 5, 4.0)
    with pytest.raises(Refused, match="1 cases are not answered"):
        store.finish(reader)
    store.save(reader, second, "real", 3, 1)
    store.finish(reader)
    for late in (lambda: store.save(reader, first, "real", 1, 1), lambda: store.finish(reader)):
        with pytest.raises(Refused, match="answers are closed"):
            late()
    assert {a.answer for a in store.answers(reader)} == {"synthetic", "real"}


@pytest.mark.parametrize(
    "answer, confidence, seconds",
    [
        ("fake", 3, 1),
        ("real", 0, 1),
        ("real", 6, 1),
        ("real", 2.5, 1),
        ("real", True, 1),
        ("real", "3", 1),
        ("real", 3, -1),
        ("real", 3, math.nan),
        ("real", 3, None),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, answer, confidence, seconds):
    store = a_store(tmp_path / "a.sqlite")
    reader = store.reader("R")
    with pytest.raises(Refused):
        store.save(reader, store.order(reader)[0], answer, confidence, seconds)
    with pytest.raises(Refused, match="not in the study"):
        store.save(reader, "elsewhere", "real", 3, 1)
    assert store.answers(reader) == []


def test_many_writers_at_once_lose_nothing(tmp_path):
    stores = [a_store(tmp_path / "a.sqlite", 30) for _ in range(3)]
    reader = stores[0].reader("R")
    order = stores[0].order(reader)

    def work(store: Store) -> None:
        for case in order:
            store.save(reader, case, "real", 3, 1.0)

    threads = [threading.Thread(target=work, args=(s,)) for s in stores for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a.seconds for a in stores[2].answers(reader)] == [6.0] * 30


def test_a_study_stays_with_its_cases(tmp_path):
    a_store(tmp_path / "a.sqlite", 4).close()
    with pytest.raises(ValueError, match="other cases: 2 of them"):
        a_store(tmp_path / "a.sqlite", 6)
    with Store(tmp_path / "a.sqlite").db as db:
        db.execute("UPDATE cases SET sha256 = 'x' WHERE source = '1.nii 1'")
    with pytest.raises(ValueError, match="other cases: 1 of them"):
        a_store(tmp_path / "a.sqlite", 4)


def test_other_files_are_not_taken_for_a_study(tmp_path):
    (tmp_path / "a.txt").write_text("no database, but long enough to be looked at " * 100)
    with pytest.raises(ValueError, match="is not a reader study's file"):
        Store(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Store(tmp_path / "none.sqlite", write=False)
    sqlite3.connect(tmp_path / "b.sqlite").execute("CREATE TABLE other (x)").connection.close()
    with pytest.raises(ValueError, match="is not a reader study's file"):
        Store(tmp_path / "b.sqlite")


def test_a_full_disk_is_no_file_of_another_kind(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written to .*a.sqlite .*disk.*make room"):
            Store(tmp_path / "a.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Store(tmp_path / "a.sqlite").close()


# ---- the table


def answers(reader: str, *cells: tuple[str, str, int]) -> list[Answer]:
    """Cells: truth, answer, how many."""
    flat = [(t, a) for t, a, n in cells for _ in range(n)]
    return [Answer(reader, f"c{k}", t, a, 3, 10.0) for k, (t, a) in enumerate(flat)]


@pytest.mark.parametrize("interval", ["wilson", "exact"])
@pytest.mark.parametrize("right, count", [(0, 7), (1, 7), (20, 30), (30, 30), (499, 1000)])
def test_intervals_of_one_reader_are_scipys(interval, right, count):
    given = answers("R", ("real", "real", right), ("real", "synthetic", count - right))
    found = share(given, interval)
    wanted = stats.binomtest(right, count).proportion_ci(method=interval)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert found.value == right / count


def test_positive_is_real_unless_said_otherwise():
    given = answers(
        "R",
        ("real", "real", 9),
        ("real", "synthetic", 1),
        ("synthetic", "synthetic", 4),
        ("synthetic", "real", 6),
    )
    found = row("R", given)
    assert (found.sensitivity.right, found.sensitivity.count) == (9, 10)
    assert (found.specificity.right, found.specificity.count) == (4, 10)
    assert (found.accuracy.right, found.accuracy.count) == (13, 20)
    assert str(found.accuracy) == "65.0 (43.3-81.9)"
    swapped = row("R", given, positive="synthetic")
    assert (swapped.sensitivity, swapped.specificity) == (found.specificity, found.sensitivity)
    assert swapped.auc == pytest.approx(found.auc)


def test_a_second_reader_who_copies_adds_no_certainty():
    one = answers("A", ("real", "real", 13), ("real", "synthetic", 7))
    same = share(one + [Answer("B", a.case, a.truth, a.answer, 3, 1) for a in one])
    assert (same.low, same.high) == pytest.approx((share(one).low, share(one).high))
    assert same.count == 40


def test_independent_readers_together_are_covered_95_times_of_100():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        case = rng.beta(3, 2, 40)  # some cases are harder than others
        good = rng.random((3, 40)) < case
        given = [
            Answer(str(r), str(c), "real", "real" if good[r, c] else "synthetic", 3, 1)
            for r in range(3)
            for c in range(40)
        ]
        found = share(given)
        covered.append(found.low <= 0.6 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_auc_uses_the_confidence():
    given = [
        Answer("R", str(k), truth, answer, confidence, 1)
        for k, (truth, answer, confidence) in enumerate(
            [("real", "real", 5), ("real", "synthetic", 1), ("synthetic", "synthetic", 4)]
            + [("synthetic", "real", 1)]
        )
    ]
    assert row("R", given).auc == 0.75  # of 4 pairs, 3 in the right order
    scores = [5, -1], [-4, 1]
    assert row("R", given).auc == stats.mannwhitneyu(*scores).statistic / 4


def test_only_who_has_finished_is_counted(tmp_path):
    store = a_store(tmp_path / "a.sqlite", 10)
    answer_all(store, "A", right=lambda k: k < 8)
    late = store.reader("B")
    store.save(late, store.order(late)[0], "real", 1, 1)
    found = study_results(store)
    assert [r["reader"] for r in found["rows"]] == ["A"]
    assert found["rows"][0]["accuracy"]["value"] == 0.8
    assert found["unfinished"] == [{"reader": "B", "answered": 1}]
    answer_all(store, "C", right=lambda k: k % 2 == 0)
    together = study_results(store)["rows"][-1]
    assert together["reader"] == "together" and together["cases"] == 10
    assert (together["accuracy"]["right"], together["accuracy"]["count"]) == (13, 20)
    assert together["seconds"] == 2.0


def test_results_on_the_command_line(tmp_path, capsys):
    db = tmp_path / "a.sqlite"
    store = a_store(db, 4)
    store.reader("Late")
    assert main(["reader-study", "results", str(db)]) == 2
    assert "no reader has finished" in capsys.readouterr().err
    answer_all(store, "A", right=lambda k: True)
    command = ["reader-study", "results", str(db), "--json", str(tmp_path / "r.json")]
    assert main(command) == 0  # while the server has the file open
    told = capsys.readouterr()
    assert "| A      | 4     | 100.0 (34.2-100.0) |" in told.out
    assert "positive = real: sensitivity is the share of real cases called real" in told.out
    assert "Late has answered 0 cases" in told.err
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["rows"][0]["specificity"]["value"] == 1
    assert main([*command, "--interval", "normal"]) == 2
    assert main([*command, "--positive", "fake"]) == 2
    assert "--positive must be real or synthetic, got 'fake'" in capsys.readouterr().err
    serve = ["reader-study", "serve", "--real", "r", "--synthetic", "s", "--port", "0"]
    assert main([*serve, "--positive", "fake"]) == 2
    assert "got 'fake'" in capsys.readouterr().err
    assert main([*serve, "--db", str(tmp_path / "b.sqlite")]) == 2
    assert "--real must be a folder of CTs, but there is no r" in capsys.readouterr().err
    assert not (tmp_path / "b.sqlite").exists()


# ---- the server


@contextlib.contextmanager
def serving(study: server.Study):
    place = server.listen(0)
    running = uvicorn.Server(
        uvicorn.Config(server.build_app(study), log_level="error", server_header=False)
    )
    thread = threading.Thread(target=running.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield place.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(120)


def ask(port: int, path: str, data=None, method: str | None = None, **headers: str):
    """Status, headers without the date, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = None if data is None else data if isinstance(data, bytes) else json.dumps(data)
    if data is not None:
        headers = {"Content-Type": "application/json", **headers}
    method = method or ("GET" if data is None else "POST")
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    found = [(k.lower(), v) for k, v in answer.getheaders() if k.lower() != "date"]
    return answer.status, dict(found), answer.read()


def a_study(path: Path, count: int = 4, **options) -> server.Study:
    store = a_store(path, count)
    ids = [case for (case,) in store.db.execute("SELECT id FROM cases")]
    cases = {case: server.Served(lambda c=case: c.encode() * 50, (1, 2, 3)) for case in ids}
    return server.Study(store, cases, **options)


def test_no_answer_of_the_server_depends_on_the_truth_before_the_end(tmp_path):
    """Two studies that differ in the truth alone give the same answers, byte for byte."""
    first = a_study(tmp_path / "a.sqlite")
    reader = first.store.reader("R")
    first.store.close()
    shutil.copy(tmp_path / "a.sqlite", tmp_path / "b.sqlite")
    with sqlite3.connect(tmp_path / "b.sqlite") as db:
        swap = "CASE truth WHEN 'real' THEN 'synthetic' ELSE 'real' END"
        db.execute(f"UPDATE cases SET truth = {swap}")
    told, ends = [], []
    for name in ("a", "b"):
        store = Store(tmp_path / f"{name}.sqlite")
        study = server.Study(store, first.cases)
        base = f"/{store.token}/"
        seen = []
        with serving(study) as port:
            files = [f.relative_to(STATIC).as_posix() for f in STATIC.rglob("*") if f.is_file()]
            for path in ("", "api/study", *files):
                seen.append(ask(port, base + path))
            seen.append(ask(port, base + "api/start", {"name": "R"}))
            for case in store.order(reader):
                seen.append(ask(port, f"{base}volume/{case}.nii"))
                given = {"reader": reader.id, "case": case, "confidence": 4, "seconds": 1}
                seen.append(ask(port, base + "api/results", {"reader": reader.id}))
                seen.append(ask(port, base + "api/finish", {"reader": reader.id}))
                seen.append(ask(port, base + "api/answer", {**given, "answer": "real"}))
            seen.append(ask(port, base + "api/start", {"name": "R"}))
            seen.append(ask(port, base + "api/results", {"reader": reader.id}))
            told.append(seen)
            ends.append(ask(port, base + "api/finish", {"reader": reader.id}))
        store.close()
    assert told[0] == told[1]
    statuses = [status for status, _, _ in told[0]]
    assert statuses.count(200) == len(statuses) - 9 and statuses.count(409) == 9
    sizes = {len(body) for _, h, body in told[0] if h["content-type"].endswith("octet-stream")}
    assert len(sizes) == 1
    assert [status for status, _, _ in ends] == [200, 200]
    assert json.loads(ends[0][2])["table"][1][4].startswith("50.0")


def test_headers_keep_the_page_to_itself(tmp_path):
    study = a_study(tmp_path / "a.sqlite")
    with serving(study) as port:
        base = f"/{study.store.token}/"
        (case, *_) = study.cases
        for path in ("", "study.js", f"volume/{case}.nii", "api/study", "none"):
            _, headers, _ = ask(port, base + path)
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert not re.search(r"http|\*|unsafe|blob:", policy)
            assert headers["cache-control"] == "no-store"
            assert headers["referrer-policy"] == "no-referrer"
            assert not {"etag", "last-modified", "server", "content-disposition"} & set(headers)


def test_host_header_of_another_name_is_refused(tmp_path):
    study = a_study(tmp_path / "a.sqlite")
    with serving(study) as port:
        base = f"/{study.store.token}/"
        for host in ("evil.example", "127.0.0.1.evil.example", f"evil.example:{port}", "0.0.0.0"):
            assert ask(port, base, Host=host)[0] == 400, host
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}"):
            assert ask(port, base, Host=host)[0] == 200, host


def test_not_to_be_reached_but_by_127_0_0_1_and_the_whole_address(tmp_path):
    study = a_study(tmp_path / "a.sqlite")
    with serving(study) as port:
        for other in {"127.0.0.2", socket.gethostbyname(socket.gethostname())} - {"127.0.0.1"}:
            with pytest.raises(OSError):
                socket.create_connection((other, port), timeout=3)
        for path in ("/", "/study.js", "/api/study", "/x/api/study"):
            assert ask(port, path)[0] == 404
        for path in ("../store.py", "..%2fstore.py", "vendor/../../store.py", "%2e%2e/store.py"):
            assert ask(port, f"/{study.store.token}/{path}")[0] == 404


def test_other_sites_cannot_send_answers(tmp_path):
    study = a_study(tmp_path / "a.sqlite")
    reader = study.store.reader("R")
    (case, *_) = study.cases
    body = json.dumps(
        {"reader": reader.id, "case": case, "answer": "real", "confidence": 1, "seconds": 1}
    ).encode()
    with serving(study) as port:
        path = f"/{study.store.token}/api/answer"
        # what a page elsewhere can send without the browser asking first
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert ask(port, path, body, Content_Type=kind)[0] == 415
        assert ask(port, path, body, method="GET")[0] == 404
        asked = ask(port, path, method="OPTIONS", Origin="http://evil.example")
        assert asked[0] == 405 and "access-control-allow-origin" not in asked[1]
        for bad in (b"no json", b"[1]", b'{"reader": "x"}', b"{}", b"x" * 20_000):
            assert ask(port, path, bad)[0] in (400, 409, 413)
        assert study.store.answers(reader) == []
        assert ask(port, path, body)[0] == 200
    assert len(study.store.answers(reader)) == 1


def test_a_reader_named_on_the_command_line_is_the_only_one(tmp_path):
    study = a_study(tmp_path / "a.sqlite", reader_name="Dr Fixed")
    with serving(study) as port:
        _, _, body = ask(port, f"/{study.store.token}/api/start", {"name": "Other"})
    assert json.loads(body)["name"] == "Dr Fixed"
    assert [r.name for r in study.store.readers()] == ["Dr Fixed"]


def test_a_taken_port_is_said():
    with server.listen(0) as place:
        with pytest.raises(ValueError, match="cannot be opened .* another --port"):
            server.listen(place.getsockname()[1])
    with pytest.raises(ValueError, match="port 99999 cannot be opened"):
        server.listen(99999)


# ---- the page's files


def test_the_viewer_is_the_published_file():
    folder = STATIC / "vendor"
    told = json.loads((folder / "SOURCE.json").read_text())
    viewer = (folder / told["file"]).read_bytes()
    assert hashlib.sha256(viewer).hexdigest() == told["sha256"]
    assert len(viewer) < 3e6 and len(gzip.compress(viewer)) < 1e6
    assert told["version"] in (folder / "LICENSES.txt").read_text()


def test_the_pages_own_files_name_no_other_place():
    for name in ("index.html", "study.css", "study.js", "planes.js"):
        text = (STATIC / name).read_text()
        assert not re.search(
            r"https?:|//\w+\.|@import|url\(|eval\(|<style|style=|onclick=", text
        ), name
