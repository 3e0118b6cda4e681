"""The page before and after, opened from the disk in a real browser."""

from __future__ import annotations

import base64
import gzip
import json

import numpy as np
import pytest

nib = pytest.importorskip("nibabel", reason="needs the extra io")

from browser import WAIT_MS, open_page, picture  # noqa: E402
from test_cli import refused, run, scan, synthesize, write  # noqa: E402

from tumorsynth.scans import view  # noqa: E402
from tumorsynth.scans.view import save_view, write_view_page  # noqa: E402

NAMES = ("a b", "ä#1%")
OBLIQUE = np.array(
    [[-1.47, 0.2, 0, 80], [-0.2, -1.57, 0.3, 60], [0.05, 0.3, 2.48, -400], [0, 0, 0, 1]]
)
REPORT = {"generator": {"name": "hu2023"}, "seed": 1, "tumorsynth": "0", "tumors": []}


@pytest.fixture(scope="module")
def page():
    with open_page() as page:
        yield page


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    for k, name in enumerate(NAMES):
        write(folder / "in", name, *scan(k), affine=OBLIQUE)
    done = synthesize(folder / "in", "-o", folder / "out", "--html", "--contact-sheet",
                      "--count", 1, "--size-mm", 24, 26, "--contrast-hu", -60, -50)  # fmt: skip
    assert done == 0
    return folder / "out"


def content_of(out, name):
    script = (out / "view" / "scans" / f"{name}.js").read_text()
    return json.loads(script.removeprefix("tumorsynthScan(").removesuffix(");\n"))


def unzip(text):
    return gzip.decompress(base64.b64decode(text))


def test_the_scripts_hold_the_voxels_of_the_files(out):
    for name in NAMES:
        content = content_of(out, name)
        before = nib.Nifti1Image.from_bytes(unzip(content["nifti"]))
        assert nib.aff2axcodes(before.affine) == ("R", "A", "S")
        change, mask = (
            np.frombuffer(unzip(content[key]), dtype).reshape(before.shape, order="F")
            for key, dtype in (("change", np.int16), ("mask", np.uint8))
        )
        after = nib.as_closest_canonical(nib.load(out / f"{name}_ct.nii.gz"))
        label = nib.as_closest_canonical(nib.load(out / f"{name}_label.nii.gz"))
        np.testing.assert_allclose(before.affine, after.affine, atol=1e-4)
        shown = np.clip(after.dataobj, *view.HU_RANGE)
        np.testing.assert_array_equal(np.asarray(before.dataobj) + change, shown)
        np.testing.assert_array_equal(mask, np.asarray(label.dataobj) == 2)
        (tumor,) = content["tumors"]
        assert mask[tuple(tumor["at"])] == 1


