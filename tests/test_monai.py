"""The transforms as MONAI's users meet them: Compose, MetaTensor, inverse, lazy, configs."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from monai.data import MetaTensor, set_track_meta
from monai.transforms import (
    Compose,
    EnsureTyped,
    Flipd,
    Identityd,
    OneOf,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    Spacingd,
)
from monai_samples import LPS, SETTINGS, equal, same, sample, transform, tumor, volume

import tumorsynth as ts
from tumorsynth.monai import (
    BatchSynthesizeTumord,
    PrepareBatchTumorSynth,
    RandSynthesizeTumor,
    RandSynthesizeTumorD,
    RandSynthesizeTumord,
    RandSynthesizeTumorDict,
)


@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
@pytest.mark.parametrize("image_dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("label_dtype", ["uint8", "int64", "float32"])
def test_types_and_dtypes_come_back_and_the_input_stays(kind, image_dtype, label_dtype):
    data = sample(kind, LPS)
    for key, dtype in (("image", image_dtype), ("label", label_dtype)):
        x = data[key]
        data[key] = x.astype(dtype) if kind == "numpy" else x.to(getattr(torch, dtype))
    before = copy.deepcopy(data)
    out = transform().set_random_state(0)(data)

    assert equal(data, before)
    assert out["name"] == "a" and set(out) == set(data)
    for key in ("image", "label"):
        assert type(out[key]) is type(data[key])
        assert out[key].dtype == data[key].dtype
    changed = np.asarray(out["image"]) != np.asarray(before["image"])
    assert tumor(out).sum() > 50
    assert changed[tumor(out)].mean() > 0.9
    assert changed.mean() < 0.2
    core = (np.asarray(out["image"], float) - np.asarray(before["image"], float))[tumor(out)]
    assert core.mean() < -8


def test_integer_images_are_the_float_result_rounded():
    data = sample()
    data["image"] = data["image"].round()
    exact = transform().set_random_state(3)(data)["image"]
    whole = transform().set_random_state(3)({**data, "image": data["image"].astype(np.int16)})
    assert same(whole["image"], exact.round())


@pytest.mark.parametrize("dtype", [">i2", "uint16", "uint32"])
def test_odd_numpy_arrays(dtype):
    data = sample()
    data["image"] = np.flip(data["image"], 1)  # negative stride
    data["label"] = data["label"].astype(dtype)
    data["label"].setflags(write=False)
    out = transform().set_random_state(0)(data)
    assert out["label"].dtype == np.dtype(dtype)
    plain = transform().set_random_state(0)(
        {"image": data["image"].copy(), "label": data["label"].astype(np.int32)}
    )
    assert equal(out, plain) and tumor(out).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images(dtype):
    data = sample("meta", LPS, shape=(40, 40, 24))
    synthesis = transform().set_random_state(0)
    out = synthesis({**data, "image": data["image"].to(dtype)})
    exact = transform().set_random_state(0)(data)
    assert out["image"].dtype == dtype and same(out["label"], exact["label"])
    apart = (out["image"].as_tensor().float() - exact["image"].as_tensor()).abs()
    assert apart.max() <= 256 * torch.finfo(dtype).eps  # HU as the dtype rounds them


def test_memory_of_any_layout():
    data = sample("tensor")
    exact = transform().set_random_state(0)(data)
    turned = {k: data[k].mT.contiguous().mT for k in ("image", "label")}
    assert not turned["image"].is_contiguous()
    assert equal(transform().set_random_state(0)(turned), exact)
    one = {**data, "label": torch.ones((), dtype=torch.uint8).expand(data["image"].shape)}
    out = transform().set_random_state(0)(one)  # all voxels of that label share one byte
    assert 50 < tumor(out).sum() < 2000 and (one["label"] == 1).all()


def test_without_tracking_plain_tensors_come_back():
    exact = transform().set_random_state(0)(sample("tensor"))
    chain = Compose([EnsureTyped(["image", "label"]), transform()])
    chain.transforms[1].set_random_state(0)
    set_track_meta(False)
    try:
        out = chain(sample("meta"))
    finally:
        set_track_meta(True)
    assert type(out["label"]) is torch.Tensor and equal(out, exact)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_a_callers_mode_does_not_get_in(mode):
    exact = transform().set_random_state(0)(sample("tensor"))
    with mode():
        given = sample("tensor")
        out = transform().set_random_state(0)(given)
    assert equal(out, exact)
    again = transform()(given)  # also where its input is an inference tensor
    assert not again["image"].is_inference()


def test_lists_of_samples():
    """Compose iterates over lists, with map_items to a given depth."""
    out = Compose([transform().set_random_state(0)])([sample("meta")] * 2)
    assert [tumor(x).any() for x in out] == [True] * 2 and not equal(*out)
    deep = inspect.signature(Compose.__init__).parameters["map_items"].annotation
    if "int" in str(deep):  # MONAI 1.5 and later
        out = Compose([transform().set_random_state(0)], map_items=2)([[sample("meta")] * 2])
        assert [tumor(x).any() for x in out[0]] == [True] * 2
    with pytest.raises(RuntimeError) as error:
        Compose([transform()], map_items=False)([sample("meta")])
    assert "data must be a dictionary, got list" in str(error.value.__cause__)


def test_tumor_label_must_fit_the_dtype():
    data = sample()
    data["label"] = data["label"].astype(np.uint16)
    with pytest.raises(ValueError, match="tumor_label -1 does not fit .* convert"):
        transform(tumor_label=-1)(data)


def test_metatensor_keeps_affine_meta_and_gives_spacing_and_orientation():
    data = sample("meta", LPS, shape=(64, 64, 24))
    synthesis = transform(size_mm=15)
    out = synthesis.set_random_state(1)(data)
    for key in ("image", "label"):
        assert torch.equal(out[key].affine, data[key].affine)
        assert out[key].meta["filename_or_obj"] == "ct.nii.gz"
        assert out[key].affine is not data[key].affine
    volume_mm3 = tumor(out).sum() * 0.8 * 0.8 * 2.5
    assert volume_mm3 == pytest.approx(np.pi / 6 * 15**3, rel=0.1)
    report = synthesis.report[0]
    centre = LPS @ [*report["centre_voxel"], 1]
    np.testing.assert_allclose(report["centre_mm"], centre[:3])

    bare = {key: np.asarray(data[key]) for key in ("image", "label")}
    given = transform(size_mm=15, spacing=(0.8, 0.8, 2.5)).set_random_state(1)(bare)
    assert same(given["label"], out["label"])


def test_applied_operations_are_untouched_and_inverse_works():
    chain = Compose(
        [
            Orientationd(["image", "label"], "RAS", labels=None),
            Flipd(["image", "label"], 0),
            transform(),
        ]
    ).set_random_state(0)
    data = sample("meta", LPS, shape=(40, 44, 24))
    out = chain(data)
    names = [op["class"] for op in out["image"].applied_operations]
    assert names == ["Orientationd", "Flipd"] or names == ["Orientation", "Flip"]
    back = chain.inverse(out)
    assert back["image"].shape == data["image"].shape
    assert np.allclose(back["image"].affine, LPS)
    kept = ~tumor(back)
    assert same(np.asarray(back["label"])[kept], np.asarray(data["label"])[kept])
    assert tumor(back).sum() == tumor(out).sum() > 0


def test_probability():
    data = sample("meta")
    out = transform(prob=0.0)(data)
    assert out["image"] is data["image"] and out["label"] is data["label"] and out is not data

    synthesis = transform(prob=0.5).set_random_state(0)
    done = [tumor(synthesis(data)).any() for _ in range(20)]
    assert 4 < sum(done) < 16
    assert synthesis.report == [] or done[-1]


@pytest.mark.parametrize("kind", ["numpy", "meta"])
def test_healthy_only(kind):
    healthy, ill = sample(kind), sample(kind)
    ill["label"][:, 20:24, 20:24, 20:24] = 2
    synthesis = transform(healthy_only=True).set_random_state(0)
    out = synthesis(ill)
    assert out["image"] is ill["image"] and out["label"] is ill["label"]
    reason = "left alone (holds a tumour already: 64 voxels of 2 = tumor_label)"
    assert synthesis.report[0]["reason"] == reason
    state = synthesis.R.get_state()[1].copy()
    out = synthesis(healthy)
    assert tumor(out).any()
    # a sample's draws do not depend on samples that were skipped before it
    other = transform().set_random_state(0)
    other(ill)
    assert same(other.R.get_state()[1], state)
    assert equal(other(healthy), out)


def test_healthy_only_looks_at_the_label_and_not_at_the_organ_map():
    data = sample("tensor")
    data["organ"], data["label"] = data["label"].clone(), torch.zeros_like(data["label"])
    synthesis = transform(organ_key="organ", tumor_label=1, healthy_only=True)
    out = synthesis.set_random_state(0)(data)
    assert tumor(out, 1).any()
    assert synthesis(out)["label"] is out["label"]


def healthy(data):
    return data["healthy"]


def test_a_predicate_on_the_dictionary():
    data = sample("meta")
    synthesis = transform(when=healthy).set_random_state(0)
    left = synthesis({**data, "healthy": False})
    assert left["image"] is data["image"]
    assert synthesis.report[0]["reason"] == "left alone (as asked)"
    assert tumor(synthesis({**data, "healthy": True})).any()
    assert len(pickle.dumps(synthesis)) < 20_000


def test_repr_shows_the_given_arguments():
    synthesis = transform(prob=0.5, healthy_only=True, organ_key="organ")
    text = repr(synthesis)
    assert text == (
        "RandSynthesizeTumord('image', 'label', organ_key='organ', prob=0.5, generator='hu2023', "
        "count=1, size_mm=(8, 10), healthy_only=True)"
    )
    assert repr(RandSynthesizeTumor(prob=0.5)) == "RandSynthesizeTumor(prob=0.5)"
    held = ts.load_generator("liver-early")  # repr shows its name instead of its weights
    assert "generator='liver-early'" in repr(transform(generator=held))


def test_separate_organ_map_whose_values_mean_something_else():
    data = sample("meta")
    liver = data["label"].clone()
    organ = liver.to(torch.uint8)
    organ[:, :10] = 2  # another organ that has the tumour's value in the label
    lesions = torch.zeros_like(liver)
    lesions[:, 20:24, 20:24, 20:24] = 1
    data = {"image": data["image"], "label": lesions, "organ": organ}
    before = copy.deepcopy(data)
    synthesis = transform(organ_key="organ", organ_labels=1, tumor_label=1, gap_mm=2)
    out = synthesis.set_random_state(0)(data)
    assert equal(data, before) and same(out["organ"], before["organ"])
    assert type(out["label"]) is MetaTensor and out["label"].dtype == lesions.dtype
    new = tumor(out, 1) & ~tumor(before, 1)
    assert new.sum() == synthesis.report[0]["label_voxels"] > 0
    assert tumor(out, 1)[tumor(before, 1)].all()
    assert (np.asarray(organ)[new] == 1).all()
    assert not new[:, 18:26, 20:24, 20:24].any()

    with pytest.raises(ValueError, match="organ map must have the label's shape"):
        synthesis({**data, "organ": organ[:, :-1]})
    none = synthesis({**data, "organ": torch.zeros_like(organ)})
    assert equal(none, before)
    assert synthesis.report[0]["reason"].startswith("no organ: no voxel has a label of (1,)")


def test_missing_keys():
    data = {"image": volume()[0]}
    with pytest.raises(KeyError, match="label"):
        transform()(data)
    out = transform(allow_missing_keys=True)(data)
    assert out["image"] is data["image"]


def test_multi_sample_crops_one_of_and_nesting():
    crops = RandCropByPosNegLabeld(
        ["image", "label"], "label", (32, 32, 32), pos=1, neg=0, num_samples=2
    )
    choice = OneOf([transform(size_mm=6), Compose([transform(size_mm=6)])])
    chain = Compose([EnsureTyped(["image", "label"]), crops, choice])
    out = chain.set_random_state(0)(sample("meta"))
    assert len(out) == 2 and all(tumor(x).any() for x in out)
    assert not equal(out[0], out[1])


def chain_state(seed):
    """The state that Compose.set_random_state gives its first random transform."""
    probe = Compose([transform()]).set_random_state(seed)
    return probe.transforms[0].R


def test_lazy_pipeline_gives_the_synthesis_its_pending_grid():
    keys = ["image", "label"]
    resample = Spacingd(keys, (1.5, 1.5, 1.5), mode=("bilinear", "nearest"))
    data = sample("meta", LPS, shape=(64, 64, 24))
    lazy = {
        "lazy": True,
        "overrides": {"label": {"mode": "nearest"}},
    }  # lazy MONAI ignores Spacingd's
    chain = Compose([resample, transform()], **lazy).set_random_state(0)
    out = chain(data)
    assert tumor(out).any() and not out["image"].pending_operations
    resampled = Compose([resample, Identityd(keys)], **lazy)(data)
    assert not equal(resampled, data)
    assert equal(out, transform().set_random_state(state=chain_state(0))(resampled))


def test_array_transform_and_aliases():
    assert RandSynthesizeTumorD is RandSynthesizeTumorDict is RandSynthesizeTumord
    image, label = volume()
    array = RandSynthesizeTumor(**SETTINGS).set_random_state(0)
    new_image, new_label = array(image, label)
    out = transform().set_random_state(0)({"image": image, "label": label})
    assert same(out["image"], new_image) and same(out["label"], new_label)
    organ = RandSynthesizeTumor(separate_organ=True, **SETTINGS)(image, 0 * label, label)
    assert (organ[1] == 2).any() and not (organ[1] == 1).any()


def test_scaled_intensity_trains():
    data = sample("tensor")
    data["image"] = ((data["image"] + 175) / 425).clamp(0, 1)
    out = transform(intensity=ts.Scaled()).set_random_state(0)(data)
    assert out["image"].max() <= 1
    weight = torch.nn.Parameter(torch.ones(1))
    (weight * out["image"]).sum().backward()
    assert not out["image"].is_inference() and weight.grad.isfinite()


def test_from_a_json_file(tmp_path):
    pytest.importorskip("yaml")
    from monai.bundle import ConfigParser

    config = {
        "synthesis": {
            "_target_": "tumorsynth.monai.RandSynthesizeTumord",
            "keys": "image",
            "label_key": "label",
            "prob": 1.0,
            "generator": "hu2023",
            "count": [1, 2],
            "organ_labels": [1],
            "when": "$lambda data: data['name'] == 'a'",
            "intensity": {"_target_": "tumorsynth.HU"},
        }
    }
    (tmp_path / "train.json").write_text(json.dumps(config))
    parser = ConfigParser()
    parser.read_config(tmp_path / "train.json")
    synthesis = parser.get_parsed_content("synthesis")
    assert tumor(synthesis(sample())).any()
    assert not tumor(synthesis({**sample(), "name": "b"})).any()


def test_the_bundle_runs(tmp_path):
    pytest.importorskip("yaml")
    nib = pytest.importorskip("nibabel")
    from monai.bundle import run

    image, label = volume()
    for kind, array in (("images", image), ("labels", label)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array[0], LPS), tmp_path / "data" / kind / "a.nii.gz")
    configs = Path(__file__).resolve().parent.parent / "examples" / "monai_bundle" / "configs"
    run(
        config_file=str(configs / "inference.json"),
        meta_file=str(configs / "metadata.json"),
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
        **{"synthesis#count": 1, "synthesis#size_mm": 10},
    )
    new_image, new_label = (
        nib.load(tmp_path / "out" / kind / "a.nii.gz") for kind in ("images", "labels")
    )
    assert np.allclose(new_image.affine, LPS) and np.allclose(new_label.affine, LPS)
    found = np.asarray(new_label.dataobj) == 2
    change = np.asarray(new_image.dataobj) - image[0]
    volume_mm3 = found.sum() * 0.8 * 0.8 * 2.5
    assert volume_mm3 == pytest.approx(np.pi / 6 * 10**3, rel=0.25)
    assert change[found].mean() < -5 and (change != 0).mean() < 0.2


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prob": 1.5}, ValueError, "prob must be a probability .* pass prob=1"),
        ({"do_transform": True}, TypeError, "unknown keyword argument do_transform of RandSynth"),
        ({"prob": True}, ValueError, "prob must be a probability"),
        ({"count": True}, ValueError, "count must be a whole number"),
        (
            {"p": 0.5},
            TypeError,
            "unknown keyword argument p of RandSynthesizeTumord; did you mean prob",
        ),
        ({"sise_mm": 3}, TypeError, "unknown keyword argument sise_mm of .* did you mean size_mm"),
        ({"keys": ["image", "label"]}, ValueError, "label_key"),
        ({"tumor_label": 1}, ValueError, "tumor_label must differ"),
        ({"organ_key": "organ", "tumor_label": 1.5}, ValueError, "whole number"),
        ({"label_key": "image"}, ValueError, "label_key must be one key, another than the image's"),
        ({"label_key": ["label"]}, ValueError, "label_key must be one key"),
        ({"organ_key": "image"}, ValueError, "organ_key must be one key"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        RandSynthesizeTumord(**{"keys": "image", **SETTINGS, **kwargs})


def test_flips_after_the_synthesis_still_invert():
    chain = Compose([transform(), RandFlipd(["image", "label"], prob=1, spatial_axis=1)])
    out = chain.set_random_state(0)(sample("meta"))
    back = chain.inverse(out)
    assert same(back["label"], np.flip(np.asarray(out["label"]), 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: [d, d], TypeError, "data must be a dictionary, got list"),
        (lambda d: {**d, "label": torch.cat([d["label"]] * 2)}, ValueError, "label.argmax"),
        (lambda d: {**d, "label": d["label"][0]}, ValueError, "a channel with label.unsqueeze"),
        (lambda d: {**d, "label": d["label"][:, :-1]}, ValueError, "onto the image's grid"),
        (lambda d: {**d, "label": 0.9 * d["label"]}, ValueError, "whole numbers, got 0.9"),
        (lambda d: {**d, "label": None}, TypeError, "label must be a torch tensor, got NoneType"),
    ],
)
def test_unusable_samples_are_refused_with_the_fix(change, error, message):
    with pytest.raises(error, match=message):
        transform()(change(sample("tensor")))


def edge_interpolated(data):
    """Resampled linearly by half a voxel, which leaves fractions on the edge."""
    label = data["label"].float()
    return {**data, "label": (label + label.roll(1, 1)) / 2}


def test_interpolated_labels_and_organ_maps_are_refused():
    given = sample("tensor")
    wrong = edge_interpolated(given)["label"]
    assert (wrong == 1).any()
    with pytest.raises(ValueError, match="label must hold whole numbers, got 0.5; .*nearest"):
        transform()({**given, "label": wrong})
    synthesis = transform(organ_key="organs")
    with pytest.raises(ValueError, match="label must hold whole numbers, got 0.5"):
        synthesis({**given, "label": wrong, "organs": given["label"]})
    with pytest.raises(ValueError, match="the organ map must hold whole numbers, got 0.5"):
        synthesis({**given, "organs": wrong})


def test_the_label_cannot_be_the_organ_map_too():
    with pytest.raises(ValueError, match="organ_key must be another key.*'label' for both; leave"):
        RandSynthesizeTumord("image", organ_key="label", **SETTINGS)


@pytest.mark.parametrize("told", ["spacing", "image", "label"])
def test_no_warning_if_the_spacing_is_known(told, recwarn):
    data, settings = sample("tensor"), {}
    if told == "spacing":
        settings["spacing"] = 1
    else:
        data[told] = MetaTensor(data[told], affine=LPS)
    assert tumor(transform(**settings)(data)).any()
    assert not [one for one in recwarn if "1 mm" in str(one.message)]


def test_image_and_label_on_different_grids_are_refused_by_their_keys():
    data = sample("meta", LPS, shape=(40, 40, 24))
    elsewhere = MetaTensor(data["label"].as_tensor(), affine=np.diag([0.8, 0.8, 2.5, 1.0]))
    named = {"ct": data["image"], "seg": data["label"], "organs": data["label"]}
    synthesis = RandSynthesizeTumord("ct", "seg", organ_key="organs", **SETTINGS)
    with pytest.raises(ValueError, match="'ct' and 'seg' must share one grid.*give both one"):
        synthesis({**named, "seg": elsewhere})
    with pytest.raises(ValueError, match="'ct' and 'organs' must share one grid"):
        synthesis({**named, "organs": elsewhere})
    with pytest.raises(ValueError, match="'img' and 'label' must share one grid"):
        RandSynthesizeTumor(**SETTINGS)(data["image"], elsewhere)
    with pytest.raises(ValueError, match="'image' and 'label' must share one grid"):
        ts.SynthesizeTumor(**SETTINGS)(data["image"], elsewhere)
    # the fixes that the message and the docs name
    told = transform(spacing=(0.8, 0.8, 2.5), override_affine=True)
    assert tumor(told({**data, "label": elsewhere})).any()
    elsewhere.affine = data["image"].affine
    assert tumor(transform()({**data, "label": elsewhere})).any()


def test_affines_that_files_rounded_are_one_grid():
    data = sample("meta", LPS, shape=(40, 40, 24))
    data["label"].affine = LPS.astype(np.float32) * (1 + 1e-6)
    assert tumor(transform().set_random_state(0)(data)).any()


def test_an_image_without_geometry_lies_on_the_labels_grid():
    data = sample("meta", LPS, shape=(64, 64, 24))
    both = transform(size_mm=15).set_random_state(1)(data)
    bare = {**data, "image": data["image"].numpy()}
    assert equal(transform(size_mm=15).set_random_state(1)(bare), both)


def test_a_byte_image_of_a_window():
    data = sample()
    data["image"] = ((data["image"] + 175) / 425 * 255).clip(0, 255).round().astype(np.uint8)
    synthesis = transform(intensity=ts.Scaled(-175, 250, 0, 255))
    out = synthesis.set_random_state(0)(data)
    assert out["image"].dtype == np.uint8
    change = out["image"].astype(float) - data["image"]
    made = change[tumor(out)].mean() * 425 / 255
    assert made == pytest.approx(synthesis.report[0]["hu_change"], abs=1)
    assert made < -8


def test_a_flipped_array_with_an_axis_of_one_voxel():
    """Numpy calls it contiguous, with any strides."""
    image, label = np.full((1, 1, 16, 16), 100, np.float32), np.ones((1, 1, 16, 16), np.uint8)
    flipped = RandSynthesizeTumor(**SETTINGS)(image[:, ::-1], label[:, ::-1])
    assert [x.shape for x in flipped] == [image.shape] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"spacing": "x"}, ValueError, "spacing must be .* got 'x'"),
        ({"spacing": (1, 2)}, ValueError, "spacing must be three numbers"),
        ({"spacing": (1, 0, 1)}, ValueError, "spacing must be three numbers"),
        ({"spacing": {"x": 1}}, ValueError, "spacing must be"),
        ({"spacing": True}, ValueError, "spacing must be"),
        ({"when": 3}, TypeError, "when must be a function, got 3"),
        ({"allow_missing_keys": "no"}, ValueError, "allow_missing_keys must be True or False"),
        ({"healthy_only": "no"}, ValueError, "healthy_only must be True or False"),
        ({"label_key": {}}, ValueError, "label_key must be one key"),
        ({"label_key": ["a"]}, ValueError, "label_key must be one key"),
        ({"organ_key": ("a", "b")}, ValueError, "organ_key must be one key"),
    ],
)
@pytest.mark.parametrize("kind", [RandSynthesizeTumord, BatchSynthesizeTumord])
def test_malformed_arguments_are_refused_at_construction(kind, arguments, error, words):
    with pytest.raises(error, match=words):
        kind("image", **arguments)


def test_spacings_that_work_are_taken_at_construction():
    for spacing in (None, 1, 2.5, (1, 1, 3), np.ones(3), torch.ones(4, 3), [[1, 1, 2]]):
        BatchSynthesizeTumord("image", spacing=spacing)
    with pytest.raises(TypeError, match="prepare_batch must be a function, got 'x'"):
        PrepareBatchTumorSynth(prepare_batch="x")
