"""FROC on predictions made by hand, whose answers are known, and properties of any prediction."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra evaluation")

from tumorsynth.evaluation.detection import ScanMatches, TumorMatch, match_scan  # noqa: E402
from tumorsynth.evaluation.froc import (  # noqa: E402
    Pool,
    froc_curve,
    froc_summary,
    sensitivity_at,
    size_names,
)
from tumorsynth.evaluation.surfaces import surface_dice  # noqa: E402

MM = (1.0, 1.0, 1.0)
SHAPE = (24, 24, 24)


def place(values, at, side, value):
    values[tuple(slice(a, a + side) for a in at)] = value
    return values


def one_scan():
    """Two tumours, found at 0.9 and 0.3; false alarms of 0.6 and 0.2; noise of 0.05."""
    label = place(place(np.ones(SHAPE, np.uint8), (2, 2, 2), 4, 2), (14, 14, 14), 6, 2)
    probability = np.full(SHAPE, 0.05, np.float32)
    place(probability, (2, 2, 2), 3, 0.9)
    place(probability, (15, 15, 15), 4, 0.3)
    place(probability, (2, 14, 2), 2, 0.6)
    place(probability, (14, 2, 2), 2, 0.2)
    return probability, label


def made(tumors=(), false=(), mm=None):
    """A scan's matches with these scores of tumours, None for a missed one, and false alarms."""
    mm = mm or [12.0] * len(tumors)
    matches = [TumorMatch(d, s, None, None) for d, s in zip(mm, tumors, strict=True)]
    return ScanMatches(tuple(matches), tuple(sorted(false, reverse=True)))


# -- one scan -------------------------------------------------------------------------------------


def test_candidates_of_one_scan_are_matched_by_hand():
    got = match_scan(*one_scan(), MM)
    assert [t.score for t in got.tumors] == pytest.approx([0.9, 0.3])
    assert got.false_scores == pytest.approx((0.6, 0.2))
    assert [t.diameter_mm for t in got.tumors] == pytest.approx(
        [(6 * n / np.pi) ** (1 / 3) for n in (64, 216)]
    )
    # the mask at 0.5 holds 27 of the first tumour's 64 voxels and 8 elsewhere
    assert got.tumors[0].dsc == pytest.approx(2 * 27 / (27 + 64), abs=1e-6)
    assert (got.tumors[1].dsc, got.tumors[1].nsd) == (None, None)
    assert got.dsc == pytest.approx(2 * 27 / (27 + 8 + 64 + 216), abs=1e-6)


def test_a_score_is_the_highest_of_all_candidates_that_touch():
    probability, label = one_scan()
    place(probability, (19, 19, 19), 1, 0.7)  # at a corner of the second tumour
    got = match_scan(probability, label, MM)
    assert got.tumors[1].score == pytest.approx(0.7) and len(got.false_scores) == 2


def test_one_candidate_over_two_tumours_finds_both_but_not_strictly():
    label = place(place(np.zeros(SHAPE, bool), (4, 4, 4), 3, True), (12, 4, 4), 3, True)
    guess = np.zeros(SHAPE, np.float32)
    guess[4:15, 4:7, 4:7] = 0.8
    both = match_scan(guess, label, MM)
    assert [t.score for t in both.tumors] == pytest.approx([0.8, 0.8])
    # each tumour is compared without the voxels of the other: 27 of 72
    assert both.tumors[0].dsc == pytest.approx(2 * 27 / (27 + 72), abs=1e-6)
    strict = match_scan(guess, label, MM, least_iou=0.5)
    assert [t.score for t in strict.tumors] == [None, None] and len(strict.false_scores) == 1


@pytest.mark.parametrize("threshold, parts", [(0.1, 1), (0.5, 2)])
def test_the_threshold_decides_what_is_one_candidate(threshold, parts):
    guess = np.zeros(SHAPE, np.float32)
    guess[2:20, 5, 5] = 0.2
    guess[2, 5, 5] = guess[19, 5, 5] = 0.8
    got = match_scan(guess, np.zeros(SHAPE, np.uint8), MM, candidate_threshold=threshold)
    assert len(got.false_scores) == parts and got.is_healthy


