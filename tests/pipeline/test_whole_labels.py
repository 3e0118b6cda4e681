"""Labels that are a rounding error off whole numbers, as arrays, through every adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phantoms import shared_phantom

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.pipeline.validation import as_whole

SPACING = (3.0, 3.0, 3.0)
STEP = 20 / 65535  # of an int16 header, for labels up to 20


@pytest.fixture(scope="module")
def ct():
    return shared_phantom(SPACING, (64, 60, 40))


def quantised(label, dtype=torch.float32):
    return ((label.double() / STEP).floor() * STEP).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_core_treats_them_as_the_whole_numbers_and_returns_these(ct, dtype):
    synth = ts.SynthesizeTumor("hu2023", organ_labels=1, tumor_label=20, count=2)
    label = quantised(ct.label, dtype)
    before = label.clone()
    image, new = synth(ct.image, label, SPACING, seed=3)
    expected_image, expected = synth(ct.image, ct.label.to(dtype), SPACING, seed=3)
    assert image.equal(expected_image) and new.equal(expected) and new.dtype == dtype
    assert label.equal(before)
    assert (new == 20).any() and new.equal(new.round())


@pytest.mark.parametrize("settings", [{"p": 0}, {"organ_labels": 77}])
def test_they_come_back_whole_without_a_tumour_too(ct, settings):
    synth = ts.SynthesizeTumor("hu2023", **{"organ_labels": 1, "tumor_label": 20, **settings})
    label = quantised(ct.label)
    image, new = synth(ct.image, label, SPACING, seed=3)
    assert image is ct.image and new.equal(ct.label.float())
    whole = ct.label.float()
    assert synth(ct.image, whole, SPACING, seed=3)[1] is whole  # nothing to round, no copy


def test_healthy_only_sees_a_quantised_tumour(ct):
    adapter = Adapter(healthy_only=True, generator="hu2023", organ_labels=1, tumor_label=3)
    image, new = adapter(ct.image, quantised(ct.label), spacing=SPACING, seed=0)
    assert adapter.report[0]["code"] == "has_tumor" and image is ct.image
    assert new.equal(ct.label.float())


def test_a_separate_organ_map_may_be_quantised(ct):
    adapter = Adapter(True, generator="hu2023", organ_labels=1, count=1, contrast_hu=-60)
    label, organ = quantised(ct.label * 0), quantised(ct.label)
    _, new = adapter(ct.image, label, organ, spacing=SPACING, seed=0)
    _, expected = adapter(ct.image, ct.label * 0, ct.label, spacing=SPACING, seed=0)
    assert (new == 2).any() and new.equal(expected.float())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_monai_arrays_and_metatensors(ct, dtype):
    monai_data = pytest.importorskip("monai.data")
    from tumorsynth.monai import RandSynthesizeTumord

    settings = {"generator": "hu2023", "organ_labels": 1, "tumor_label": 20, "spacing": SPACING}
    settings["contrast_hu"] = -60.0  # which no noise skips
    label = quantised(ct.label, torch.float64).numpy().astype(dtype)
    transform = RandSynthesizeTumord("image", "label", **settings).set_random_state(0)
    out = transform({"image": ct.image.numpy(), "label": label})
    assert isinstance(out["label"], np.ndarray) and out["label"].dtype == dtype
    assert (out["label"] == 20).any() and (out["label"] == np.rint(out["label"])).all()
    meta = monai_data.MetaTensor(quantised(ct.label), affine=ct.affine)
    transform.set_random_state(0)
    out2 = transform({"image": monai_data.MetaTensor(ct.image, affine=ct.affine), "label": meta})
    assert isinstance(out2["label"], monai_data.MetaTensor)
    assert (out2["label"].affine.numpy() == ct.affine).all()
    assert out2["label"].as_tensor().equal(torch.from_numpy(out["label"]).float())


def test_torchio_labels(ct):
    tio = pytest.importorskip("torchio")
    from tumorsynth.torchio import RandomSynthesizeTumor

    subject = tio.Subject(
        image=tio.ScalarImage(tensor=ct.image, affine=ct.affine),
        label=tio.LabelMap(tensor=quantised(ct.label), affine=ct.affine),
    )
    out = RandomSynthesizeTumor(generator="hu2023", organ_labels=1, tumor_label=20)(subject)
    assert (out.label.data == 20).any() and out.label.data.equal(out.label.data.round())


def test_interpolated_labels_and_probabilities_are_refused_with_the_value(ct):
    synth = ts.SynthesizeTumor("hu2023", organ_labels=1, tumor_label=20)
    label = ct.label.float()
    small = torch.nn.functional.interpolate(label[None], scale_factor=0.97, mode="trilinear")[0]
    shape = ct.image.shape[1:]
    interpolated = torch.nn.functional.interpolate(small[None], shape, mode="trilinear")[0]
    for wrong in (interpolated, (ct.label == 1).float() * 0.98, label + 0.02):
        with pytest.raises(ValueError, match=r"got \d*\.\d+; resample labels") as caught:
            synth(ct.image, wrong, SPACING)
        value = float(str(caught.value).split("got ")[1].split(";")[0])
        assert value != round(value)


def test_nan_is_no_label(ct):
    label = ct.label.float()
    label[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="got nan"):
        as_whole("label", label)
