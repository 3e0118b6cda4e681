"""The picture shows the right planes, the right way round, in true proportions."""

from __future__ import annotations

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from tumorsynth.scans.preview import COLUMNS, render, save_preview

pytest.importorskip("matplotlib")

RAS = np.diag([1.0, 1.0, 1.0, 1.0])
ORIENTATIONS = {
    "RAS": np.diag([1.0, 1.0, 1.0, 1.0]),
    "LPS": np.diag([-1.0, -1.0, 1.0, 1.0]),
    "SAR": np.array([[0, 0, 1.0, 5], [0, 1.0, 0, 2], [1.0, 0, 0, 3], [0, 0, 0, 1]]),
    "PIR, oblique": np.array(
        [[0.1, 0.1, 0.97, 0], [-0.98, 0.1, 0.1, 0], [0.1, -0.96, 0.1, 0], [0, 0, 0, 1]]
    ),
}


def patient(shape=(40, 44, 36)):
    """A RAS volume, 0 HU, with a bright block each in the right, the anterior and the top."""
    volume = np.zeros(shape, np.float32)
    volume[-6:-2, 20:24, 16:20] = 500  # right
    volume[18:22, -6:-2, 16:20] = 500  # anterior
    volume[18:22, 20:24, -6:-2] = 500  # superior
    return volume


def from_ras(volume, affine):
    """The same patient in the array order and direction of another affine."""
    towards, directions = nib.io_orientation(affine).astype(int).T  # one of each per array axis
    array_axis = np.argsort(towards)
    out = volume[tuple(slice(None, None, directions[a]) for a in array_axis)]
    return out.transpose(towards)


def drawn(figure):
    """Pictures by plane and column: the arrays shown, and their axes."""
    rows = {}
    for number, axes in enumerate(figure.axes):
        plane = ("axial", "coronal", "sagittal")[number // len(COLUMNS) % 3]
        rows[plane, COLUMNS[number % len(COLUMNS)]] = axes
    return rows


def picture(axes):
    return np.asarray(axes.images[0].get_array())


def bright(array):
    """Where the bright blocks lie: sides of the picture."""
    rows, columns = array.shape
    sides = set()
    for r, c in np.argwhere(array > 100):
        vertical = "top" if r < rows / 4 else "bottom" if r > 3 * rows / 4 else ""
        horizontal = "left" if c < columns / 4 else "right" if c > 3 * columns / 4 else ""
        sides.add(vertical + horizontal)
    return sides


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_radiological_convention_from_any_orientation(name):
    affine = ORIENTATIONS[name]
    volume = from_ras(patient(), affine)
    where = np.zeros((40, 44, 36), bool)
    where[20, 22, 18] = True
    centre = np.argwhere(from_ras(where, affine))[0]
    figure = render(
        volume, volume, np.zeros(volume.shape, bool), affine, [{"centre_voxel": centre}]
    )
    panels = drawn(figure)
    # right of the patient on the left; anterior on top (axial) or on the left (sagittal)
    assert bright(picture(panels["axial", "whole slice"])) == {"left", "top"}
    assert bright(picture(panels["coronal", "whole slice"])) == {"left", "top"}
    assert bright(picture(panels["sagittal", "whole slice"])) == {"left", "top"}
    shapes = {p: picture(panels[p, "whole slice"]).shape for p in ("axial", "coronal", "sagittal")}
    assert shapes == {"axial": (44, 40), "coronal": (36, 40), "sagittal": (36, 44)}


def test_anisotropic_voxels_keep_their_proportions():
    volume = np.zeros((50, 60, 20), np.float32)
    affine = np.diag([0.8, 0.7, 4.0, 1.0])
    tumors = [{"centre_voxel": (25, 30, 10), "diameter_mm": 10.0}]
    panels = drawn(render(volume, volume, volume > 0, affine, tumors, zoom_mm=30))
    sizes = {"axial": (40, 42), "coronal": (40, 80), "sagittal": (42, 80)}
    for plane, (across, down) in sizes.items():
        left, right, bottom, top = panels[plane, "whole slice"].images[0].get_extent()
        assert (right - left, bottom - top) == pytest.approx((across, down))
        for column in COLUMNS[1:]:
            axes = panels[plane, column]
            assert axes.get_aspect() == 1
            assert np.ptp(axes.get_xlim()) == pytest.approx(30)
            assert np.ptp(axes.get_ylim()) == pytest.approx(30)


@pytest.mark.parametrize("centre", [(0, 0, 0), (49, 59, 19), (25, 30, 10)])
def test_zoom_stays_inside_the_scan_and_holds_the_tumour(centre):
    volume = np.zeros((50, 60, 20), np.float32)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    tumor = np.zeros(volume.shape, bool)
    tumor[centre] = True
    panels = drawn(render(volume, volume, tumor, affine, [{"centre_voxel": centre}], zoom_mm=24))
    for plane, (columns, rows) in {
        "axial": (50, 60),
        "coronal": (50, 60),
        "sagittal": (60, 60),
    }.items():
        axes = panels[plane, "outline"]
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert 0 <= left < right <= columns and 0 <= top < bottom <= rows
        edges = np.concatenate(axes.collections[0].get_segments())
        # the outline of one voxel: its own four sides, in mm, inside the frame
        size = np.ptp(edges, axis=0)
        assert tuple(size) == ((1, 1) if plane == "axial" else (1, 3))
        assert (edges >= (left, top)).all() and (edges <= (right, bottom)).all()


def test_before_after_and_difference_are_what_they_say():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, (30, 30, 30)).astype(np.float32)
    tumor = np.zeros(before.shape, bool)
    tumor[12:18, 12:18, 12:18] = True
    after = before - 50 * tumor
    tumors = [{"centre_voxel": (15, 15, 15), "diameter_mm": 6.0, "hu_change": -50.0}]
    figure = render(before, after, tumor, RAS, tumors, zoom_mm=30, window=(-20, 90))
    panels = drawn(figure)
    np.testing.assert_array_equal(picture(panels["axial", "before"]), before[::-1, ::-1, 15].T)
    np.testing.assert_array_equal(picture(panels["coronal", "after"]), after[::-1, 15, ::-1].T)
    change = picture(panels["sagittal", "difference"])
    np.testing.assert_allclose(change, (after - before)[15, ::-1, ::-1].T)
    assert panels["axial", "before"].images[0].get_clim() == (-20, 90)
    assert panels["axial", "difference"].images[0].get_clim() == (-50, 50)
    words = [t.get_text() for t in figure.texts]
    assert any("tumour 1" in w and "6.0 mm" in w and "-50 HU" in w for w in words)