def test_a_probability_equal_to_the_threshold_counts():
    for dtype in (np.float32, np.float64):
        guess = np.full((3, 3, 3), 0.1, dtype)
        assert match_scan(guess, guess > 1, MM).false_scores == pytest.approx((0.1,))


def test_inside_an_organ_nothing_else_counts():
    probability, label = one_scan()
    inside = np.zeros(SHAPE, np.uint8)
    inside[:12, :12] = 3  # the first tumour; no false alarm
    got = match_scan(probability, label, MM, inside=inside)
    assert [t.score for t in got.tumors] == pytest.approx([0.9])
    assert got.false_scores == () and got.outside == 1 and not got.is_healthy
    inside[:] = 0
    inside[:4] = 1  # half of the first tumour, which stays whole
    half = match_scan(probability, label, MM, inside=inside)
    assert half.tumors[0].diameter_mm == got.tumors[0].diameter_mm
    with pytest.raises(ValueError, match="inside must hold a voxel that counts"):
        match_scan(probability, label, MM, inside=np.zeros(SHAPE))


@pytest.mark.parametrize(
    "spacing, shear", [((0.5, 2.0, 3.0), None), (MM, ((1, 0, 0.5), (0, 1, 0), (0, 0, 3)))]
)
def test_diameters_are_mm(spacing, shear):
    got = match_scan(*one_scan(), spacing, shear=shear)
    assert got.tumors[0].diameter_mm == pytest.approx((6 * 64 * 3 / np.pi) ** (1 / 3))


def test_instances_number_touching_tumours():
    label = place(place(np.zeros(SHAPE, np.uint8), (4, 4, 4), 4, 2), (8, 8, 8), 4, 2)
    guess = place(np.zeros(SHAPE, np.float32), (4, 4, 4), 4, 0.9)
    assert len(match_scan(guess, label, MM).tumors) == 1
    numbered = place(place(np.zeros(SHAPE, int), (4, 4, 4), 4, 70), (8, 8, 8), 4, 30)
    got = match_scan(guess, label, MM, instances=numbered)
    assert [t.score for t in got.tumors] == [pytest.approx(0.9), None]
    assert got.tumors[0].dsc == got.tumors[0].nsd == 1
    with pytest.raises(ValueError, match="instances must be 0 but where label is 2"):
        match_scan(guess, label, MM, instances=np.roll(numbered, 1))


def test_tensors_and_arrays_score_alike():
    torch = pytest.importorskip("torch")
    probability, label = one_scan()
    got = match_scan(torch.from_numpy(probability), torch.from_numpy(label), MM)
    assert got == match_scan(probability, label, MM)
    half = match_scan(torch.from_numpy(probability).bfloat16(), torch.from_numpy(label), MM)
    assert half.tumors[0].score == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_is_a_probability_of_one(seed):
    rng = np.random.default_rng(seed)
    mask, label = rng.random(SHAPE) > 0.99, (rng.random(SHAPE) > 0.99).astype(int) * 2
    got = match_scan(mask, label, MM)
    assert got == match_scan(mask.astype(np.float32), label, MM)
    assert {t.score for t in got.tumors} <= {None, 1.0} and set(got.false_scores) <= {1.0}


def test_bad_input_is_named():
    probability, label = one_scan()
    with pytest.raises(ValueError, match="prediction must be a probability.*got 1 to 2.*== tumor"):
        match_scan(label, label, MM)
    with pytest.raises(ValueError, match="prediction must be a probability.*nan"):
        match_scan(np.where(label == 2, np.nan, probability), label, MM)
    with pytest.raises(ValueError, match="logits"):
        match_scan(probability - 0.5, label, MM)
    with pytest.raises(ValueError, match="prediction and inside must share one grid"):
        match_scan(probability, label, MM, inside=label[1:])
    with pytest.raises(ValueError, match="prediction and label must share one grid"):
        match_scan(probability, label[1:], MM)
    with pytest.raises(ValueError, match=r"\(X, Y, Z\), got shape \(1, 24, 24, 24\)"):
        match_scan(probability[None], label[None], MM)
    for name, value in [("candidate_threshold", 0), ("mask_threshold", 1.1), ("least_iou", 2)]:
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            match_scan(probability, label, MM, **{name: value})


