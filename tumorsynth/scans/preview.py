"""Draw a preview: three planes through each tumour, before and after.

Radiological convention: the patient's right is on the left of the picture, anterior is up in axial
planes and left in sagittal ones. Panels are in mm, so that anisotropic voxels keep their true
shape. Nothing here uses pyplot, so it works in threads and leaves the caller's figures alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tumorsynth.atomic_writes import write_atomic
from tumorsynth.geometry import frame_from_affine

PANEL, GAP, HEADER, MARGIN = 2.3, 0.05, 0.32, 0.3  # inches
DPI = 100
MAX_TUMORS = 8  # drawn of one scan
COLUMNS = ("whole slice", "before", "after", "difference", "outline")
# name, axis across, axis down (of R, A, S), letters at the left, right, top and bottom
PLANES = (("axial", 0, 1, "RLAP"), ("coronal", 0, 2, "RLSI"), ("sagittal", 1, 2, "APSI"))
INK, PAPER, OUTLINE = "#d8d8d8", "#101010", "#ffd23f"

# HU shown as black and as white
SOFT_TISSUE_WINDOW, LUNG_WINDOW = (-100.0, 200.0), (-1150.0, 150.0)
MAX_LUNG_HU = -300.0
# Of the difference panels. Black is no change: it shows a faint halo that white would hide.
DIFFERENCE_COLOURS = ("#9be8ff", "#1585e0", "#000000", "#e0561b", "#ffe08a")
MIN_DIFFERENCE_HU = 20.0  # their scale covers at least this


def _to_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reorder the axes of a volume to R, A, S."""
    frame = frame_from_affine(affine)
    flips = tuple(slice(None, None, -1 if flip else 1) for flip in frame.flips)
    return array.transpose(frame.axes)[flips]


def _centre_to_ras(
    centre: Sequence[float], shape: Sequence[int], affine: np.ndarray
) -> tuple[int, ...]:
    frame = frame_from_affine(affine)
    axes = zip(frame.axes, frame.flips, strict=True)
    along = [(int(round(centre[axis])), shape[axis], flip) for axis, flip in axes]
    return tuple(int(np.clip(n - 1 - c if flip else c, 0, n - 1)) for c, n, flip in along)


def _plane(volume: np.ndarray, number: int, centre: Sequence[int]) -> np.ndarray:
    """Cut one plane from a RAS volume: rows from A or S down, columns from R or A."""
    x, y, z = centre
    plane = (volume[:, :, z], volume[:, y, :], volume[x, :, :])[number]
    return plane[::-1, ::-1].T


