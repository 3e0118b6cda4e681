"""The pictures of a training: captions over the right columns, columns that stay aligned."""

from __future__ import annotations

import pytest
import torch
from balls import make_cases

from tumorsynth.training import realism
from tumorsynth.training.captions import GLYPHS, render_text, text_width
from tumorsynth.training.pictures import CAPTION_HEIGHT, PLANES, mosaic
from tumorsynth.training.realism import REAL_VIEWS, SYNTHETIC_VIEWS, TILE_MM, real_tumors


def test_every_glyph_is_its_own_and_unknown_letters_are_named():
    drawn = {letter: tuple(map(tuple, glyph.tolist())) for letter, glyph in GLYPHS.items()}
    assert len(set(drawn.values())) == len(drawn) == 26 + 3
    line = render_text("scan, axial", scale=2)
    assert line.shape == (2 * 9, 2 * text_width("scan, axial"))
    assert torch.equal(line[::2, ::2], render_text("scan, axial"))
    with pytest.raises(ValueError, match=r"no glyph for \['X'\]"):
        render_text("X")


def test_captions_stand_over_their_tiles_which_stay_as_they_are():
    narrow, wide = torch.full((8, 20), 0.5), torch.full((10, 30), 0.25)
    rows = [[[narrow, narrow], [wide]], [[wide, narrow], [narrow]]]
    plain = mosaic(rows, 3)
    captions = [("axial", ("scan", "mask")), ("", ("crop",))]
    titled = mosaic(rows, 3, captions)
    band = titled.shape[0] - plain.shape[0]
    assert band == 2 * CAPTION_HEIGHT * 2  # two lines at twice the size
    assert torch.equal(titled[band:], plain)
    scale = 2
    lefts = [0, 3 * (30 + 2), 3 * (30 + 2 + 20 + 6)]  # the widest tile of each column decides
    for left, caption in zip(lefts, ("scan", "mask", "crop"), strict=True):
        text = render_text(caption, scale)
        line = titled[band - CAPTION_HEIGHT * scale :, left : left + text.shape[1]]
        assert torch.equal(line[2 * scale : 2 * scale + text.shape[0]], text)
    assert torch.equal(titled[2 * scale : 11 * scale, : 30 * scale], render_text("axial", scale))


def test_a_caption_wider_than_its_tile_widens_the_column():
    picture = mosaic(
        [[[torch.ones(8, 8), torch.ones(8, 8)]]], 1, [("", ("reconstruction", "scan"))]
    )
    assert picture.shape[1] == text_width("reconstruction") + 2 + text_width("scan") + 6


def test_real_tumours_stay_in_their_columns_where_synthetic_ones_run_out(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(realism, "write_grid", lambda path, rows, captions: written.update(
        rows=rows, captions=captions
    ))  # fmt: skip
    (case, _) = make_cases()
    real = real_tumors(case, [1], 2)
    realism._write_pictures(tmp_path / "a.png", real[:1], real, 60.0)
    titles = [f"{kind}, {p}" for kind in ("synthetic tumour", "real tumour") for p in PLANES]
    assert written["captions"] == [
        (title, SYNTHETIC_VIEWS if title.startswith("synthetic") else REAL_VIEWS)
        for title in titles
    ]
    first, second = written["rows"]
    black = torch.zeros(TILE_MM, TILE_MM)
    for group, (_, views) in enumerate(written["captions"]):
        assert len(first[group]) == len(second[group]) == len(views)
        empty = all(torch.equal(tile, black) for tile in second[group])
        assert empty == (group < 3)
    realism._write_pictures(tmp_path / "a.png", [], real, 60.0)
    assert [title for title, _ in written["captions"]] == titles[3:]
