"""A whole reader study in a real browser: keys and mouse, a killed server, the table at the end."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="needs the extra reader-study")
pytest.importorskip("uvicorn", reason="needs the extra reader-study")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test")

from browser import WAIT_MS, open_page, picture  # noqa: E402

from tumorsynth.commands.main import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COUNT = 4
SHAPE = (24, 28, 20)


@pytest.fixture(scope="module")
def page():
    with open_page() as page:
        yield page


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        folder = tmp_path / ("real" if k % 2 else "synthetic")
        folder.mkdir(exist_ok=True)
        hu = rng.normal(60, 20, SHAPE).round().astype(np.int16)
        label = np.zeros(SHAPE, np.uint8)
        at = tuple(slice(c - 3, c + 4) for c in rng.integers(6, 14, 3))
        label[at], hu[at] = 2, hu[at] - 60
        for kind, values in (("ct", hu), ("label", label)):
            image = nibabel.Nifti1Image(values, np.diag([2, 2, 3, 1]))
            nibabel.save(image, folder / f"{k}_{kind}.nii.gz")
    return tmp_path


@contextlib.contextmanager
def serving(folder: Path, port: int):
    """The command, in a process of its own; killed without mercy at the end."""
    words = "reader-study serve --real real --synthetic synthetic --port".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "tumorsynth.commands.main", *words, str(port)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{COUNT} cases; answers go to answers.sqlite\n"
        yield process.stdout.readline().removeprefix("open ").strip()
    finally:
        process.kill()
        process.wait()


def a_free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def opened(page, case: int) -> None:
    page.wait_for_selector(f"#case-title:text-is('Case {case} of {COUNT}')")
    page.wait_for_selector("#view[aria-busy=false]")


def place(page) -> list[int]:
    """Slices at the cross: axial, coronal, sagittal."""
    return [
        int(part.split()[1].partition("/")[0]) for part in page.inner_text("#place").split("·")[:3]
    ]


def hu_at_the_cross(page) -> int:
    return int(page.inner_text("#place").split("·")[3].split()[0])


def test_a_study_from_the_first_case_to_the_table(page, folders, capsys):
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    port = a_free_port()

    with serving(folders, port) as url:
        page.goto(url)
        page.fill("#name", "Dr One")
        page.keyboard.press("Enter")
        opened(page, 1)

        # the viewer: a picture, at the lesion, and it follows wheel, keys and presets
        start = place(page)
        first = picture(page)
        assert first["mean"] > 20
        assert hu_at_the_cross(page) < 50  # HU: the lesion is 60 darker than its surroundings
        box = page.locator("#canvas").bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
        before = page.inner_text("#place")
        page.mouse.wheel(0, 120)
        playwright.expect(page.locator("#place")).not_to_have_text(before, timeout=WAIT_MS)
        wheeled = place(page)
        assert wheeled[0] != start[0] and wheeled[1:] == start[1:]
        page.keyboard.press("ArrowUp")
        page.keyboard.press("PageUp")
        assert place(page)[0] == min(wheeled[0] + 6, SHAPE[2])
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.2 * box["height"])
        page.keyboard.press("ArrowDown")  # the coronal plane is there
        assert place(page)[1:] == [start[1] - 1, start[2]]
        page.keyboard.press("Space")
        assert place(page) == start
        page.keyboard.press("u")
        assert page.inner_text("#window-text") == "W 1500 · L -600 HU"
        assert picture(page)["mean"] > first["mean"]
        page.keyboard.press("a")
        assert picture(page)["hash"] == first["hash"]
        page.keyboard.press("h")
        assert page.locator("#help").is_visible()
        page.keyboard.press("Escape")

        # two answers by keyboard; an incomplete one is not taken
        page.keyboard.press("r")
        page.keyboard.press("Enter")
        assert "Choose 1 to 5" in page.inner_text("#note")
        page.keyboard.press("4")
        page.keyboard.press("Enter")
        opened(page, 2)
        page.keyboard.press("s")
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        opened(page, 3)
        shown = page.evaluate("cases.map(c => c.id)")

    # the server is killed: the page says so, and what it said was saved is there again
    page.keyboard.press("r")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#alarm:not([hidden])")
    assert "does not answer" in page.inner_text("#alarm")

    with serving(folders, port) as again:
        assert again == url
        page.keyboard.press("Enter")  # the same step again
        opened(page, 4)
        page.reload()
        opened(page, 4)
        assert page.inner_text("#answered") == "3 answered"
        assert page.evaluate("cases.map(c => c.id)") == shown
        assert page.evaluate("cases.map(c => c.answer)") == ["real", "synthetic", "real", None]
        assert page.locator("#finish").is_hidden()

        # the mouse does what the keys do; an earlier answer is changed
        page.click("#cases button:nth-child(1)")
        opened(page, 1)
        page.click("[data-answer=synthetic]")
        page.click("#confidence button:nth-child(5)")
        page.click("#save")
        opened(page, 4)
        page.click("[data-answer=real]")
        page.click("#confidence button:nth-child(3)")
        page.click("#save")
        page.click("#finish")
        page.click("#finish-yes")
        page.wait_for_selector("#done:not([hidden])")
        cells = page.locator("#table td").all_inner_texts()
        page.reload()
        page.wait_for_selector("#done:not([hidden])")

    out = folders / "results.json"
    assert (
        main(["reader-study", "results", str(folders / "answers.sqlite"), "--json", str(out)]) == 0
    )
    figures = json.loads(out.read_text())["rows"][0]
    assert figures["accuracy"]["count"] == COUNT and figures["seconds"] > 0
    assert cells[:2] == ["Dr One", str(COUNT)]
    assert all(cell in capsys.readouterr().out for cell in cells[2:3])
    assert cells[4].startswith(f"{100 * figures['accuracy']['value']:.1f} (")

    assert len([u for u in asked if u.endswith(".nii")]) >= COUNT
    assert all(u.startswith((url, "data:")) for u in asked), asked
    problems = [w for w in said if "ERR_CONNECTION" not in w and "GL Driver Message" not in w]
    assert problems == []
