"""One picture of a whole folder: a tile for each scan, cut from its preview."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.scans.outputs import output_paths
from tumorsynth.scans.preview import COLUMNS, MAX_TUMORS, PLANES, panel_box, require_matplotlib

SHOWN = ("before", "after", "outline")  # of the axial plane through the largest tumour
PANEL_PIXELS = ((24, 200), (100, 140), (400, 100), (math.inf, 64))  # up to so many scans
ASPECT = 1.6  # of the sheet, across over down
GAP = 6
INK, QUIET, PAPER = "#d8d8d8", "#8f979e", "#101010"


def write_contact_sheet(path: Path, out: Path, names: Sequence[str]) -> None:
    """Write a PNG with a tile for each scan: before, after, outline, and what the report says.

    Args:
        path: the PNG.
        out: the folder of the results.
        names: of the scans, in the order of the tiles. One without results gets an empty tile.
    """
    require_matplotlib()
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    panel = next(pixels for count, pixels in PANEL_PIXELS if len(names) <= count)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    size = max(9, panel // 13)
    font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), size)
    bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), size)
    width, height = len(SHOWN) * panel, panel + 3 * size
    columns = max(1, round(math.sqrt(len(names) * ASPECT * height / width)))
    columns = min(columns, max(1, len(names)))
    rows = math.ceil(len(names) / columns)
    across, down = width + 2 * GAP, height + 2 * GAP
    sheet = Image.new("RGB", (columns * across, max(1, rows) * down), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, name in enumerate(names):
        x, y = k % columns * across + GAP, k // columns * down + GAP
        records, preview = _results(out, name)
        if preview is not None:
            _paste(sheet, preview, _largest(records), (x, y), panel)
        else:
            draw.rectangle((x, y, x + width - 1, y + panel - 1), outline="#343b43")
        for line, words, ink, kind in (
            (0, _printable(name), INK, bold),
            (1, _summary(records) if preview is not None else "no result", QUIET, font),
        ):
            place = x + 2, y + panel + 2 + line * round(1.35 * size)
            draw.text(place, _cut(draw, words, kind, width - 4), fill=ink, font=kind)
    write_atomic(path, lambda file: sheet.save(file, format="PNG"))


def _results(out: Path, name: str) -> tuple[list[dict[str, Any]], Path | None]:
    """The records and the preview of a scan; no preview if it is not finished."""
    paths = output_paths(out, name)
    try:
        records = json.loads(paths["report"].read_text(encoding="utf-8"))["tumors"]
    except (OSError, ValueError, KeyError, TypeError):
        return [], None
    return records, paths["preview"] if paths["preview"].is_file() else None


def _largest(records: Sequence[dict[str, Any]]) -> int:
    """The number of the largest tumour among those of the preview."""
    placed = [record for record in records if record.get("applied", True)][:MAX_TUMORS]
    sizes = [record.get("diameter_mm") or 0 for record in placed]
    return sizes.index(max(sizes)) if sizes else 0


def _paste(sheet: Any, preview: Path, tumor: int, at: tuple[int, int], panel: int) -> None:
    from PIL import Image

    with Image.open(preview) as picture:
        for k, name in enumerate(SHOWN):
            box = panel_box(tumor, [plane[0] for plane in PLANES].index("axial"),
                            COLUMNS.index(name))  # fmt: skip
            part = picture.crop(box).convert("RGB").resize((panel, panel), Image.Resampling.LANCZOS)
            sheet.paste(part, (at[0] + k * panel, at[1]))


def _summary(records: Sequence[dict[str, Any]]) -> str:
    placed = [record for record in records if record.get("applied", True)]
    if not placed:
        reasons = [str(record.get("reason")) for record in records]
        return "; ".join(["no tumour", *dict.fromkeys(reasons)])
    sizes = [record.get("diameter_mm") or 0 for record in placed]
    largest = placed[sizes.index(max(sizes))]
    words = f"{len(placed)} tumour{'s' if len(placed) > 1 else ''}, {max(sizes):.1f} mm"
    change = largest.get("hu_change")
    return words if change is None else f"{words}, {change:+.0f} HU"


def _printable(words: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in words)


def _cut(draw: Any, words: str, font: Any, width: int) -> str:
    words = _printable(words)
    if draw.textlength(words, font=font) <= width:
        return words
    while words and draw.textlength(f"{words}…", font=font) > width:
        words = words[:-1]
    return f"{words}…"