def render(
    before: np.ndarray,
    after: np.ndarray,
    tumor: np.ndarray,
    affine: np.ndarray,
    tumors: Sequence[Mapping[str, Any]],
    *,
    window: tuple[float, float] | None = None,
    zoom_mm: float = 90.0,
    title: str = "",
    max_tumors: int = MAX_TUMORS,
) -> Any:
    """Draw the preview. Without a tumour it shows the middle of the scan.

    Args:
        before: (X, Y, Z) HU.
        after: (X, Y, Z) HU.
        tumor: (X, Y, Z) bool, the new tumour voxels, for the outline.
        affine: (4, 4), voxel to mm (RAS).
        tumors: records of a report. Those with ``applied`` False are left out; the others need
            ``centre_voxel`` and may have ``diameter_mm`` and ``hu_change``.
        window: HU shown as black and as white; by default a lung window if the tumours replace
            lung, else a soft tissue window.
        zoom_mm: side of the magnified square; larger for a tumour that does not fit.
        title: of the picture.
        max_tumors: the most tumours to draw; the title says if there are more.

    Returns:
        A matplotlib Figure.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tumorsynth.scans.bare_axes import BareAxes

    if window is None:
        window = choose_window(before, tumor)
    placed = [t for t in tumors if t.get("applied", True)]
    shown: list[Mapping[str, Any]] = list(placed[:max_tumors])
    if len(placed) > len(shown):
        title = f"{title}  (the first {len(shown)} of {len(placed)} tumours)".strip()
    captions = [_caption(i, t) for i, t in enumerate(shown)]
    if not shown:
        shown = [{"centre_voxel": [n // 2 for n in before.shape]}]
        captions = ["no tumour"]

    width = MARGIN + len(COLUMNS) * (PANEL + GAP)
    group = HEADER + 3 * (PANEL + GAP)
    height = 2 * HEADER + len(shown) * group
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)

    orientation = frame_from_affine(affine)
    spacing = np.array(orientation.spacing)[list(orientation.axes)]
    old, new, mask = (_to_ras(v, affine) for v in (before, after, tumor))
    # all difference panels share one scale, so that they can be compared
    change = np.abs(after[tumor] - before[tumor]) if tumor.any() else np.zeros(1)
    span = float(max(MIN_DIFFERENCE_HU, 10 * np.ceil(np.nanpercentile(change, 99) / 10)))

    def text(x: float, y: float, words: str, **style: Any) -> None:
        # a file name may hold characters that no font has, or that would start a formula
        words = "".join(c if c.isprintable() else "?" for c in words)
        figure.text(x / width, 1 - y / height, words, color=INK, parse_math=False, **style)

    text(MARGIN, 0.6 * HEADER, title, fontsize=10, va="center", weight="bold")
    for column, name in enumerate(COLUMNS):
        if name == "difference":
            name = f"difference, ±{span:.0f} HU"
        middle = MARGIN + column * (PANEL + GAP) + PANEL / 2
        text(middle, 1.6 * HEADER, name, fontsize=8.5, va="center", ha="center")

    for i, (tumor_record, caption) in enumerate(zip(shown, captions, strict=True)):
        top = 2 * HEADER + i * group
        text(MARGIN, top + HEADER / 2, caption, fontsize=9, va="center")
        centre = _centre_to_ras(tumor_record["centre_voxel"], before.shape, affine)
        side = max(zoom_mm, 1.6 * float(tumor_record.get("diameter_mm") or 0))
        for number, (plane, across, down, letters) in enumerate(PLANES):
            row = top + HEADER + number * (PANEL + GAP)
            text(MARGIN / 2, row + PANEL / 2, plane, fontsize=8.5, va="center", ha="center",
                 rotation=90)  # fmt: skip
            pictures = [_plane(v, number, centre) for v in (old, new, mask)]
            voxel = spacing[across], spacing[down]
            shape = old.shape[across], old.shape[down]
            # a picture's columns and rows run against its axes, see _plane
            frame = [
                _zoom(n - 1 - centre[axis], n, mm, side)
                for axis, n, mm in zip((across, down), shape, voxel, strict=True)
            ]
            for column, name in enumerate(COLUMNS):
                left = MARGIN + column * (PANEL + GAP)
                place = (left / width, 1 - (row + PANEL) / height, PANEL / width, PANEL / height)
                axes = figure.add_axes(place, axes_class=BareAxes, facecolor="black")
                if name == "whole slice":
                    whole = [(0.0, n * mm) for n, mm in zip(shape, voxel, strict=True)]
                    _panel(axes, name, pictures, voxel, whole, window, span)
                    _box(axes, frame)
                    _letters(axes, letters)
                else:
                    _panel(axes, name, pictures, voxel, frame, window, span)
                if name == "before":
                    _ruler(axes)
                if name == "difference" and number == 0:
                    _colour_bar(axes, span)
    return figure


def panel_box(tumor: int, plane: int, column: int) -> tuple[int, int, int, int]:
    """Return where a panel lies in the saved picture: left, top, right, bottom in pixels.

    Args:
        tumor: number of the tumour, from 0.
        plane: number of the row, see PLANES.
        column: see COLUMNS.
    """
    left = MARGIN + column * (PANEL + GAP)
    top = 2 * HEADER + tumor * (HEADER + 3 * (PANEL + GAP)) + HEADER + plane * (PANEL + GAP)
    a, b, c, d = (round(v * DPI) for v in (left, top, left + PANEL, top + PANEL))
    return a, b, c, d


def choose_window(before: np.ndarray, tumor: np.ndarray) -> tuple[float, float]:
    """Return a lung window if the tumours replace lung, else a soft tissue window, in HU."""
    replaced = before[tumor]
    in_lung = replaced.size > 0 and float(np.median(replaced)) < MAX_LUNG_HU
    return LUNG_WINDOW if in_lung else SOFT_TISSUE_WINDOW


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib; install it with: pip install 'tumorsynth[viz]'"
        ) from error


def save_preview(path: Path, *args: Any, **kwargs: Any) -> None:
    """Draw the preview with `render` and write it as PNG, completely or not at all."""
    from PIL import Image

    figure = render(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box replaces it
        figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    # Further compression takes thrice the time and makes noise no smaller.
    style: dict[str, Any] = {"format": "PNG", "compress_level": 1, "dpi": (DPI, DPI)}
    write_atomic(path, lambda file: picture.save(file, **style))


def _caption(index: int, record: Mapping[str, Any]) -> str:
    words = [f"tumour {index + 1}"]
    if record.get("diameter_mm") is not None:
        words.append(f"{record['diameter_mm']:.1f} mm")
    if record.get("hu_change") is not None:
        words.append(f"{record['hu_change']:+.0f} HU")
    if record.get("visibility") is not None:
        words.append(f"visibility {record['visibility']:.1f}")
    words.append("voxel " + ", ".join(str(int(round(c))) for c in record["centre_voxel"]))
    return "   ".join(words)


def _zoom(index: int, count: int, mm: float, side: float) -> tuple[float, float]:
    """The interval of ``side`` mm around a voxel, moved into the scan if it fits."""
    size = count * mm
    low = (index + 0.5) * mm - side / 2
    low = min(max(low, 0.0), size - side) if side <= size else (size - side) / 2
    return low, low + side


@cache
def _difference_map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("difference", DIFFERENCE_COLOURS)


def _panel(
    axes: Any,
    name: str,
    pictures: Sequence[np.ndarray],
    voxel: tuple[float, float],
    frame: Sequence[tuple[float, float]],
    window: tuple[float, float],
    span: float,
) -> None:
    """Draw what lies in the frame: ((left, right), (top, bottom)) in mm."""
    from matplotlib.collections import LineCollection

    rows, columns = pictures[0].shape
    cut = [
        (max(0, int(low // mm)), min(n, int(np.ceil(high / mm))))
        for (low, high), mm, n in zip(frame, voxel, (columns, rows), strict=True)
    ]
    (c0, c1), (r0, r1) = cut
    before, after, mask = (picture[r0:r1, c0:c1] for picture in pictures)
    extent = (c0 * voxel[0], c1 * voxel[0], r1 * voxel[1], r0 * voxel[1])
    style = {"extent": extent, "aspect": "equal", "interpolation": "antialiased"}
    if name == "difference":
        with np.errstate(invalid="ignore"):  # inf - inf
            change = after - before
        axes.imshow(change, cmap=_difference_map(), vmin=-span, vmax=span, **style)
    else:
        picture = before if name == "before" else after
        axes.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1], **style)
    if name == "outline":
        edges = _edges(mask) * voxel + (extent[0], extent[3])
        axes.add_collection(LineCollection(list(edges), colors=OUTLINE, linewidths=0.9))
    axes.set_xlim(*frame[0])
    axes.set_ylim(*frame[1][::-1])


def _edges(mask: np.ndarray) -> np.ndarray:
    """The voxel sides between mask and background, (N, 2, 2): (column, row) of both ends."""
    ring = np.pad(mask, 1)
    row, column = np.nonzero(ring[:-1] != ring[1:])
    across = np.stack([np.stack([column - 1, row], -1), np.stack([column, row], -1)], 1)
    row, column = np.nonzero(ring[:, :-1] != ring[:, 1:])
    down = np.stack([np.stack([column, row - 1], -1), np.stack([column, row], -1)], 1)
    return np.concatenate([across, down]).astype(float)


def _box(axes: Any, frame: Sequence[tuple[float, float]]) -> None:
    from matplotlib.patches import Rectangle

    (left, right), (top, bottom) = frame
    style: dict[str, Any] = {"fill": False, "edgecolor": OUTLINE, "linewidth": 0.8}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _write(axes: Any, x: float, y: float, words: str, **style: Any) -> None:
    """Write into a panel, at a position from 0 to 1."""
    from matplotlib.patheffects import withStroke

    around = [withStroke(linewidth=1.5, foreground="black")]  # legible on bone and on air
    axes.text(x, y, words, color=INK, path_effects=around, transform=axes.transAxes, **style)


def _letters(axes: Any, letters: str) -> None:
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    sides = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (ha, va) in zip(letters, places, sides, strict=True):
        _write(axes, x, y, letter, fontsize=7.5, ha=ha, va=va)


def _ruler(axes: Any) -> None:
    """Draw a bar of 20 mm in the lower left corner."""
    left, right = axes.get_xlim()
    length = 20 / (right - left)
    for width, colour in ((3.0, "black"), (1.5, INK)):
        axes.plot([0.05, 0.05 + length], [0.05, 0.05], color=colour, linewidth=width,
                  transform=axes.transAxes)  # fmt: skip
    _write(axes, 0.05, 0.065, "20 mm", fontsize=6.5, va="bottom")
    axes.set_xlim(left, right)


def _colour_bar(axes: Any, span: float) -> None:
    """Draw the HU scale of the differences along the right side, within the panel."""
    from matplotlib.patches import Rectangle

    inset = axes.inset_axes((0.93, 0.2, 0.03, 0.6), axes_class=type(axes))
    steps = np.linspace(-span, span, _difference_map().N + 1)
    inset.pcolormesh((0.0, 1.0), steps, (steps[1:, None] + steps[:-1, None]) / 2,
                     cmap=_difference_map(), vmin=-span, vmax=span)  # fmt: skip
    inset.set_ylim(-span, span)
    outline: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.5, "clip_on": False}
    inset.add_patch(Rectangle((0.0, -span), 1.0, 2 * span, fill=False, **outline))
    for share, words in ((0.2, f"-{span:.0f}"), (0.5, "0 HU"), (0.8, f"+{span:.0f}")):
        _write(axes, 0.91, share, words, fontsize=6.5, ha="right", va="center")
