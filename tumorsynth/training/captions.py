"""Captions for pictures, as pixels: a machine that trains may have torch and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 9  # pixels; the lowest two rows hold descenders
ADVANCE = GLYPH_WIDTH + 1  # pixels from one letter to the next

_GLYPHS = {
    "abcdefghijklmn": """
..... #.... ..... ....# ..... ..##. ..... #.... ..#.. ...#. #.... .##.. ..... .....
..... #.... ..... ....# ..... .#... ..... #.... ..... ..... #.... ..#.. ..... .....
.###. #.##. .###. .##.# .###. ####. .#### #.##. .##.. ..##. #..#. ..#.. ##.#. #.##.
....# ##..# #.... #..## #...# .#... #...# ##..# ..#.. ...#. #.#.. ..#.. #.#.# ##..#
.#### #...# #.... #...# ##### .#... #...# #...# ..#.. ...#. ##... ..#.. #.#.# #...#
#...# ##..# #.... #..## #.... .#... #...# #...# ..#.. ...#. #.#.. ..#.. #.#.# #...#
.#### #.##. .###. .##.# .###. .#... .#### #...# .###. ...#. #..#. .###. #.#.# #...#
..... ..... ..... ..... ..... ..... ....# ..... ..... #..#. ..... ..... ..... .....
..... ..... ..... ..... ..... ..... .###. ..... ..... .##.. ..... ..... ..... .....
""",
    "opqrstuvwxyz4,": """
..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... ..... ...#. .....
..... ..... ..... ..... ..... .#... ..... ..... ..... ..... ..... ..... ..##. .....
.###. #.##. .##.# #.##. .#### ####. #...# #...# #...# #...# #...# ##### .#.#. .....
#...# ##..# #..## ##..# #.... .#... #...# #...# #...# .#.#. #...# ...#. #..#. .....
#...# #...# #...# #.... .###. .#... #...# #...# #.#.# ..#.. #...# ..#.. ##### .....
#...# ##..# #..## #.... ....# .#..# #..## .#.#. #.#.# .#.#. #...# .#... ...#. .##..
.###. #.##. .##.# #.... ####. ..##. .##.# ..#.. .#.#. #...# .#### ##### ...#. .##..
..... #.... ....# ..... ..... ..... ..... ..... ..... ..... ....# ..... ..... ..#..
..... #.... ....# ..... ..... ..... ..... ..... ..... ..... .###. ..... ..... .#...
""",
}


def _read_glyphs() -> dict[str, Tensor]:
    glyphs = {" ": torch.zeros(GLYPH_HEIGHT, GLYPH_WIDTH)}
    for letters, drawing in _GLYPHS.items():
        rows = [row.split() for row in drawing.strip().splitlines()]
        for k, letter in enumerate(letters):
            glyphs[letter] = torch.tensor([[float(p == "#") for p in row[k]] for row in rows])
    return glyphs


GLYPHS = _read_glyphs()


def text_width(text: str) -> int:
    """Return the width in pixels of `render_text` at scale 1."""
    return ADVANCE * len(text)


def render_text(text: str, scale: int = 1) -> Tensor:
    """Render one line of text, white on black.

    Args:
        text: lower-case letters a to z, the digit 4, spaces and commas.
        scale: whole factor of the letters' size.

    Returns:
        (9 * scale, 6 * scale * len(text)) float, 0 or 1.

    Raises:
        ValueError: for a letter without a glyph.
    """
    unknown = sorted(set(text) - GLYPHS.keys())
    if unknown:
        raise ValueError(f"no glyph for {unknown} in the caption {text!r}; add it to _GLYPHS")
    line = torch.zeros(GLYPH_HEIGHT, text_width(text))
    for k, letter in enumerate(text):
        line[:, k * ADVANCE : k * ADVANCE + GLYPH_WIDTH] = GLYPHS[letter]
    return line.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
