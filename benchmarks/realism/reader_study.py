"""A whole reader study in a headless browser, answered by a rule: does the tool work end to end?

    python -m benchmarks.realism.reader_study CT LABEL --tumor-label 2 --organ-label 1

Real cases are the lesions of an annotated scan, synthetic ones are put into the same scan. The two
"readers" call a lesion synthetic where the HU around its mark vary much, at two thresholds, so the
table shows what the tool makes of answers, and nothing about what people see. In the middle the
server is killed and started again. Needs an installed chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.common import write

FLAGS = """
--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --use-gl=angle --use-angle=swiftshader
--enable-unsafe-swiftshader
""".split()
COMMAND = [sys.executable, "-m", "tumorsynth.commands.main"]
SYNTHETIC = 99  # label value
THRESHOLDS_HU = {"rule, 17 HU": 17.0, "rule, 20 HU": 20.0}
SPREAD = """() => {  // standard deviation of HU within 4 mm of the mark, along the axes
    const volume = nv.volumes[0], dims = volume.dims, mark = cases[current].mark;
    const reach = [1, 2, 3].map((k) => Math.max(1, Math.round(4 / volume.pixDims[k])));
    const values = [];
    for (let z = -reach[2]; z <= reach[2]; z++)
        for (let y = -reach[1]; y <= reach[1]; y++)
            for (let x = -reach[0]; x <= reach[0]; x++) {
                const at = [mark[0] + x, mark[1] + y, mark[2] + z];
                if (at.every((v, k) => v >= 0 && v < dims[k + 1]))
                    values.push(volume.img[at[0] + dims[1] * (at[1] + dims[2] * at[2])]);
            }
    const mean = values.reduce((a, b) => a + b) / values.length;
    return Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
}"""


class Server:
    """`tumorsynth reader-study serve` in a process of its own."""

    def __init__(self, options: list[str]):
        self.command = [*COMMAND, "reader-study", "serve", *options]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        print(self.process.stdout.readline().strip())
        self.url = self.process.stdout.readline().split()[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def read(page: Page, server: Server, name: str, threshold: float, *, kill: bool) -> None:
    """All cases by keyboard, as one reader."""
    page.goto(server.url)
    page.evaluate("sessionStorage.clear()")
    page.goto(server.url)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#view[aria-busy=false]")
    count = page.evaluate("cases.length")
    for k in range(count):
        page.wait_for_selector("#view[aria-busy=false]")
        page.keyboard.press("ArrowUp")
        off = page.evaluate(SPREAD) - threshold
        page.keyboard.press("s" if off > 0 else "r")
        page.keyboard.press(str(min(5, 1 + int(abs(off)))))
        if kill and k == count // 2:
            server.kill()
            page.keyboard.press("Enter")
            page.wait_for_selector("#alarm:not([hidden])")
            server.start()
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#answered:text-is('{k + 1} answered')")
    page.click("#finish")
    page.click("#finish-yes")
    page.wait_for_selector("#done:not([hidden])")
    print(page.inner_text("#table"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path)
    parser.add_argument("label", type=Path)
    parser.add_argument("--tumor-label", type=int, default=2)
    parser.add_argument("--organ-label", type=int, default=1)
    parser.add_argument("--count", type=int, default=7, help="synthetic tumours")
    parser.add_argument("--size-mm", type=float, nargs=2, default=(9, 28))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "real").mkdir()
        for kind, path in (("ct", given.ct), ("label", given.label)):
            (folder / "real" / f"scan_{kind}.nii.gz").symlink_to(path.resolve())
        made = f"--organ-label {given.organ_label} --tumor-label {SYNTHETIC} --count {given.count}"
        made += f" --size-mm {given.size_mm[0]} {given.size_mm[1]} --seed 5"
        scan = [folder / "real" / f"scan_{kind}.nii.gz" for kind in ("ct", "label")]
        synthetic = folder / "synthetic"
        subprocess.run([*COMMAND, "synthesize", *scan, "-o", synthetic, *made.split()], check=True)
        db = folder / "answers.sqlite"
        options = f"--real {folder}/real --synthetic {synthetic} --db {db} --port 8797"
        options += f" --lesions each --field-mm 60 --tumor-label {given.tumor_label}"
        server = Server([*options.split(), "--synthetic-tumor-label", str(SYNTHETIC)])
        browser_path = shutil.which("chromium") or shutil.which("google-chrome")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
            page = browser.new_page(viewport={"width": 1000, "height": 640})
            page.set_default_timeout(200_000)
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            for k, (reader, threshold) in enumerate(THRESHOLDS_HU.items()):
                read(page, server, reader, threshold, kill=k == 0)
            browser.close()
        server.kill()
        elsewhere = [url for url in asked if not url.startswith((server.url, "data:"))]
        out = folder / "results.json"
        subprocess.run([*COMMAND, "reader-study", "results", db, "--json", out], check=True)
        results: dict[str, Any] = json.loads(out.read_text())
    write(
        "reader_study",
        {
            "readers": "rules on the spread of HU around the mark; not people",
            "scan": given.ct.name,
            "synthetic": made,
            "requests": len(asked),
            "requests_elsewhere": len(elsewhere),
            **results,
        },
    )


if __name__ == "__main__":
    main()
