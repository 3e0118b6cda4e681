"""benchmarks/realism/blind_sheet.py and blind_score.py: nothing betrays the truth; known scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from livers import write_livers
from PIL import Image

pytest.importorskip("benchmarks.realism.blind_sheet", reason="needs the benchmarks")

from benchmarks.realism import blind_score, blind_sheet
from benchmarks.realism.scans import Scan

NAMES = ("anna_pv", "bert_pv", "carl_pv")


def make_sheet(scans, out, seed=1, *more):
    pages, keys = out / "pages", out / "keys"
    arguments = [str(scans), "-o", str(pages), "--key", str(keys), "--generator", "hu2023"]
    arguments += ["--annotations", str(out), "--cases", "8", "--seed", str(seed), *more]
    blind_sheet.main(arguments)
    return pages, json.loads((keys / "key.json").read_text())


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_livers(tmp_path_factory.mktemp("scans"), NAMES)


@pytest.fixture(scope="module")
def sheet(scans, tmp_path_factory):
    return make_sheet(scans, tmp_path_factory.mktemp("sheet"))


def test_half_of_the_cases_are_real_and_of_several_patients(sheet):
    _, key = sheet
    cases = list(key["cases"].values())
    real = [case for case in cases if case["truth"] == "real"]
    assert len(cases) == 8 and len(real) == 4
    assert {case["patient"] for case in real} == {"anna", "bert", "carl"}
    scans_of_real = {case["scan"] for case in real}
    for case in cases:
        assert case["diameter_mm"] == pytest.approx(14, rel=0.3)
        assert case["contrast_hu"] == pytest.approx(-40, abs=8)
        assert case["scan"] in scans_of_real


def test_the_readers_folder_holds_pages_and_a_template_alone(sheet):
    pages, key = sheet
    names = sorted(path.name for path in pages.iterdir())
    assert names == ["answers.csv", *(f"case_{k:02d}.png" for k in range(1, 9))]
    lines = (pages / "answers.csv").read_text().splitlines()
    assert lines[0] == "case,answer,confidence"
    assert lines[1:] == [f"{name},," for name in key["cases"]]


def test_no_page_names_its_case(sheet):
    pages, _ = sheet
    sizes = set()
    for path in pages.glob("*.png"):
        raw = path.read_bytes()
        for word in (*NAMES, "anna", "hu2023", "real", "synthetic", str(pages)):
            assert word.encode() not in raw
        with Image.open(path) as page:
            assert page.info == {} and page.mode == "L"
            sizes.add(page.size)
    assert len(sizes) == 1


def test_the_order_depends_on_the_seed_and_on_nothing_else(scans, sheet, tmp_path):
    pages, key = sheet
    again, same = make_sheet(scans, tmp_path / "a")
    assert same["cases"] == key["cases"]
    for path in pages.glob("*.png"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    orders = {tuple(case["truth"] for case in key["cases"].values())}
    for seed in (2, 3):
        if len(orders) > 1:
            break
        _, other = make_sheet(scans, tmp_path / str(seed), seed)
        orders.add(tuple(case["truth"] for case in other["cases"].values()))
    assert len(orders) > 1


def ball_scan(directions=("L", "P", "S")):
    rng = torch.Generator().manual_seed(0)
    hu = 100 + 10 * torch.randn(130, 130, 20, generator=rng)
    label = torch.ones(hu.shape, dtype=torch.int16)
    return Scan("a", hu, label, (1.0, 1.0, 5.0), directions)


def ball(scan, centre=(65, 65, 10), radius=8.0):
    grid = np.stack(np.indices(scan.hu.shape), -1) * np.array(scan.spacing)
    return np.linalg.norm(grid - np.array(centre) * scan.spacing, axis=-1) < radius


def test_a_page_depends_on_the_voxels_and_the_outline_alone():
    """The same voxels under either truth give the same page, byte for byte."""
    scan = ball_scan()
    one = blind_sheet.page_of(scan, scan.hu.numpy(), ball(scan), np.random.default_rng(4))
    two = blind_sheet.page_of(scan, scan.hu.numpy(), ball(scan), np.random.default_rng(4))
    assert one.tobytes() == two.tobytes()
    moved = blind_sheet.page_of(scan, scan.hu.numpy(), ball(scan), np.random.default_rng(5))
    assert one.tobytes() != moved.tobytes()


def test_the_ticks_point_at_the_tumour_wherever_the_field_is():
    scan = ball_scan()
    mask = ball(scan, (60, 72, 10))
    hu = np.where(mask, 0.0, 100.0)
    for seed in range(4):
        page = blind_sheet.page_of(scan, hu, mask, np.random.default_rng(seed))
        grey = np.asarray(page)
        side = grey.shape[1] // 3
        tile = grey[:side, side : 2 * side]
        frame = blind_sheet.FRAME
        dark = np.argwhere(tile[frame:-frame, frame:-frame] < 120) + frame
        across = np.flatnonzero(tile[frame // 2] == 200).mean()
        down = np.flatnonzero(tile[:, frame // 2] == 200).mean()
        assert dark[:, 1].mean() == pytest.approx(across, abs=2)
        assert dark[:, 0].mean() == pytest.approx(down, abs=2)


def test_a_scan_in_another_orientation_gives_the_same_page():
    scan = ball_scan()
    mask, hu = ball(scan, (60, 70, 9)), scan.hu.numpy()
    turned = ball_scan(("R", "A", "I"))
    one = blind_sheet.page_of(scan, hu, mask, np.random.default_rng(0))
    two = blind_sheet.page_of(
        turned, np.flip(hu).copy(), np.flip(mask).copy(), np.random.default_rng(0)
    )
    difference = np.asarray(one).astype(int) - np.asarray(two).astype(int)
    assert abs(difference).max() <= 1


def test_patients_that_the_generator_learned_from_are_left_out(scans, tmp_path):
    _, key = make_sheet(scans, tmp_path, 1, "--trained-on", "hu2023=anna")
    assert {case["patient"] for case in key["cases"].values()} == {"bert", "carl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "7"], "even number"),
        (["--key", "PAGES/keys"], "must not lie"),
        (["-o", "REPOSITORY"], "outside of the repository"),
        (["-o", "FULL"], "must be empty"),
        (["--cases", "40"], "20 real tumours, got 6"),
    ],
)
def test_what_cannot_be_is_refused(scans, tmp_path, capsys, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "case_01.png").touch()
    places = {"FULL": tmp_path / "full", "REPOSITORY": blind_sheet.HERE / "pages"}
    options = [str(places.get(word, word)) for word in options]
    options = [word.replace("PAGES", str(tmp_path / "pages")) for word in options]
    arguments = [str(scans), "-o", str(tmp_path / "pages"), "--key", str(tmp_path / "keys")]
    arguments += ["--generator", "hu2023", "--annotations", str(tmp_path), *options]
    with pytest.raises(SystemExit) as stopped:
        blind_sheet.main(arguments)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "pages").exists()


# -- the scorer -----------------------------------------------------------------------------------


def write_key(folder, truths, **about):
    cases = {
        f"{k:02d}": {
            "truth": truth,
            "patient": "anna" if k <= 4 else "bert",
            "diameter_mm": 8.0 if k % 2 else 25.0,
            "contrast_hu": -30.0 if k <= 6 else 4.0,
        }
        for k, truth in enumerate(truths, 1)
    }
    key = {"environment": {}, "generator": {"name": "x"}, "seed": 0, "cases": cases}
    (folder / "key.json").write_text(json.dumps(key))
    return folder / "key.json"


def write_answers(path, answers, confidence=""):
    lines = [f"{k:02d},{answer},{confidence}" for k, answer in enumerate(answers, 1)]
    path.write_text("\n".join(["case,answer,confidence", *lines]) + "\n")
    return path


TRUTHS = ["synthetic"] * 5 + ["real"] * 5


def test_known_answers_give_known_figures(tmp_path, capsys):
    key = write_key(tmp_path, TRUTHS)
    answers = ["synthetic"] * 3 + ["real"] * 2 + ["real"] * 4 + ["synthetic"]
    path = write_answers(tmp_path / "reader.csv", answers)
    found = blind_score.main([str(key), str(path)])["readers"]["reader"]
    accuracy = found["all"]["accuracy"]
    assert (accuracy["right"], accuracy["count"], accuracy["value"]) == (7, 10, 0.7)
    assert accuracy["low"] == pytest.approx(0.397, abs=0.001)  # Wilson's, by hand
    assert accuracy["high"] == pytest.approx(0.892, abs=0.001)
    assert found["all"]["sensitivity"]["right"] == 3 and found["all"]["specificity"]["right"] == 4
    assert found["all"]["p_against_guessing"] == pytest.approx(0.3438, abs=1e-4)  # 2 x 176 / 1024
    assert found["patient"]["anna"]["accuracy"]["right"] == 3
    assert found["patient"]["anna"]["specificity"] is None  # none of theirs is real
    assert found["size"]["0 to 10 mm"]["accuracy"]["count"] == 5
    assert found["contrast"]["within 10 HU"]["accuracy"]["count"] == 4
    assert "| reader, all | 7 of 10: 0.70 (0.40 to 0.89) |" in capsys.readouterr().out


def test_all_right_and_all_the_same(tmp_path):
    key = write_key(tmp_path, TRUTHS)
    right = write_answers(tmp_path / "right.csv", TRUTHS, 5)
    same = write_answers(tmp_path / "same.csv", ["real"] * 10)
    found = blind_score.main([str(key), str(right), str(same)])["readers"]
    assert found["right"]["all"]["accuracy"]["value"] == 1.0
    assert found["right"]["all"]["auc_of_confidence"] == 1.0
    assert found["right"]["all"]["p_against_guessing"] == pytest.approx(2 / 1024, abs=1e-4)
    assert found["same"]["all"]["accuracy"]["value"] == 0.5
    assert found["same"]["all"]["sensitivity"]["value"] == 0.0
    assert found["together"]["all"]["accuracy"]["count"] == 20
    assert "p_against_guessing" not in found["together"]["all"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,answer\n01,real\n", "lacks answers to the cases 02"),
        ("case,answer\n01,real\n01,real\n", "answered twice"),
        ("case,answer\n01,real\n99,real\n", "not in the key"),
        ("case,answer\n01,maybe\n", "must be real or synthetic, got 'maybe'"),
        ("case,answer,confidence\n01,real,6\n", "1 to 5, got 6"),
        ("number,truth\n01,real\n", "must have the columns"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(tmp_path, text, message):
    key = write_key(tmp_path, TRUTHS)
    path = tmp_path / "reader.csv"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        blind_score.main([str(key), str(path)])


def test_the_results_hold_no_case(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.HERE", tmp_path)
    key = write_key(tmp_path, TRUTHS)
    path = write_answers(tmp_path / "reader.csv", TRUTHS)
    blind_score.main([str(key), str(path), "-o", "blind_sheet", "--reader", "a model"])
    written = json.loads((tmp_path / "results" / "blind_sheet.json").read_text())
    assert written["real"] == 5 and written["reader"] == "a model"
    assert str(tmp_path) not in json.dumps(written)


def test_a_sheet_can_be_read_and_scored(sheet, tmp_path):
    pages, key = sheet
    answers = [case["truth"] for case in key["cases"].values()]
    path = write_answers(tmp_path / "all.csv", answers)
    found = blind_score.main([str(pages.parent / "keys" / "key.json"), str(path)])
    assert found["readers"]["all"]["all"]["accuracy"]["value"] == 1.0
