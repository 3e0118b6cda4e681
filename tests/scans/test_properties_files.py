"""Whatever a file or a framework hands over: a sound result, or an error in our own words.

The outer layers beside tests/pipeline/test_properties.py: NIfTI headers, evaluation, training,
MONAI and TorchIO. ``TUMORSYNTH_EXAMPLES=1000`` tries as many of each.
"""

from __future__ import annotations

import json
import math
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import COUNTS, FLOATS, INTS, affines, seeds, tries, volumes

import tumorsynth as ts

nib = pytest.importorskip("nibabel")
NAN, INF = math.nan, math.inf
OURS = ("must", "needs", "does not fit", "outside", "holds", "is not", "no usable", "cut short")

# -- NIfTI -----------------------------------------------------------------------------------------

# offset and format of the fields of a NIfTI-1 header that decide what its voxels mean
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim0": (40, "h"), "dim1": (42, "h"), "dim2": (44, "h"),
    "dim3": (46, "h"), "dim4": (48, "h"), "dim5": (50, "h"), "intent_p1": (56, "f"),
    "intent_code": (68, "h"), "datatype": (70, "h"), "bitpix": (72, "h"), "slice_start": (74, "h"),
    "qfac": (76, "f"), "pixdim1": (80, "f"), "pixdim2": (84, "f"), "pixdim3": (88, "f"),
    "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"),
    "slice_end": (120, "h"), "xyzt_units": (123, "b"), "cal_max": (124, "f"),
    "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern_b": (256, "f"),
    "quatern_c": (260, "f"), "qoffset_x": (268, "f"), "srow_x0": (280, "f"), "srow_x3": (292, "f"),
    "srow_y1": (300, "f"), "srow_z2": (320, "f"), "magic": (344, "i"),
}  # fmt: skip
WHOLE = [0, 1, 2, 3, 4, 7, 8, 16, 64, 127, -1, -128, 300, 1007, 32767, -32768]
REAL = [0.0, 1.0, -1.0, NAN, INF, -INF, 1e-30, 1e30, 0.5, 352.0, 1e6, 3e38, 2.0]


@st.composite
def headers(draw):
    changes = {}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3)):
        kind = FIELDS[name][1]
        if kind == "f":
            changes[name] = draw(st.one_of(st.sampled_from(REAL), st.floats(width=32)))
        else:
            low, high = {"b": (-128, 127), "h": (-(2**15), 2**15 - 1)}.get(kind, (-9, 999))
            fits = st.sampled_from([v for v in WHOLE if low <= v <= high])
            changes[name] = draw(st.one_of(fits, st.integers(low, high)))
    return changes


@pytest.fixture(scope="module")
def scan():
    g = np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij"))
    organ = (g**2).sum(0) < 0.9
    hu = np.where(organ, 110, -100) + np.random.default_rng(0).normal(0, 12, organ.shape)
    return hu, organ.astype(np.uint8)


@tries(50)
@given(headers(), headers(), st.sampled_from(["i2", "f4", "f8", ">i2", "u2", "i4"]), st.booleans())
def test_any_header(scan, tmp_path_factory, capfd, image_changes, label_changes, dtype, both):
    from tumorsynth.scans import nifti, volume_files

    folder = tmp_path_factory.mktemp("header")
    hu = scan[0] + 1024 if dtype == "u2" else scan[0]
    label_changes = label_changes if both else {}
    files = []
    for name, array, changes in (
        ("ct.nii", hu.astype(dtype), image_changes),
        ("label.nii", scan[1], label_changes),
    ):
        image = nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0]))
        raw = bytearray(image.to_bytes())
        for field, value in changes.items():
            at, kind = FIELDS[field]
            raw[at : at + struct.calcsize(kind)] = struct.pack("<" + kind, value)
        files.append(folder / name)
        files[-1].write_bytes(raw)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            image, label = volume_files.read_pair(*files)
            values, mask = image.values(), label.integers()
            label.check_label_fits(2)
            synth = ts.SynthesizeTumor("hu2023", size_mm=(3, 6), count=1)
            ct, organ = torch.from_numpy(values)[None], torch.from_numpy(mask)[None]
            new, new_label = synth(ct, organ, affine=image.affine, seed=1)
        except (ValueError, TypeError) as error:
            COUNTS["refused"] += 1
            assert any(words in str(error) for words in OURS), str(error)
            assert "\n" not in str(error)
            return
    assert not warned, [str(w.message) for w in warned]
    made = any(r["applied"] for r in synth.report)
    COUNTS["sound, with tumours" if made else "sound, without"] += 1
    changed = (new != ct).numpy()[0] & ~np.isnan(values)
    stored = image.with_changes(changed, new[0].numpy()[changed])
    nifti.write_volume(folder / "out.nii.gz", image, stored)
    again = volume_files.read_volume(folder / "out.nii.gz")
    assert again.stored.dtype == image.stored.dtype and np.array_equal(
        again.stored, stored, equal_nan=stored.dtype.kind == "f"
    )
    assert np.array_equal(again.affine, image.affine)
    assert not capfd.readouterr().err  # nibabel's own words about headers, on stderr
    assert bool((new_label != organ).any()) == made


