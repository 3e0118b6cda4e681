"""Unusable input is refused with rule, value and fix: shapes, grids, types, bools as numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_crop, tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.gate import Gate
from tumorsynth.appearance.mass_effect import MassEffect
from tumorsynth.generators.handcrafted import HandcraftedConfig
from tumorsynth.pipeline.validation import check_params

SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": 8}


def scan(shape=(1, 24, 24, 24)):
    label = torch.ones(shape, dtype=torch.int16)
    return 100 + 10 * torch.randn(shape, generator=torch.Generator().manual_seed(0)), label


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((24, 24, 24), r"image\[None\]"),
        ((2, 24, 24, 24), r"2 scans, add the channel with image\[:, None\]; .* image\[:1\]"),
        ((1, 2, 24, 24, 24), r"the CT's channel alone, image\[:, :1\]"),
        ((24, 24), "pass the volume that the slice is of"),
        ((1, 24, 24), "pass the volume that the slice is of"),
        ((8, 1, 24, 24), "pass the volume that the slice is of"),
        ((1, 0, 24, 24), "look at the crop in front"),
    ],
)
def test_a_wrong_shape_gets_its_fix(shape, fix):
    image, label = scan(shape)
    with pytest.raises(ValueError, match=f"got {re.escape(str(shape))}; .*{fix}"):
        ts.SynthesizeTumor(**SETTINGS)(image, label)


@pytest.mark.parametrize("shape", [(24, 24, 24), (2, 24, 24, 24), (1, 2, 24, 24, 24)])
def test_the_fix_for_a_shape_works(shape):
    """Doing what the message says leads to a tumour."""
    image, label = scan(shape)
    fixed = {3: lambda x: x[None], 4: lambda x: x[:, None], 5: lambda x: x[:, :1]}[len(shape)]
    _, new = ts.SynthesizeTumor(**SETTINGS)(fixed(image), fixed(label), seed=0)
    assert (new == 2).any()


@pytest.mark.parametrize(
    ("image", "fix"),
    [
        ("ct.nii.gz", "load the file first"),
        (Path("ct.nii.gz"), "load the file first"),
        (("a.nii.gz", "b.nii.gz"), "load the file first"),
        (np.zeros((1, 24, 24, 24), np.float32), r"torch.as_tensor\(image\)"),
        ([[[[1.0]]]], r"torch.as_tensor\(np.asarray\(image\)\)"),
        ([torch.zeros(1, 24, 24, 24)] * 2, r"torch.stack\(image\)"),
        ({"image": 1}, "pass its entry of the image"),
        (None, "pass a tensor"),
    ],
    ids=["str", "Path", "paths", "array", "list", "list of tensors", "dict", "None"],
)
def test_other_types_than_tensors_get_their_fix(image, fix):
    with pytest.raises(TypeError, match=f"image must be a torch tensor, got .*; .*{fix}"):
        ts.SynthesizeTumor(**SETTINGS)(image, scan()[1])


YES = [True, np.True_, torch.tensor(True)]


@pytest.mark.parametrize("yes", YES, ids=["python", "numpy", "torch"])
@pytest.mark.parametrize(
    "name",
    ["p", "count", "size_mm", "sigma_mm", "gap_mm", "contrast_hu", "organ_labels", "tumor_label",
     "mass_effect"],
)  # fmt: skip
def test_a_bool_is_no_number(name, yes):
    with pytest.raises(ValueError, match=f"{name} must be"):
        ts.SynthesizeTumor(**{"generator": "hu2023", name: yes})


@pytest.mark.parametrize("name", ["count", "size_mm", "sigma_mm", "contrast_hu"])
def test_a_bool_is_no_end_of_a_range(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        ts.SynthesizeTumor(**{"generator": "hu2023", name: (True, 3)})


@pytest.mark.parametrize("yes", YES, ids=["python", "numpy", "torch"])
def test_a_bool_is_no_seed_spacing_or_intensity(yes):
    synth = ts.SynthesizeTumor(**SETTINGS)
    for rule, call in (
        ("seed must be", {"seed": yes}),
        ("seed must be", {"seed": [yes]}),
        ("spacing must be", {"spacing": yes}),
        ("spacing must be", {"spacing": (yes, yes, yes)}),
        ("affine must be", {"affine": np.eye(4, dtype=bool)}),
    ):
        with pytest.raises(ValueError, match=rule):
            synth(*scan(), **call)
    with pytest.raises(ValueError, match="Scaled needs"):
        ts.Scaled(-175, 250, 0, yes)
    with pytest.raises(ValueError, match="ZScore needs"):
        ts.ZScore(yes, 20)
    with pytest.raises(ValueError, match="ZScore needs"):
        ts.ZScore(100, 20, yes, 200)
    with pytest.raises(ValueError, match="mass_effect must be"):
        MassEffect(yes)
    with pytest.raises(ValueError, match="flatness must be"):
        Gate(flatness=(yes, yes))
    with pytest.raises(ValueError, match="seed must be"):
        ts.make_phantom(seed=yes)
    with pytest.raises(ValueError, match="spacing must be"):
        ts.make_phantom(spacing=(yes, yes, yes))
    with pytest.raises(ValueError, match="capsule_probability must be"):
        HandcraftedConfig(capsule_probability=yes)
    crop, mask = tiny_crop()
    for generator in (ts.load_generator("hu2023"), tiny_generator()):
        for contrast in (yes, [yes]):
            with pytest.raises(ValueError, match="contrast_hu must be"):
                generator.change(crop, mask, seed=0, contrast_hu=contrast)


@pytest.mark.parametrize(
    ("bad", "fix"),
    [
        ({"p": 2}, "pass p=1"),
        ({"p": "half"}, "pass p=1"),
        ({"count": -1}, r"pass count=1, count=\(1, 3\)"),
        ({"count": 1.5}, r"pass count=1, count=\(1, 3\)"),
        ({"size_mm": (20, 5)}, r"pass for example size_mm=\(5, 20\)"),
        ({"size_mm": 0}, r"pass for example size_mm=\(5, 20\)"),
        ({"sigma_mm": 90}, r"pass for example sigma_mm=\(0.5, 1.5\)"),
        ({"gap_mm": -1}, "pass gap_mm="),
    ],
)
def test_the_fix_for_an_argument_works(bad, fix):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {re.escape(repr(value))}; {fix}"):
        ts.SynthesizeTumor(generator="hu2023", **bad)


def test_integers_of_numpy_are_accepted():
    synth = ts.SynthesizeTumor(
        **{**SETTINGS, "count": (np.int64(1), np.int32(1)), "p": np.float32(1)}
    )
    _, label = synth(*scan(), seed=0)
    assert (label == 2).any() and len(synth.report) == 1


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"applied": True, "tumors": []}, "got dict"),
        ("params.json", "got str"),
        ([{"applied": True, "tumors": []}] * 2, "got 2"),
        ([7], "got 7 among them"),
    ],
)
def test_other_values_than_params_are_named(params, found):
    with pytest.raises(ValueError, match=f"one record for each of the 1 samples, {found}; pass"):
        check_params(params, 1)


@pytest.mark.parametrize(
    "rejected",
    [
        [[0, "dim", "no_room"]],
        [[0, "dim", "faint", 1]],
        [[0.0, 0.0]],
        [[0, ""]],
        [[0, None]],
        [[7, "faint"]],
        [0],
        3,
    ],
)
def test_rejected_tumours_are_pairs_of_a_number_and_a_reason(rejected):
    image, label = torch.full((1, 20, 20, 20), 100.0), torch.ones(1, 20, 20, 20, dtype=torch.uint8)
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=5)
    synth(image, label, spacing=1.0, seed=0)
    params = [{**synth.params[0], "rejected": rejected}]
    with pytest.raises(
        ValueError, match="rejected must be pairs of a tumour's number and a reason"
    ):
        synth(image, label, spacing=1.0, params=params)


@pytest.mark.parametrize("intensity", [ts.Scaled(-175, 250, 0, 1), ts.ZScore(100, 80)])
def test_hu_with_another_intensity_are_refused(intensity):
    image, label = torch.full((1, 40, 40, 40), 100.0), torch.ones(1, 40, 40, 40, dtype=torch.uint8)
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=8, intensity=intensity)
    with pytest.raises(ValueError, match=r"must be in the scale of intensity=.*pass intensity=HU"):
        synth(image, label, spacing=1.0, seed=0)


@pytest.mark.parametrize("code", ["foo", 3, ["no_organ"]])
def test_params_with_an_unknown_skip_code_are_refused(code):
    record = {"seed": None, "applied": False, "tumors": [], "code": code}
    with pytest.raises(ValueError, match="a record's code must be one of .*no_organ.*; pass synth"):
        check_params([record], 1)
