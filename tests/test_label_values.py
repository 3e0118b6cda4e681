"""Which values count as whole numbers, and how a fraction is written."""

from __future__ import annotations

import numpy as np
import pytest

from tumorsynth.label_values import describe_fraction, round_labels


@pytest.mark.parametrize(
    "value", [0.98, 0.99998, 1.99997, 0.5, 1234.98, 100000.5, 1 - 1e-12, 1e6 + 0.25]
)
def test_a_fraction_is_written_with_the_digits_that_show_it(value):
    text = describe_fraction(value)
    assert float(text) != round(value)
    assert float(text) == pytest.approx(value, abs=0.01)


def test_what_is_not_finite_is_named():
    assert (describe_fraction(np.nan), describe_fraction(np.inf)) == ("nan", "inf")


def test_rounding_is_allowed_up_to_the_limit_alone():
    values = np.array([0.0, 0.99998, 2.009, -0.004])
    assert round_labels(values).tolist() == [0, 1, 2, 0]
    for wrong in (0.5, 0.98, np.nan, np.inf):
        with pytest.raises(ValueError, match=describe_fraction(wrong)):
            round_labels(np.array([1.0, wrong]))
    assert round_labels(np.array([1.2]), rounding=0.25).tolist() == [1]