def test_the_difference_has_a_colour_bar():
    before = np.zeros((30, 30, 30), np.float32)
    tumor = np.zeros(before.shape, bool)
    tumor[12:18, 12:18, 12:18] = True
    figure = render(before, before - 50 * tumor, tumor, RAS, [{"centre_voxel": (15, 15, 15)}])
    panel = drawn(figure)["axial", "difference"]
    (bar,) = panel.child_axes
    assert bar.get_ylim() == panel.images[0].get_clim() == (-50, 50)
    (colours,) = [c for c in bar.collections if c.get_array() is not None]
    hu = np.linspace(-50, 50, 9)
    assert (colours.to_rgba(hu) == panel.images[0].to_rgba(hu)).all()
    assert [t.get_text() for t in panel.texts] == ["-50", "0 HU", "+50"]


def test_bare_axes_show_what_matplotlibs_own_show(monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.axis import Tick

    class OwnAxes(Axes):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.set_axis_off()

    volume = patient()
    tumor = np.zeros(volume.shape, bool)
    tumor[18:24, 20:26, 16:20] = True
    shown = volume, volume - 50 * tumor, tumor, np.diag([0.8, 0.7, 4.0, 1.0])

    ticks = []
    make_tick = Tick.__init__

    def counted(self, *args, **kwargs):
        ticks.append(self)
        make_tick(self, *args, **kwargs)

    def pixels():
        figure = render(*shown, [{"centre_voxel": (21, 23, 18)}])
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())

    monkeypatch.setattr(Tick, "__init__", counted)
    bare = pixels()
    ticks_of_bare = len(ticks)  # not none: some versions of matplotlib ask where they are
    ticks.clear()
    monkeypatch.setattr("tumorsynth.scans.bare_axes.BareAxes", OwnAxes)
    assert (bare == pixels()).all() and ticks_of_bare <= len(ticks) / 2


def test_skipped_tumours_are_left_out_and_too_many_are_said():
    volume = np.zeros((20, 20, 20), np.float32)
    placed = [{"applied": True, "centre_voxel": (5, 5, 5)} for _ in range(4)]
    skipped = {"applied": False, "reason": "too thin"}
    figure = render(volume, volume, volume > 0, RAS, [skipped, *placed], title="x", max_tumors=3)
    assert len(figure.axes) == 3 * 3 * len(COLUMNS)
    assert "first 3 of 4" in figure.texts[0].get_text()


def test_without_a_tumour_the_middle_is_shown():
    volume = patient()
    figure = render(volume, volume, volume > 1e9, RAS, [{"applied": False, "reason": "no organ"}])
    assert len(figure.axes) == 3 * len(COLUMNS)
    assert any(t.get_text() == "no tumour" for t in figure.texts)


def test_file_is_a_png_and_equal_runs_give_equal_files(tmp_path):
    volume = patient()
    volume[3, 3, 3], volume[4, 4, 4] = np.nan, np.inf
    tumor = np.zeros(volume.shape, bool)
    tumor[20:24, 20:24, 18:20] = True
    tumors = [{"centre_voxel": (21, 21, 18)}]
    for name in ("a.png", "b.png"):
        save_preview(tmp_path / name, volume, volume - 30 * tumor, tumor, RAS, tumors)
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data == (tmp_path / "b.png").read_bytes()


def test_pyplot_is_not_touched(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; "
        "from tumorsynth.scans.preview import save_preview; v = np.zeros((9, 9, 9), 'float32'); "
        f"save_preview(Path({str(tmp_path / 'a.png')!r}), v, v, v > 0, np.eye(4), []); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.png").is_file()