def test_the_page_in_a_browser(page, out):
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.goto((out / "view.html").as_uri())
    page.wait_for_selector("#view[aria-busy=false]")
    assert page.inner_text("#title") == NAMES[0]
    report = json.loads((out / f"{NAMES[0]}_report.json").read_text())["tumors"][0]
    cells = page.locator("#tumors td").all_inner_texts()
    assert cells[1] == f"{report['diameter_mm']:.1f}" and cells[2] == f"{report['hu_change']:.0f}"

    # not blank; the outline is coloured, and goes
    shown = picture(page)
    assert shown["mean"] > 10 and shown["coloured"] > 40
    page.click("#outline")
    plain = picture(page)
    assert plain["coloured"] == 0 and plain["mean"] > 10
    page.keyboard.press("o")
    assert picture(page)["hash"] == shown["hash"]
    page.keyboard.press("o")

    # before and after, in the picture and in the value at the cross, which is in the tumour
    value = "Number(document.getElementById('place').textContent.split(' · ')[3].split(' ')[0])"
    after = page.evaluate(value)
    page.click("[data-after=false]")
    before = picture(page)
    assert before["hash"] != plain["hash"] and before["mean"] > plain["mean"]
    assert page.inner_text("#stamp") == "as it was"
    assert page.evaluate(value) > after + 20
    page.keyboard.press("b")
    assert picture(page)["hash"] == plain["hash"] and page.evaluate(value) == after

    # slices, windows, planes
    place = page.inner_text("#place")
    page.keyboard.press("ArrowUp")
    playwright_wait(page, place)
    page.click("#windows button:nth-child(3)")
    assert picture(page)["hash"] != plain["hash"]
    page.keyboard.press("x")
    page.keyboard.press("Space")

    # the other scan, whose name is no plain word
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        f"document.getElementById('title').textContent === {json.dumps(NAMES[1])}"
    )
    page.wait_for_selector("#view[aria-busy=false]")
    assert picture(page)["mean"] > 5
    assert all(url.startswith(("file://", "data:", "blob:")) for url in asked), asked
    assert [words for words in said if "GL Driver Message" not in words] == []

    # a folder that was taken away is named
    script = out / "view" / "scans" / f"{NAMES[0]}.js"
    moved = script.rename(script.with_suffix(".away"))
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#alarm:not([hidden])")
    assert "keep the folder" in page.inner_text("#alarm")
    moved.rename(script)

    # a page without its folder says so, and does not load for ever
    alone = out / "alone" / "view.html"
    alone.parent.mkdir()
    alone.write_bytes((out / "view.html").read_bytes())
    page.goto(alone.as_uri())
    assert 'folder "view" is missing' in page.inner_text("#alarm")
    assert page.is_visible("#alarm") and page.inner_text("#loading") == ""


def test_a_scan_without_a_tumour_does_not_claim_one(page, tmp_path):
    ct, label = write(tmp_path / "in", "a", *scan())
    assert synthesize(ct, label, "-o", tmp_path / "out", "--html", "--p", 0) == 0
    page.goto((tmp_path / "out" / "view.html").as_uri())
    page.wait_for_selector("#view[aria-busy=false]")
    assert page.inner_text("#stamp") == "no synthetic tumour"
    page.keyboard.press("b")
    assert page.inner_text("#stamp") == "as it was"


def playwright_wait(page, place):
    page.wait_for_function(
        f"document.getElementById('place').textContent !== {json.dumps(place)}", timeout=WAIT_MS
    )


def test_a_resumed_run_adds_the_scans_that_the_page_lacks(tmp_path, capsys):
    for k, name in enumerate("ab"):
        write(tmp_path / "in", name, *scan(k))
    words = (tmp_path / "in", "-o", tmp_path / "out")
    assert synthesize(*words) == 0
    before = (tmp_path / "out" / "a_ct.nii.gz").read_bytes()
    assert synthesize(*words, "--html", "--workers", 2) == 0
    assert (tmp_path / "out" / "a_ct.nii.gz").read_bytes() == before
    assert 'SCANS = ["a", "b"]' in (tmp_path / "out" / "view" / "scans.js").read_text()
    capsys.readouterr()
    assert synthesize(*words, "--html") == 0
    assert "2 of 2 scans are finished already" in capsys.readouterr().out


