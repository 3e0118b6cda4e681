"""Telling tumours apart: what cannot be told is not, what can is, and groups do not leak."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the extra evaluation")

from tumorsynth.evaluation.similarity import (  # noqa: E402
    CLASSIFIERS,
    embed,
    save_map,
    table,
    tell_apart,
    tumor_features,
)

with_mirp = pytest.mark.skipif(
    importlib.util.find_spec("mirp") is None, reason="needs MIRP, of the extra similarity"
)


def gaussians(shift, n=24, features=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * n, features))
    x[n:, 0] += shift
    return x, np.repeat(["real", "synthetic"], n)


def test_classes_that_differ_are_told_apart():
    told = tell_apart(*gaussians(6.0), permutations=19)
    assert tuple(told["classifiers"]) == CLASSIFIERS
    for kind, entry in told["classifiers"].items():
        assert entry["auc"] > 0.95 and entry["balanced_accuracy"] > 0.9, kind
        (a, b), (c, d) = entry["confusion"]
        assert (a + b, c + d) == (24, 24)
    assert told["chance"] == 0.5
    assert told["classifiers"]["SVM"]["p_value"] == 0.05  # the best of 20
    assert "p_value" not in told["classifiers"]["AdaBoost"]
    json.dumps(told, allow_nan=False)


def test_classes_that_do_not_differ_are_not():
    told = tell_apart(*gaussians(0.0, seed=2), permutations=19, classifiers=CLASSIFIERS[:2])
    for kind, entry in told["classifiers"].items():
        assert 0.2 < entry["auc"] < 0.8, kind
        low, high = entry["ci95"]
        assert low < entry["balanced_accuracy"] < high
    assert told["classifiers"]["SVM"]["p_value"] > 0.05


def test_three_organs_have_a_chance_of_a_third():
    rng = np.random.default_rng(0)
    organs = np.repeat(["kidney", "liver", "pancreas"], 12)
    x = rng.normal(size=(36, 4))
    x[organs == "liver", 1] += 8
    told = tell_apart(x, organs, permutations=0, classifiers=CLASSIFIERS[:2])
    assert told["chance"] == 0.333
    for entry in told["classifiers"].values():
        assert "auc" not in entry and "p_value" not in entry
        assert entry["confusion"][1][1] >= 10  # the liver is known, the other two are not
        assert entry["balanced_accuracy"] < 0.9


def test_what_only_a_patient_gives_away_does_not_count():
    # each patient has a level of its own and tumours of one class: 8 patients, 8 tumours each
    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(8), 8)
    classes = np.repeat([0, 1, 1, 0, 1, 0, 0, 1], 8)
    x = rng.normal(size=(8, 5))[patient] * 10 + rng.normal(size=(64, 5)) * 0.1
    svm = {"classifiers": ["SVM"], "permutations": 19}
    leaking = tell_apart(x, classes, **svm)["classifiers"]["SVM"]
    honest = tell_apart(x, classes, patient, folds=4, **svm)["classifiers"]["SVM"]
    assert leaking["balanced_accuracy"] == 1
    assert honest["balanced_accuracy"] < 0.8 and honest["p_value"] > 0.05


def test_what_cannot_be_told_apart_says_why():
    x, classes = gaussians(1.0, n=4)
    with pytest.raises(ValueError, match="two classes of two groups"):
        tell_apart(x, ["real"] * 8)
    with pytest.raises(ValueError, match="the smallest of 1 groups"):
        tell_apart(x, classes, np.where(classes == "real", 0, np.arange(8)))
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="`table` leaves out"):
        tell_apart(x, classes)


def test_a_table_keeps_what_all_have_and_what_varies():
    rows = [{"a": 1.0, "b": 2.0, "c": np.nan}, {"a": 3.0, "b": 2.0, "c": 1.0, "d": 4.0}]
    values, names = table(rows)
    assert names == ["a"] and values.tolist() == [[1.0], [3.0]]


def test_a_map_is_drawn(tmp_path):
    x, classes = gaussians(9.0)
    points = embed(x)
    assert points.shape == (48, 2) and np.isfinite(points).all()
    save_map(tmp_path / "map.png", {"all": (points, classes)})
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least 4"):
        embed(x[:3])


def ball(radius_mm, spacing, hu=60.0, noise=10.0, seed=0):
    shape = [int(36 / s) for s in spacing]
    axes = [(np.arange(n) + 0.5) * s - 18 for n, s in zip(shape, spacing, strict=True)]
    far = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    tumor = far < radius_mm
    image = np.where(tumor, hu, 100) + np.random.default_rng(seed).normal(0, noise, shape)
    return image.astype(np.float32), tumor


@with_mirp
def test_features_are_what_they_are_called():
    image, tumor = ball(5, (1, 1, 1))
    got = tumor_features(image, tumor, families=("intensity", "shape"))
    assert got["stat_mean"] == pytest.approx(image[tumor].mean(), abs=0.1)  # rounds to 1 HU
    assert got["stat_var"] == pytest.approx(image[tumor].var(), rel=0.01)
    assert got["morph_vol_approx"] == pytest.approx(tumor.sum(), rel=0.01)
    assert got["morph_sphericity"] > 0.8
    smooth = tumor_features(image, tumor, families=["texture"])
    rough = tumor_features(*ball(5, (1, 1, 1), noise=25), families=["texture"])
    contrast = next(name for name in smooth if name.startswith("cm_contrast"))
    assert rough[contrast] > 2 * smooth[contrast]
    assert not any(name.startswith(("stat_", "morph_")) for name in smooth)


@with_mirp
def test_features_do_not_depend_on_the_order_of_the_axes_or_on_thick_slices():
    spacing = (0.75, 0.75, 3.0)
    image, tumor = ball(6, spacing, noise=0)
    got = tumor_features(image, tumor, spacing, families=["shape"])
    assert got["morph_vol_approx"] == pytest.approx(tumor.sum() * 0.75**2 * 3, rel=0.15)
    turned = tumor_features(
        image.transpose(2, 0, 1), tumor.transpose(2, 0, 1), (3.0, 0.75, 0.75), families=["shape"]
    )
    assert turned["morph_vol_approx"] == pytest.approx(got["morph_vol_approx"])


@with_mirp
def test_what_has_no_features_says_why():
    image, tumor = ball(1.2, (1, 1, 1))
    with pytest.raises(ValueError, match="at least 27 mm3"):
        tumor_features(image, tumor)
    with pytest.raises(ValueError, match="empty mask"):
        tumor_features(image, tumor & False)
    with pytest.raises(ValueError, match="families must be of"):
        tumor_features(image, tumor, families=["wavelet"])
