"""A real browser for the tests of pages: an installed chromium, driven by playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = """
--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --use-gl=angle --use-angle=swiftshader
--enable-unsafe-swiftshader
""".split()
WAIT_MS = 120_000  # a busy machine is slow, not wrong


@contextlib.contextmanager
def open_page() -> Iterator[Any]:
    """Yield a page of a browser; skip where none is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test")
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"needs a browser, none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found[0], args=FLAGS, timeout=WAIT_MS)
        page = browser.new_page(viewport={"width": 900, "height": 600})
        page.set_default_timeout(WAIT_MS)
        yield page
        browser.close()


def picture(page: Any) -> dict[str, float]:
    """Mean and hash of the pixels of the page's NiiVue viewer, drawn anew."""
    return page.evaluate("""() => {
        nv.drawScene();
        const gl = nv.gl, w = gl.drawingBufferWidth, h = gl.drawingBufferHeight;
        const pixels = new Uint8Array(4 * w * h);
        gl.readPixels(0, 0, w, h, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
        let sum = 0, hash = 0, coloured = 0;
        for (let k = 0; k < pixels.length; k += 4) {
            sum += pixels[k];
            hash = (31 * hash + pixels[k]) | 0;
            if (pixels[k] > pixels[k + 1] + 60) coloured += 1;
        }
        return { mean: sum / (w * h), hash, coloured };
    }""")
