"""Intensity scales, against the transforms that make them."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tumorsynth.intensity import HU, Intensity, Scaled, ZScore

HU_VALUES = torch.linspace(-1024, 3071, 501)


def test_hu_is_itself():
    assert HU().to_hu(HU_VALUES) is HU_VALUES
    assert HU().hu_per_unit == 1 and HU().limits is None


ranges = st.tuples(
    st.floats(-2000, 2000), st.floats(1, 4000), st.floats(-10, 10), st.floats(0.1, 300)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ranges)
def test_scaled_undoes_monais_formula(values):
    a_min, a_span, b_min, b_span = values
    scale = Scaled(a_min, a_min + a_span, b_min, b_min + b_span)
    hu = torch.linspace(a_min, a_min + a_span, 101, dtype=torch.float64)
    image = (hu - a_min) / (scale.a_max - a_min) * (scale.b_max - b_min) + b_min
    assert torch.allclose(scale.to_hu(image), hu, atol=1e-6 * a_span + 1e-6)
    # a change of one unit is a change of hu_per_unit HU, anywhere
    step = scale.to_hu(image + 1) - scale.to_hu(image)
    assert torch.allclose(step, torch.full_like(step, scale.hu_per_unit))
    assert scale.limits == (scale.b_min, scale.b_max)


def test_scaled_undoes_monais_transform():
    transforms = pytest.importorskip("monai.transforms")
    image = transforms.ScaleIntensityRange(-175, 250, 0, 1, clip=True)(HU_VALUES[None])[0]
    scale = Scaled(-175, 250, 0, 1)
    back = scale.to_hu(torch.as_tensor(image))
    np.testing.assert_allclose(back, HU_VALUES.clamp(-175, 250), atol=1e-3)
    assert scale.limits == (0, 1)
    assert Scaled(-175, 250, 0, 1, clip=False).limits is None
    assert Scaled() == scale


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-500, 500), st.floats(0.5, 500), st.floats(-1000, 0), st.floats(1, 3000))
def test_zscore_undoes_nnunets_normalisation(mean, std, low, high):
    scale = ZScore(mean, std, low, high)
    hu = HU_VALUES.double()
    image = (hu.clamp(low, high) - mean) / max(std, 1e-8)  # nnU-Net's CTNormalization
    assert torch.allclose(scale.to_hu(image), hu.clamp(low, high), atol=1e-6)
    assert scale.hu_per_unit == std
    assert scale.limits == pytest.approx((float(image.min()), float(image.max())), abs=1e-6)


def test_zscore_with_open_ends():
    assert ZScore(0, 1).limits is None
    assert ZScore(10, 2, low=0).limits == (-5, math.inf)
    assert ZScore(10, 2, high=20).limits == (-math.inf, 5)


@pytest.mark.parametrize(
    "values",
    [(250, -175, 0, 1), (0, 0, 0, 1), (-175, 250, 1, 0), (-175, 250, 1, 1),
     (math.nan, 250, 0, 1), (-175, math.inf, 0, 1), (-175, 250, 0, math.nan)],
)  # fmt: skip
def test_scaled_refuses_ranges_that_cannot_be(values):
    with pytest.raises(ValueError, match="Scaled needs finite a_min < a_max"):
        Scaled(*values)


@pytest.mark.parametrize(
    "values",
    [(0, 0), (0, -1), (math.nan, 1), (0, math.nan), (math.inf, 1), (0, math.inf),
     (0, 1, 5, 5), (0, 1, 6, 5), (0, 1, math.nan, 5), (0, 1, 5, math.nan), (0, 1, math.nan, None),
     (0, 1, None, math.nan), (0, 1, math.inf, None)],
)  # fmt: skip
def test_zscore_refuses_values_that_cannot_be(values):
    with pytest.raises(ValueError, match="ZScore needs"):
        ZScore(*values)


@pytest.mark.parametrize("scale", [HU(), Scaled(), ZScore(100, 40, -150, 300)])
def test_scales_are_frozen_pickle_and_keep_dtype(scale):
    assert isinstance(scale, Intensity)
    assert pickle.loads(pickle.dumps(scale)) == scale and hash(scale) == hash(scale)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert scale.to_hu(torch.ones(2, dtype=dtype)).dtype == dtype
    field = next(iter(vars(scale)), "value")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(scale, field, 3)