# -- many scans -----------------------------------------------------------------------------------


def test_sensitivity_at_rates_is_counted_by_hand():
    scans = [
        made([0.9, 0.5, None], [0.7, 0.3], mm=[8.0, 10.0, 25.0]),
        made([0.2], [0.6], mm=[15.0]),
        made([], [0.8, 0.4]),  # healthy
        made(),
    ]
    # false alarms at 0.8, 0.7, 0.6, 0.4, 0.3 in four scans; tumours at 0.9, 0.5, 0.2
    expected = {0: 1, 0.25: 1, 0.5: 1, 0.75: 2, 1: 2, 1.24: 2, 1.25: 3, 8: 3}
    for rate, found in expected.items():
        assert sensitivity_at(scans, rate) == found / 4, rate
    point = Pool(scans, (10, 20)).at_rate(1.0)
    assert (point.false_positives, point.threshold) == (1.0, 0.4)
    assert point.by_size == (1.0, 0.5, 0.0)
    assert point.healthy_false_positives == 1.0
    nothing = Pool([made([0.5], [0.5])]).at_rate(0.5)  # a tie: both count or neither does
    assert (nothing.sensitivity, nothing.threshold, nothing.false_positives) == (0, None, 0)


def test_the_curve_is_a_staircase_from_none_to_all():
    curve = froc_curve([made([0.9, 0.5, None], [0.7, 0.5]), made([], [0.2])])
    assert curve.thresholds.tolist() == [np.inf, 0.9, 0.7, 0.5, 0.2]
    assert curve.false_positives.tolist() == [0, 0, 0.5, 1, 1.5]
    assert curve.sensitivity == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize("seed", range(6))
def test_properties_of_any_scores(seed):
    rng = np.random.default_rng(seed)
    levels = rng.integers(2, 50)  # ties
    scans = [
        made(
            [None if rng.random() < 0.2 else s for s in rng.integers(1, levels, n) / levels],
            (rng.integers(1, levels, rng.integers(0, 20)) / levels).tolist(),
        )
        for n in [2, *rng.integers(0, 5, 6)]
    ]
    curve = froc_curve(scans)
    assert (np.diff(curve.false_positives) >= 0).all() and (np.diff(curve.sensitivity) >= 0).all()
    rates = np.linspace(0, 20, 41)
    at = [sensitivity_at(scans, r) for r in rates]
    for rate, value in zip(rates, at, strict=True):  # the best corner within the rate
        assert value == curve.sensitivity[curve.false_positives <= rate + 1e-9].max()
    # weights of a bootstrap are scans repeated
    weights = rng.multinomial(len(scans), np.full(len(scans), 1 / len(scans)))
    repeated = [scan for scan, n in zip(scans, weights, strict=True) for _ in range(n)]
    assert sensitivity_at(scans, 2.0, weights) == sensitivity_at(repeated, 2.0)

    # only the order of scores matters
    def squared(score):
        return None if score is None else score**2

    other = [
        made([squared(t.score) for t in s.tumors], [f**2 for f in s.false_scores]) for s in scans
    ]
    assert [sensitivity_at(other, r) for r in rates] == at


def test_the_curve_is_monai_s_where_no_scores_are_equal():
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(0)
    draws = rng.permutation(np.linspace(0.1, 1, 60))
    scans = [made(draws[:8], draws[8:20]), made([*draws[20:30], None], draws[30:60])]
    false_rate, sensitivity = metrics.compute_froc_curve_data(
        np.concatenate([draws[8:20], draws[30:]]), np.concatenate([draws[:8], draws[20:30]]), 19, 2
    )
    ours = froc_curve(scans)
    theirs = {(round(f, 6), round(s, 6)) for f, s in zip(false_rate, sensitivity, strict=True)}
    assert theirs <= {
        (round(f, 6), round(s, 6))
        for f, s in zip(ours.false_positives, ours.sensitivity, strict=True)
    }


