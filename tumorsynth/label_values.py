"""Label values: how far from a whole number a value may lie and still be a rounded label.

A label that was saved with a CT's int16 header is quantised: 2 may come back as 1.99997. In a map
that was interpolated, most voxels on an edge lie further from a whole number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of values whose file is unknown. The step of an int16 header is smaller up to label 1310, and a
# map that interpolation left this close to whole numbers everywhere lost nothing by it.
ROUNDING = 0.01


def round_labels(values: NDArray[Any], rounding: float = ROUNDING) -> NDArray[Any]:
    """Return a label map rounded to whole numbers.

    Args:
        values: the map, floating point, of any shape.
        rounding: how far from a whole number a value may lie.

    Raises:
        ValueError: if a value lies further away or is not finite; its text is that value.
    """
    whole = np.rint(values)
    with np.errstate(invalid="ignore"):  # infinity minus itself
        wrong = ~(np.abs(values - whole) <= rounding)
    if wrong.any():
        raise ValueError(describe_fraction(float(values[wrong][0])))
    return whole


def describe_fraction(value: float) -> str:
    """Format a number in as few digits as show that it is not whole: 0.98, but 0.99998."""
    texts = [f"{value:.{digits}g}" for digits in (2, 4, 6, 9, 17)]
    error = abs(value - float(np.rint(value))) / 4
    return next((text for text in texts if abs(float(text) - value) < error), texts[-1])