# -- evaluation ------------------------------------------------------------------------------------


@tries(25)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.sampled_from([0.01, 0.5, 1.0, 3.0, 100.0])] * 3),
    st.lists(st.sampled_from([0, 1, 2, 3, 2, 1]), min_size=1, max_size=4),
    st.lists(st.sampled_from([0, 1, 2, 3, 2, 1]), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_any_scores(shape, spacing, guesses, truths, least_iou, seed):
    pytest.importorskip("monai", reason="needs the extra evaluation")
    from tumorsynth.evaluation.metrics import scores, summary

    rng = np.random.default_rng(seed)
    guess, truth = rng.choice(guesses, shape), rng.choice(truths, shape)
    got = scores(guess, truth, spacing, least_iou=least_iou)
    COUNTS["sound, scored"] += 1
    for value in (got.dsc, got.nsd, got.organ_dsc):
        assert value is None or 0 <= value <= 1
    assert got.hd95_mm is None or 0 <= got.hd95_mm < 1e5
    assert 0 <= got.detected <= got.tumors and got.false_positives >= 0
    if least_iou <= 0 and np.array_equal(guess, truth):
        assert got.detected == got.tumors and got.false_positives == 0
    told = json.dumps(summary([got], bootstrap=3), allow_nan=False)  # JSON has no NaN
    assert json.loads(told)


# -- training --------------------------------------------------------------------------------------


@tries(12)
@given(data=st.data())
def test_any_scan_to_train_on(tmp_path_factory, data):
    reading = pytest.importorskip("tumorsynth.training.reading")
    from tumorsynth.training.data import load_pack, save_pack

    folder = tmp_path_factory.mktemp("pack")
    shape = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    low, high = data.draw(
        st.sampled_from([(-100, 200), (-1000, 3000), (0, 1), (0, 0), (900, 1200)])
    )
    hu = rng.uniform(low, high, shape).astype(data.draw(st.sampled_from(["f4", "i2", "f8", "u1"])))
    label = rng.integers(0, data.draw(st.sampled_from([1, 3, 300])), shape)
    label = label * data.draw(st.sampled_from([1, 1, 0.5, -1]))
    if hu.dtype.kind == "f" and data.draw(st.booleans()):
        hu[rng.random(shape) < data.draw(st.sampled_from([0.01, 1]))] = data.draw(
            st.sampled_from([NAN, INF])
        )
    affine = np.diag(
        [*(data.draw(st.sampled_from([1, -1, 0.5, 3, 1e-3, 1000])) for _ in range(3)), 1.0]
    )
    with np.errstate(all="ignore"):
        nib.save(nib.Nifti1Image(hu, affine), folder / "a.nii.gz")
        other = data.draw(st.sampled_from([label, label[:1], label[None]]))
        nib.save(nib.Nifti1Image(other.astype("f4"), affine), folder / "b.nii.gz")
    entry = {"image": "a.nii.gz", "label": "b.nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({"training": [entry]}))
    try:
        (case,) = reading.load_data(folder / "dataset.json")
    except ValueError as error:
        COUNTS["refused"] += 1
        assert str(error).startswith("1 problem with the training data: a: "), str(error)
        assert "\n" not in str(error) and "Error" not in str(error)
        return
    COUNTS["sound, packed"] += 1
    assert case.hu.dtype == torch.int16 and case.label.dtype == torch.uint8
    assert case.hu.shape == case.label.shape and min(case.hu.shape) >= 1
    save_pack([case], folder / "pack.npz")
    (again,) = load_pack(folder / "pack.npz")
    assert torch.equal(again.hu, case.hu) and torch.equal(again.label, case.label)


# -- frameworks ------------------------------------------------------------------------------------


def refused_in_our_words(error):
    COUNTS["refused"] += 1
    assert any(words in str(error) for words in OURS), repr(error)


def check_relabelled(image, label, new_image, new_label):
    assert (image.shape, image.dtype) == (new_image.shape, new_image.dtype)
    assert (label.shape, label.dtype) == (new_label.shape, new_label.dtype)
    changed = (label != new_label) & ~((label != label) & (new_label != new_label))
    assert (new_label[changed] == 2).all() and (label[changed] == 1).all()
    if image.is_floating_point():
        assert torch.equal(image.isfinite(), new_image.isfinite())
    COUNTS["sound, with tumours" if bool(changed.any()) else "sound, without"] += 1


@tries(25)
@given(volumes(""), affines(False), st.booleans(), st.booleans(), seeds, st.booleans())
def test_any_sample_in_monai(volume, affine, numpy, meta, seed, whole):
    monai = pytest.importorskip("tumorsynth.monai")
    from monai.data import MetaTensor

    image, label = (x[0] if x.ndim == 5 else x for x in volume)
    image, label = image.detach().clone(), label.detach().clone()
    if whole and image.dtype in FLOATS:  # HU as read from a file
        image = image.float().nan_to_num(nan=0, posinf=0, neginf=0).clamp(-1e4, 1e4).short()
    given_ = (image, label)
    if numpy and image.dtype != torch.bfloat16 and label.dtype != torch.bfloat16:
        given_ = (image.numpy().copy(), label.numpy().copy())
    elif meta:
        given_ = tuple(MetaTensor(x.clone(), affine=torch.as_tensor(affine)) for x in given_)
    transform = monai.RandSynthesizeTumord(
        "image", label_key="label", prob=1.0, generator="hu2023", size_mm=(2, 6), count=(1, 2)
    )
    transform.set_random_state(seed % 2**32)
    sample = {"image": given_[0], "label": given_[1], "name": "a"}
    try:
        new = transform(sample)
    except (ValueError, TypeError) as error:
        return refused_in_our_words(error)
    assert sample["image"] is given_[0] and new["name"] == "a" and type(new) is dict
    for key in ("image", "label"):
        assert type(new[key]) is type(sample[key])
    if meta and not numpy:
        assert torch.equal(new["image"].affine, given_[0].affine)
    check_relabelled(image, label, *(torch.as_tensor(new[k]) for k in ("image", "label")))


@tries(15)
@given(volumes(""), affines(False), seeds, st.sampled_from([*INTS[:5], torch.float32]))
def test_any_subject_in_torchio(volume, affine, seed, label_dtype):
    tio = pytest.importorskip("torchio")
    from tumorsynth.torchio import RandomSynthesizeTumor

    image, label = (x[0] if x.ndim == 5 else x for x in volume)
    image = image.detach().float().nan_to_num(nan=0, posinf=0, neginf=0).clone()
    with np.errstate(all="ignore"):
        label = label.detach().float().nan_to_num(nan=0).to(label_dtype).clone()
    affine = np.asarray(affine, dtype=float)
    subject = tio.Subject(
        image=tio.ScalarImage(tensor=image.clone(), affine=affine),
        label=tio.LabelMap(tensor=label.clone(), affine=affine),
    )
    torch.manual_seed(seed % 2**32)
    transform = RandomSynthesizeTumor(generator="hu2023", size_mm=(2, 6), count=(1, 2))
    try:
        new = transform(subject)
    except (ValueError, TypeError) as error:
        return refused_in_our_words(error)
    assert torch.equal(subject["image"].data, image)
    check_relabelled(image, label, new["image"].data, new["label"].data)