def test_pictures_can_be_added_to_one_scan_that_is_finished(tmp_path, capsys):
    ct, label = write(tmp_path / "in", "a", *scan())
    out = tmp_path / "out"
    words = (ct, label, "-o", out, "--count", 1)
    assert synthesize(*words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert synthesize(*words, "--contact-sheet") == 0  # of what is there
    assert "finished already" in capsys.readouterr().out and (out / "contact_sheet.png").exists()
    assert synthesize(*words, "--html") == 0  # processed once more
    assert 'SCANS = ["a"]' in (out / "view" / "scans.js").read_text()
    assert {name: (out / name).read_bytes() for name in before} == before
    line = refused(capsys, "synthesize", *words, "--generator", "hu2023", "--html", "--seed", 1)
    assert "made with" in line and "--overwrite" in line  # of another run
    assert "--overwrite" in refused(capsys, "synthesize", *words, "--generator", "hu2023")


def test_one_scan_can_have_its_page_beside_it(tmp_path):
    ct, label = write(tmp_path / "in", "a", *scan())
    moved = ct.rename(ct.with_name("a.nii.gz")), label.rename(label.with_name("mask.nii.gz"))
    assert synthesize(*moved, "-o", tmp_path / "in", "--html", "--count", 1) == 0
    assert (tmp_path / "in" / "view.html").exists()


def test_a_scan_that_failed_is_not_on_the_page_and_has_an_empty_tile(tmp_path):
    write(tmp_path / "in", "a", *scan())
    write(tmp_path / "in", "b", scan()[0], scan()[1][:-1])
    assert synthesize(tmp_path / "in", "-o", tmp_path / "out", "--html", "--contact-sheet") == 1
    assert 'SCANS = ["a"]' in (tmp_path / "out" / "view" / "scans.js").read_text()
    from PIL import Image

    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        tile = np.asarray(sheet.convert("L"), float)
    width, height = tile.shape[1], tile.shape[0] // 2
    assert (
        width == 3 * 200 + 12
        and tile[:190].std() > 30
        and tile[height + 20 : height + 180].max() < 80
    )


def test_one_scan_without_a_tumour_has_a_page_too(tmp_path):
    ct, label = write(tmp_path / "in", "a", *scan())
    assert synthesize(ct, label, "-o", tmp_path / "out", "--html", "--contact-sheet", "--p", 0) == 0
    content = content_of(tmp_path / "out", "a")
    assert content["tumors"] == [] and len(content["skipped"]) == 1
    assert not any(unzip(content["change"]))


def test_of_a_large_scan_the_part_around_its_tumours_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "MAX_VOXELS", 30 * 30 * 30)
    monkeypatch.setattr(view, "MARGIN_MM", 10.0)
    before = np.random.default_rng(0).normal(50, 20, (40, 44, 48)).astype(np.float32)
    before[5, 5, 5] = np.nan
    tumor = np.zeros(before.shape, bool)
    tumor[8:14, 30:36, 20:26] = True
    after = before - 50 * tumor
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    report = {**REPORT, "tumors": [{"centre_voxel": [11, 33, 23], "diameter_mm": 9.0}]}
    save_view(tmp_path, "a", before, after, tumor, affine, report)
    content = content_of(tmp_path, "a")
    image = nib.Nifti1Image.from_bytes(unzip(content["nifti"]))
    at = content["tumors"][0]["at"]
    np.testing.assert_allclose(image.affine @ [*at, 1], affine @ [11, 33, 23, 1], atol=1e-4)
    assert "the part around the tumours" in content["about"] and np.prod(image.shape) <= 30**3
    mask = np.frombuffer(unzip(content["mask"]), np.uint8)
    assert mask.sum() == tumor.sum()
    (tmp_path / "a_report.json").write_text("{}")
    assert '["a"]' in (write_view_page(tmp_path).parent / "view" / "scans.js").read_text()


def test_the_sheet_says_what_each_scan_got(tmp_path):
    from tumorsynth.scans.contact_sheet import write_contact_sheet

    write(tmp_path / "in", "a", *scan())
    assert synthesize(tmp_path / "in", "-o", tmp_path / "out") == 0
    for count, panel in ((1, 200), (25, 140), (101, 100), (401, 64)):
        names = ["a"] + ["without results"] * (count - 1)
        write_contact_sheet(tmp_path / "s.png", tmp_path / "out", names)
        from PIL import Image

        with Image.open(tmp_path / "s.png") as sheet:
            assert sheet.size[0] % (3 * panel + 12) == 0
            across, down = sheet.size
        assert count == 1 or 0.8 < across / down < 3


def test_help_names_the_options(capsys):
    assert run("synthesize", "--help") == 0
    told = capsys.readouterr().out
    assert "--html" in told and "--contact-sheet" in told
