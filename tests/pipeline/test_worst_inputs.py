"""Bounded time: smaller inputs of benchmarks/reliability/worst_inputs.py, each against a clock."""

from __future__ import annotations

import pytest

worst_inputs = pytest.importorskip(
    "benchmarks.reliability.worst_inputs", reason="needs the benchmarks beside the tests"
)
SECONDS = 20  # of CPU time; most take a tenth of one
SLOW = ("100 tumours of 20 mm", "noise, a prior's sizes", "a gate that nothing passes, 100 tries")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in worst_inputs.CASES],
)
def test_every_call_ends_soon(name):
    found = worst_inputs.call(name, 32)
    assert found["cpu_s"] < SECONDS, found
