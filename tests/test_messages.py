"""Messages that compare a number with a limit print enough digits to tell the two apart."""

from __future__ import annotations

import math

import pytest

import tumorsynth as ts
from tumorsynth.appearance.tissue import Tissue, TissueRange
from tumorsynth.appearance.visibility import VISIBLE_FROM, faint_warning
from tumorsynth.arguments import format_beside
from tumorsynth.commands.progress import faint_note
from tumorsynth.placement import skip_reasons


@pytest.mark.parametrize(
    ("value", "limits", "spec", "text"),
    [
        (4.2, [5], ".1f", "4.2"),
        (4.98, [5], ".1f", "4.98"),
        (4.9999995, [5], ".1f", "4.9999995"),
        (5.0, [5], ".1f", "5.0"),
        (math.nextafter(5, 0), [5], ".1f", "4.999999999999999"),
        (1.0000001, (0, 1), ".6g", "1.0000001"),
        (-0.4, (0, 300), ".0f", "-0.4"),
        (300.2, (0, 300), ".0f", "300.2"),
        (0.4999, [0.5], ".0%", "49.99%"),
        (0.31, [0.5], ".0%", "31%"),
    ],
)
def test_messages_tell_a_value_from_the_limit_beside_it(value, limits, spec, text):
    assert format_beside(value, limits, spec) == text


def test_every_message_with_a_limit_tells_the_value_from_it():
    """Just below or above, where a few digits would print the limit itself."""
    low = VISIBLE_FROM - 1e-3
    assert "got 4.999;" in faint_warning(low, 8.0)
    assert "got 4.2;" in faint_warning(4.2, 8.0)
    assert "got 3.1 to 4.999)" in faint_note([{"visibility": 3.1}, {"visibility": low}], 2)
    assert "visibility 4.999, less than 5" in skip_reasons.faint(low, VISIBLE_FROM, 8.0, 20)
    assert "of 5 mm or more in the organ; largest that fits: 4.99 mm" in skip_reasons.no_room(
        5, 4.99
    )
    both = skip_reasons.no_room(5.004, 5.001)
    assert "of 5.004 mm or more" in both and both.endswith("5.0 mm")
    gate = ts.Gate(noise_ratio=(0.5, 2))
    assert gate.objection({"noise_ratio": 2.0001}).startswith("noise_ratio 2.0001 is not within")
    tissue = TissueRange((30, 200), (-50, 300), (-200, 500))
    words = tissue.objection(Tissue(29.8, -50.3, 300.4), "x")
    assert "got median 29.8 HU, most of it -50.3 to 300.4 HU" in words