def test_the_summary_has_intervals_and_is_json():
    scans = [made([0.9, None], [0.3], mm=[8, 30]), made([0.6], [0.7], mm=[12]), made([], [0.5])]
    got = froc_summary(scans, rates=(0.5, 1), bootstrap=200)
    json.dumps(got, allow_nan=False)
    assert (got["scans"], got["healthy_scans"], got["tumors"]) == (3, 1, 3)
    assert got["tumors_by_size"] == {"<10 mm": 1, "10-20 mm": 1, ">=20 mm": 1}
    half, one = got["rates"]
    assert (half["sensitivity"]["value"], one["sensitivity"]["value"]) == (2 / 3, 2 / 3)
    low, high = one["sensitivity"]["ci95"]
    assert low <= one["sensitivity"]["value"] <= high and low < high
    assert one["by_size"][">=20 mm"]["value"] == 0
    assert half["healthy_false_positives_per_scan"]["value"] == 0
    assert one["healthy_false_positives_per_scan"]["value"] == 1
    assert froc_summary(scans, rates=(0.5, 1), bootstrap=200) == got  # seeded
    healthy = froc_summary([made([], [0.5]), made()], bootstrap=20)
    assert healthy["rates"][0]["sensitivity"]["value"] is None
    assert healthy["rates"][1]["healthy_false_positives_per_scan"]["value"] == 0.5
    json.dumps(healthy, allow_nan=False)


def test_matches_survive_json():
    got = match_scan(*one_scan(), MM)
    assert ScanMatches.from_dict(json.loads(json.dumps(got.as_dict()))) == got


@pytest.mark.parametrize("edges", [(20, 10), (0, 10), (10, 10), (float("nan"),)])
def test_size_edges_must_ascend(edges):
    with pytest.raises(ValueError, match="size_edges must ascend"):
        froc_summary([made([0.5])], size_edges=edges)


def test_names_of_sizes():
    assert size_names((10, 20)) == ["<10 mm", "10-20 mm", ">=20 mm"]
    assert size_names((7.5,)) == ["<7.5 mm", ">=7.5 mm"]
    assert size_names(()) == ["all"]


# -- surfaces -------------------------------------------------------------------------------------


def test_surface_dice_of_known_masks():
    box = place(np.zeros(SHAPE, bool), (4, 4, 4), 8, True)
    assert surface_dice(box, box, (0.7, 1, 3)) == 1
    assert surface_dice(np.zeros_like(box), box, MM) == 0
    shifted = np.roll(box, 3, 0)
    assert surface_dice(shifted, box, MM, 3.0) == 1
    far = surface_dice(shifted, box, MM, 1.0)
    assert 0.4 < far < 0.7  # two of six faces are 3 mm off, and 3 of 8 mm of the others
    assert surface_dice(shifted, box, (0.3, 1, 1), 1.0) == 1


@pytest.mark.filterwarnings("ignore:monai:FutureWarning")  # MONAI calls its own deprecated names
@pytest.mark.parametrize("seed", range(6))
def test_surface_dice_is_close_to_monai_s(seed):
    metrics = pytest.importorskip("tumorsynth.evaluation.metrics")
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((40, 40, 24)), (4, 4, 2))
    real, guess = noise > 0.02, np.roll(noise, rng.integers(0, 4), seed % 3) > 0.025
    mm = np.array([*rng.uniform(0.6, 1.2, 2), rng.choice([1, 2.5, 5])])
    padded = [np.pad(m, 1) for m in (guess, real)]
    theirs = metrics._surface_dice(*padded, mm, 2.0)
    assert surface_dice(guess, real, mm, 2.0) == pytest.approx(theirs, abs=0.01)


def test_it_imports_without_torch_and_monai():
    code = (
        "import sys; import tumorsynth.evaluation.froc; "
        "print(sorted({'torch', 'monai', 'nibabel', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
