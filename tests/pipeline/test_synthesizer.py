"""SynthesizeTumor end to end: what changes, what stays, and that only the seed decides."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.blend import feather_reach
from tumorsynth.fetching import run_alone
from tumorsynth.geometry import frame_from_affine
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.finish import paint_and_finish
from tumorsynth.pipeline.place_batch import PlacedSample
from tumorsynth.pipeline.records import Sample, SampleParams, TumorId
from tumorsynth.pipeline.requests import request_painting
from tumorsynth.placement.organ import OrganRegion
from tumorsynth.placement.place import place
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask
from tumorsynth.subvoxels import subvoxel_factors

TINY = tiny_generator()
ISO = (1.0, 1.0, 1.0)
REPLAYED = PlacedSample(SampleParams(None), [], replayed={})


def scan(shape=(56, 52, 48), spacing=ISO, seed=0):
    """An organ (label 1, 110 HU) in fat, with another (3, 60 HU) beside it; (1, X, Y, Z)."""
    extent = [n * s for n, s in zip(shape, spacing, strict=True)]
    grids = torch.meshgrid(
        *[(torch.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij"
    )
    far = sum(((g / e - 0.5) / 0.42) ** 2 for g, e in zip(grids, extent, strict=True))
    label = torch.zeros(shape, dtype=torch.int16)
    label[far <= 1] = 1
    label[(far <= 1) & (grids[0] > 0.8 * extent[0])] = 3
    image = torch.tensor([-100.0, 110.0, 0.0, 60.0])[label.long()]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (image + 12 * noise)[None], label[None]


def synth(**changes) -> ts.SynthesizeTumor:
    settings = {"generator": "hu2023", "organ_labels": 1, "tumor_label": 2, "size_mm": (5, 12)}
    return ts.SynthesizeTumor(**{**settings, **changes})


def same(a, b) -> bool:
    """Bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(transform, image, label, new_image, new_label, spacing=ISO):
    """Check what holds for any call; return the records of the tumours made."""
    assert new_image.shape == image.shape and new_label.shape == label.shape
    assert new_image.dtype == image.dtype and new_label.dtype == label.dtype
    made = [r for r in transform.report if r["applied"]]
    skipped = [r for r in transform.report if not r["applied"]]
    assert all(r["reason"] for r in skipped)
    json.dumps(transform.report), json.dumps(transform.params)
    samples = range(len(image)) if image.ndim == 5 else [0]
    for b in samples:
        before, after = (x[b, 0] if image.ndim == 5 else x[0] for x in (image, new_image))
        old, new = (x[b, 0] if image.ndim == 5 else x[0] for x in (label, new_label))
        records = [r for r in made if r["sample"] == b]
        if not records:
            assert same(before, after) and same(old, new)
            continue
        relabelled = old != new
        organ = torch.stack([old == v for v in transform.organ_labels]).any(0)
        assert (new[relabelled] == transform.tumor_label).all()
        assert organ[relabelled].all() and before[relabelled].isfinite().all()
        made_voxels = sum(r["label_voxels"] for r in records)
        assert int(relabelled.sum()) == made_voxels or (
            transform.merge and 0 < int(relabelled.sum()) < made_voxels  # one over the other
        )
        m = feather_reach(max(r["sigma_mm"] for r in records), spacing, transform.settings.blend)
        # of coarse voxels the next ones may hold less than half a voxel of tumour, unlabelled
        coarse = subvoxel_factors(spacing, min(r["true_diameter_mm"] for r in records))
        m = [r + (k > 1) for r, k in zip(m, coarse, strict=True)]
        grown = ndimage.maximum_filter(relabelled.numpy(), [2 * r + 1 for r in m])
        allowed = torch.from_numpy(grown)
        assert same(before[~allowed], after[~allowed])
        assert torch.equal(before.isfinite(), after.isfinite())
        odd = ~before.isfinite()
        assert same(before[odd], after[odd])
        # label honesty: what is labelled was painted (a coarse dtype may round a change away)
        if before.dtype in (torch.float32, torch.float64):
            painted = before[relabelled] != after[relabelled]
            assert painted.float().mean() > 0.5
        for r in records:
            x, y, z = r["centre_voxel"]
            assert relabelled[x, y, z]
            assert r["label_voxels"] > 0
            volume = r["label_voxels"] * np.prod(spacing)
            assert r["volume_mm3"] == pytest.approx(volume)
            assert r["diameter_mm"] == pytest.approx((6 * volume / np.pi) ** (1 / 3))
            assert r["peak_weight"] <= 1 + 1e-6
            if transform.settings.blend == "change":
                assert r["peak_weight"] == 1
    return made


# -- what changes and what does not --------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, True])
@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "tiny"])
def test_patches_away_from_tumours_carry_no_trace(generator, blend, gate):
    """No classifier can tell a synthesised scan from voxels away from its tumours: they are the
    same bits, in the crop that went through the networks as beyond it."""
    image, label = scan()
    transform = synth(generator=generator, blend=blend, gate=gate, sigma_mm=1.0, count=2)
    new_image, new_label = transform(image, label, spacing=ISO, seed=5)
    records = [r for r in transform.report if r["applied"]]
    assert records or gate
    m = max(feather_reach(1.0, ISO, blend))
    near = ndimage.maximum_filter((new_label != label)[0].numpy(), 2 * m + 1)
    side, inside_crop = 4, 0
    for corner in itertools.product(*(range(0, n - side + 1, side) for n in image.shape[1:])):
        box = tuple(slice(c, c + side) for c in corner)
        if near[box].any():
            continue
        assert same(image[0][box], new_image[0][box]) and same(label[0][box], new_label[0][box])
        inside_crop += any(
            max(abs(c + side / 2 - v) for c, v in zip(corner, r["centre_voxel"], strict=True)) < 16
            for r in records
        )
    assert inside_crop > 20 or not records


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
@pytest.mark.parametrize("blend", ["change", "difftumor"])
def test_only_the_tumour_and_its_feather_change(generator, blend):
    image, label = scan()
    kept = image.clone(), label.clone()
    transform = synth(generator=generator, blend=blend, count=3)
    new_image, new_label = transform(image, label, spacing=ISO, seed=1)
    assert same(image, kept[0]) and same(label, kept[1])  # the inputs stay unchanged
    made = check(transform, image, label, new_image, new_label)
    assert len(made) == 3
    assert {r["generator"] for r in made} == {"hu2023" if generator == "hu2023" else "tiny-0"}
    assert len({r["seed"] for r in made}) == 3
    tumors, n = ndimage.label((new_label[0] == 2).numpy(), np.ones((3, 3, 3)))
    assert n == 3  # none merged
    if generator == "hu2023" and blend == "change":
        assert all(-60 < r["hu_change"] < -8 for r in made)
        relabelled = (new_label == 2) & (label != 2)
        change = (new_image - image)[relabelled].mean()
        weights = [r["label_voxels"] for r in made]
        reported = np.average([r["hu_change"] for r in made], weights=weights)
        assert float(change) == pytest.approx(reported, abs=1.5)  # feathers may overlap


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((56, 56, 56), (0.5, 0.5, 0.5)), ((24, 24, 24), (5, 5, 5)), ((60, 60, 16), (0.7, 0.7, 5)),
     ((16, 60, 40), (5, 0.6, 1.2)), ((48, 48, 24), (0.98, 0.98, 3)),
     ((40, 16, 40), (1.5, 4.25, 2))],
)  # fmt: skip
@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
def test_any_spacing(shape, spacing, generator):
    image, label = scan(shape, spacing)
    size_mm = (9, 14) if min(spacing) >= 5 else (4, 10)  # voxels of 5 mm hide smaller ones
    transform = synth(generator=generator, size_mm=size_mm, count=2)
    made = check(transform, image, label, *transform(image, label, spacing, seed=2), spacing)
    assert made
    if generator == "hu2023":
        assert all(-70 < r["hu_change"] < -5 for r in made)


@pytest.mark.parametrize(
    "shape",
    [(16, 16, 16), (16, 48, 70), (17, 19, 23), (96, 16, 16), (1, 16, 16), (16, 1, 1), (1, 1, 1)],
)
@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
def test_any_patch_size(shape, generator):
    """An organ that fills the patch, tumours at its faces included."""
    image = 100 + 10 * torch.randn(shape, generator=torch.Generator().manual_seed(3))[None]
    label = torch.ones(shape, dtype=torch.uint8)[None]
    transform = synth(generator=generator, size_mm=(1.3, 6), count=2)
    made = []
    for seed in range(3):
        made += check(transform, image, label, *transform(image, label, seed=seed))
    assert made or shape == (1, 1, 1)


@pytest.mark.parametrize("corner", list(itertools.product((0, 1), repeat=3)))
def test_an_organ_in_the_corner(corner):
    image, label = scan((40, 36, 32))
    part = tuple(slice(-9, None) if end else slice(0, 9) for end in corner)
    label = torch.zeros_like(label)
    label[(0, *part)] = 1
    image[(0, *part)] = image[0, 12:21, 12:21, 12:21]
    transform = synth(size_mm=(4, 8), count=1)
    assert check(transform, image, label, *transform(image, label, spacing=ISO, seed=4))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(16, 44)] * 3),
    st.tuples(*[st.floats(0.5, 5.0)] * 3),
    st.integers(0, 2**40),
    st.sampled_from(["change", "difftumor"]),
    st.tuples(st.floats(1, 8), st.floats(8, 40)),
)
def test_the_rules_hold_for_random_settings(shape, spacing, seed, blend, size):
    rng = np.random.default_rng(seed)
    image, label = scan(shape, spacing, seed % 1000)
    label[0][torch.from_numpy(rng.random(shape) < 0.01)] = 5  # holes in the organ
    label[0, : shape[0] // 3] *= int(rng.integers(0, 2))  # cut flat
    image[0][torch.from_numpy(rng.random(shape) < 0.002)] = float("nan")
    transform = synth(size_mm=size, blend=blend, count=(0, 4), sigma_mm=(0, 4))
    check(transform, image, label, *transform(image, label, spacing, seed=seed), spacing)


# -- values that are not tissue ------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
@pytest.mark.parametrize("blend", ["change", "difftumor"])
def test_bone_metal_air_nan_and_inf_stay_where_they_are(generator, blend):
    image, label = scan()
    odd = [3000.0, -2000.0, float("nan"), float("inf"), float("-inf"), 30000.0]
    rng = np.random.default_rng(0)
    for value in odd:
        index = torch.from_numpy(rng.integers(0, [56, 52, 48], (40, 3)).T)
        image[0][tuple(index)] = value
    image[0, 28:31, 20:30, 20:24] = float("nan")  # a whole block in the organ
    transform = synth(generator=generator, blend=blend, count=3)
    made = []
    for seed in range(4):
        new_image, new_label = transform(image, label, spacing=ISO, seed=seed)
        made += check(transform, image, label, new_image, new_label)
        touched = ~(torch.eq(image, new_image) | image.isnan())
        assert new_image[touched].abs().max() < 31000
    assert made


def test_an_image_of_nan_is_skipped():
    image, label = scan((24, 24, 24))
    transform = synth(count=2)
    for value in (float("nan"), float("inf")):
        image = torch.full_like(image, value)
        new_image, new_label = transform(image, label, seed=0)
        assert same(new_image, image) and same(new_label, label)
        assert len(transform.report) == 2
        assert all("100% of the organ's voxels" in r["reason"] for r in transform.report)


# -- labels ----------------------------------------------------------------------------------------


def test_several_organs_and_earlier_tumours():
    image, label = scan()
    label[0, 20:26, 20:26, 20:26] = 2
    transform = synth(organ_labels=(1, 3), count=4, gap_mm=3.0)
    new_image, new_label = transform(image, label, spacing=ISO, seed=5)
    assert len(check(transform, image, label, new_image, new_label)) == 4
    _, n = ndimage.label((new_label[0] == 2).numpy(), np.ones((3, 3, 3)))
    assert n == 5  # kept apart from each other and from the old one
    assert (new_label[label == 2] == 2).all()


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
     torch.float16, torch.bfloat16, torch.float32, torch.float64],
    ids=str,
)  # fmt: skip
def test_any_label_dtype(dtype):
    image, label = scan((32, 32, 32))
    transform = synth(count=2)
    expected_image, expected_label = transform(image, label, seed=1)
    new_image, new_label = transform(image, label.to(dtype), seed=1)
    assert new_label.dtype == dtype and same(new_label.to(label.dtype), expected_label)
    assert same(new_image, expected_image)


def test_no_organ_is_no_error():
    image, label = scan((16, 16, 16))
    transform = synth(organ_labels=(7, 8), count=3)
    new_image, new_label = transform(image, label, seed=0)
    assert same(new_image, image) and same(new_label, label)
    (record,) = transform.report
    assert not record["applied"] and "no organ" in record["reason"] and "7" in record["reason"]
    again = transform(image, label, params=transform.params)
    assert same(again[0], image) and transform.report == [record]


def test_no_label_where_the_generator_paints_nothing():
    """An organ label over fat, if asked for: hu2023 changes it. Over air: it does not see that."""
    _, label = scan((40, 40, 40))
    transform = synth(count=2, any_tissue=True)
    for hu in (-110.0, -900.0):
        image = torch.full(label.shape, hu)
        new_image, new_label = transform(image, label, seed=0)
        for r in transform.report:
            if hu == -110.0:
                assert r["applied"] and abs(r["hu_change"]) > 5
            else:
                assert not r["applied"] and "-175 to 250 HU" in r["reason"]
        check(transform, image, label, new_image, new_label)
        again = transform(image, label, params=transform.params)
        assert same(again[0], new_image) and same(again[1], new_label)


def test_an_organ_too_small_is_skipped_with_a_reason():
    image, label = scan((24, 24, 24))
    label[:] = 0
    label[0, 12, 12, 12] = 1
    transform = synth(size_mm=(6, 9), count=2)
    new_image, new_label = transform(image, label, seed=0)
    assert same(new_image, image) and same(new_label, label)
    assert [r["applied"] for r in transform.report] == [False, False]
    assert [(r["sample"], r["index"]) for r in transform.report] == [(0, 0), (0, 1)]
    assert all("no room" in r["reason"] for r in transform.report)


# -- probability -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [{"seed": 1}, {}])
def test_p_0_is_the_identity(call):
    image, label = (torch.stack([x] * 2) for x in scan((16, 16, 16)))
    transform = synth(p=0)
    state = torch.random.get_rng_state()
    new_image, new_label = transform(image, label, **call)
    assert same(new_image, image) and same(new_label, label)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [(r["sample"], r["applied"]) for r in transform.report] == [(0, False), (1, False)]
    again = synth(p=1)(image, label, params=transform.params)  # and so is its replay
    assert same(again[0], image) and same(again[1], label)


def test_p_is_the_probability_of_each_sample():
    image = torch.zeros(400, 1, 2, 2, 2)
    label = torch.zeros_like(image)
    transform = synth(p=0.25)
    transform(image, label, seed=0)
    reasons = [r["reason"] for r in transform.report]
    assert len(reasons) == 400
    tried = ["no organ" in r for r in reasons]
    assert 70 < sum(tried) < 130  # 100 +- 3.5 standard deviations
    assert all("p = 0.25" in r for r, t in zip(reasons, tried, strict=True) if not t)
    transform(image[:7], label[:7], seed=[390, 3, 17, 0, 1, 399, 250])
    some = ["no organ" in r["reason"] for r in transform.report]
    assert some == [tried[i] for i in (390, 3, 17, 0, 1, 399, 250)]


@pytest.mark.parametrize(("count", "numbers"), [(0, {0}), (2, {2}), ((0, 2), {0, 1, 2})])
def test_count(count, numbers):
    image, label = scan((48, 48, 48))
    transform = synth(count=count, size_mm=4)
    seen = set()
    for seed in range(12 if len(numbers) > 1 else 2):
        new_image, _ = transform(image, label, seed=seed)
        seen.add(len(transform.report))
        assert same(new_image, image) == (not transform.report)
    assert seen == numbers


# -- seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
def test_a_sample_depends_only_on_its_own_seed(generator):
    samples = [scan((40, 36, 32), seed=s) for s in range(4)]
    spacings = [(1, 1, 1), (0.8, 0.8, 2), (1, 1, 1), (2, 1, 1)]
    seeds = [3, 11, 12, 5]
    transform = synth(generator=generator, count=2, p=0.9, size_mm=(4, 8))
    alone, reports, params = [], [], []
    for (image, label), spacing, seed in zip(samples, spacings, seeds, strict=True):
        alone.append(transform(image, label, spacing=spacing, seed=seed))
        reports.append(transform.report)
        params.append(transform.params[0])
    assert sum(r["applied"] for rs in reports for r in rs) >= 4
    for order in ([2, 3, 0, 1], [3, 1]):
        batch = [torch.stack([samples[i][k] for i in order]) for k in (0, 1)]
        new_image, new_label = transform(
            *batch, spacing=[spacings[i] for i in order], seed=[seeds[i] for i in order]
        )
        for position, i in enumerate(order):
            assert same(new_image[position], alone[i][0]) and same(new_label[position], alone[i][1])
            assert transform.params[position] == params[i]
            mine = [r for r in transform.report if r["sample"] == position]
            assert [{**r, "sample": 0} for r in mine] == reports[i]
    image, label = samples[0]
    batched = transform(image[None], label[None], spacing=spacings[0], seed=3)
    assert same(batched[0][0], alone[0][0])  # (B, 1, ...) or (1, ...)
    batch = [torch.stack([s[k] for s in samples[1:3]]) for k in (0, 1)]
    counted = transform(*batch, spacing=spacings[1:3], seed=11)  # an int counts up
    assert same(counted[0][1], alone[2][0])


def test_seeds_differ_and_the_global_random_state_stays():
    image, label = scan((40, 40, 40))
    transform = synth(count=2)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    results = [transform(image, label, seed=s)[0] for s in range(6)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert len({raw(r) for r in results}) == 6
    transform(image, label, params=transform.params)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(5)
    first, second = (transform(image, label)[0] for _ in range(2))
    torch.manual_seed(5)
    assert same(transform(image, label)[0], first) and not same(first, second)
    # the report's seed repeats the call
    assert same(transform(image, label, seed=transform.params[0]["seed"])[0], first)


SCRIPT = """
import sys
import torch
sys.path[:0] = {path!r}
torch.set_num_threads({threads})  # the order of a sum, and with it the last bit, depends on it
from test_synthesizer import digest
print(digest())
"""


def digest() -> str:
    found = hashlib.sha256()
    image, label = scan((40, 36, 32))
    for generator, blend in itertools.product(
        ("hu2023", tiny_generator()), ("change", "difftumor")
    ):
        transform = synth(generator=generator, blend=blend, count=2)
        for x in transform(image, label, spacing=(1, 1, 1.5), seed=9):
            found.update(raw(x))
        found.update(json.dumps(transform.params).encode())
    return found.hexdigest()


def test_another_process_gives_the_same():
    here = Path(__file__).resolve().parent
    path = [str(here), str(here.parent), str(here.parents[1])]
    script = SCRIPT.format(path=path, threads=torch.get_num_threads())
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest()


# -- replay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
@pytest.mark.parametrize("merge", [False, True])
def test_params_replay_bit_by_bit(generator, merge):
    image, label = (torch.stack(x) for x in zip(scan(seed=0), scan(seed=1), strict=True))
    label[1, 0, 20:24, 20:24, 20:24] = 2
    image[1, 0, 30:33, 30, 20:25] = float("nan")
    first = synth(generator=generator, count=(1, 3), size_mm=(4, 8), merge=merge, p=0.8)
    other = synth(generator=generator, count=1, size_mm=3, merge=merge, p=0.1)
    for seed in (0, 4):
        expected = first(image, label, spacing=(1.2, 1, 1), seed=seed)
        params, report = first.params, first.report
        for again in (params, tuple(json.loads(json.dumps(params)))):
            replayed = other(image, label, spacing=(1.2, 1, 1), params=again)
            assert same(replayed[0], expected[0]) and same(replayed[1], expected[1])
        strip = [{k: v for k, v in r.items() if k != "index"} for r in report if r["applied"]]
        mine = [{k: v for k, v in r.items() if k != "index"} for r in other.report if r["applied"]]
        assert strip == mine
        assert json.dumps(other.params) == json.dumps(params)  # a replay can be replayed
    assert len(json.dumps(first.params)) < 10_000  # never noise tensors


def test_params_replay_in_a_crowd():
    """Tumours with mass effect side by side: each avoids those before it."""
    image = 110 + 12 * torch.randn(1, 24, 22, 20, generator=torch.Generator().manual_seed(0))
    label = torch.ones(image.shape, dtype=torch.uint8)
    transform = synth(count=12, size_mm=(7, 11), gap_mm=1.0)
    for seed in range(2):
        expected = transform(image, label, seed=seed)
        assert sum(r["applied"] for r in transform.report) >= 4
        replayed = transform(image, label, params=transform.params)
        assert same(replayed[0], expected[0]) and same(replayed[1], expected[1])


@pytest.mark.parametrize(
    "params", [[], {}, [{}], [{}, {}], "params", 5, [None], [{"applied": True}], [[]]]
)
def test_params_of_something_else_are_refused(params):
    image, label = scan((16, 16, 16))
    with pytest.raises(ValueError, match="params must hold one record"):
        synth()(image, label, params=params)


def test_params_of_another_volume_are_refused():
    image, label = scan((56, 52, 48))
    transform = synth(count=3)
    transform(image, label, seed=0)
    part = image[:, :8, :8, :8], label[:, :8, :8, :8]
    with pytest.raises(ValueError, match="of 56 x 52 x 48 voxels, got one of 8 x 8 x 8; pass"):
        transform(*part, params=transform.params)
    earlier = [{k: v for k, v in transform.params[0].items() if k != "grid"}]
    with pytest.raises(ValueError, match="outside the label"):
        transform(*part, params=earlier)


# -- orientation -----------------------------------------------------------------------------------


def reoriented(x: torch.Tensor, axes, flips) -> torch.Tensor:
    return x.permute(axes).flip([i for i in range(3) if flips[i]])


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
def test_the_arrays_orientation_does_not_matter_to_the_generator(generator):
    """One tumour, drawn once, in all 48 orientations of the array: painted alike."""
    image, label = scan((40, 36, 32))
    transform = synth(generator=generator)
    region, rng = OrganRegion.of_label(label[0], 1), torch.Generator().manual_seed(1)
    (tumor,) = place(region, ISO, PlacementSettings(size_mm=9), rng)
    generator = transform.handle.get("cpu")

    def paint(axes, flips):
        shape = [label.shape[1:][a] for a in axes]
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for i, (a, flip) in enumerate(zip(axes, flips, strict=True)):
            affine[a, i] = -1 if flip else 1
        frame = frame_from_affine(affine)
        whole = torch.zeros(label.shape[1:], dtype=torch.bool)
        whole[tumor.slices] = tumor.mask
        whole = reoriented(whole, axes, flips)
        index = whole.nonzero()
        start, stop = index.min(0).values.tolist(), (index.max(0).values + 1).tolist()
        part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        local = LocalMask(tumor.params, tuple(start), whole[part], tumor.voxels, tumor.diameter_mm)
        new_image = reoriented(image[0], axes, flips).clone()
        new_label = reoriented(label[0], axes, flips).clone()
        sample = Sample(0, new_image, new_label, frame)
        request = run_alone(
            request_painting(transform.settings, generator, TumorId(0, 0, 0), sample, local)
        )
        call = Call(transform.settings, generator, transform.painter)
        paint_and_finish(call, [request], [sample], [REPLAYED])
        back = [axes.index(a) for a in range(3)]
        flip = [i for i in range(3) if flips[i]]
        assert new_image.shape == torch.Size(shape)
        return new_image.flip(flip).permute(back), new_label.flip(flip).permute(back)

    expected = paint((0, 1, 2), (False,) * 3)
    assert not same(expected[0], image[0])
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            if generator.name != "hu2023" and sum(flips) not in (0, 3):
                continue  # slower; and a flip may move its crop by a voxel
            new_image, new_label = paint(axes, flips)
            assert torch.equal(new_label, expected[1])
            if generator.name == "hu2023" or not any(flips):
                assert torch.allclose(new_image, expected[0], atol=1e-2)


def test_affine_and_spacing_mean_the_same():
    image, label = scan((40, 36, 32), (0.8, 1, 1.5))
    transform = synth(count=2)
    expected = transform(image, label, spacing=(0.8, 1, 1.5), seed=1)
    affine = np.diag([0.8, 1, 1.5, 1.0])
    affine[:3, 3] = (-20, 30, 100)
    for given_affine in (affine, torch.from_numpy(affine), affine.tolist(), affine[None]):
        found = transform(image, label, affine=given_affine, seed=1)
        assert same(found[0], expected[0]) and same(found[1], expected[1])
    for r in transform.report:
        at = affine @ [*r["centre_voxel"], 1]
        assert r["centre_mm"] == pytest.approx(at[:3].tolist())
    two = transform(torch.stack([image] * 2), torch.stack([label] * 2),
                    affine=np.stack([affine] * 2), seed=[1, 1])  # fmt: skip
    assert same(two[0][1], expected[0])
    one = transform(*scan((24, 24, 24)), seed=1)  # without either: 1 mm
    for spacing in (1, 1.0, [1, 1, 1], torch.ones(3), np.ones(3), torch.ones(1, 3)):
        assert same(transform(*scan((24, 24, 24)), spacing=spacing, seed=1)[0], one[0])


def test_a_metatensors_affine_is_taken_and_kept():
    data = pytest.importorskip("monai.data")
    image, label = scan((40, 36, 32), (0.8, 1, 1.5))
    affine = torch.diag(torch.tensor([-0.8, -1, 1.5, 1], dtype=torch.float64))
    transform = synth(count=2)
    expected = transform(image, label, affine=affine, seed=1)
    new_image, new_label = transform(
        data.MetaTensor(image, affine=affine), data.MetaTensor(label, affine=affine), seed=1
    )
    assert isinstance(new_image, data.MetaTensor) and isinstance(new_label, data.MetaTensor)
    assert torch.equal(new_image.affine, affine)
    assert same(new_image.as_tensor(), expected[0]) and same(new_label.as_tensor(), expected[1])


# -- kinds of input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("blend", ["change", "difftumor"])
def test_any_floating_dtype(dtype, blend):
    image, label = scan((40, 40, 40))
    image = image.to(dtype)
    transform = synth(count=2, blend=blend)
    new_image, new_label = transform(image, label, seed=1)
    assert len(check(transform, image, label, new_image, new_label)) == 2
    wide = transform(image.float(), label, seed=1)
    assert same(new_label, wide[1])
    step = torch.finfo(dtype).eps * 300 + 1e-4
    assert (new_image.double() - wide[0].double()).abs().max() <= step


def test_float64_keeps_its_range():
    image, label = scan((32, 32, 32))
    image = image.double()
    image[0, ::4, ::4, ::4] = 1e200
    transform = synth(count=3, size_mm=(6, 9))
    new_image, new_label = transform(image, label, seed=0)
    check(transform, image, label, new_image, new_label)
    assert new_image.isfinite().all()


def test_memory_layout_does_not_matter():
    image, label = scan((40, 36, 32))
    transform = synth(count=2)
    expected = transform(image, label, seed=2)
    views = {
        "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": lambda x: torch.nn.functional.pad(x, (3, 5, 0, 0, 2, 0))[:, 2:, :, 3:-5],
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }
    for view in views.values():
        a, b = view(image), view(label)
        assert not a.is_contiguous() and torch.equal(a, image)
        found = transform(a, b, seed=2)
        assert same(found[0], expected[0]) and same(found[1], expected[1])
    one = torch.ones((), dtype=torch.uint8).expand(label.shape)  # a single number in memory
    full = transform(image, torch.ones(label.shape, dtype=torch.uint8), seed=2)
    found = transform(image.expand(2, 1, -1, -1, -1), one.expand(2, 1, -1, -1, -1), seed=[2, 3])
    assert same(found[0][0], full[0]) and same(found[1][0], full[1]) and (one == 1).all()


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
@pytest.mark.parametrize("blend", ["change", "difftumor"])
def test_autocast_changes_nothing(generator, blend):
    image, label = scan((32, 32, 32))
    transform = synth(generator=generator, blend=blend, count=1)
    expected = transform(image, label, spacing=(1.2, 1, 0.8), seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = transform(image, label, spacing=(1.2, 1, 0.8), seed=1)
    assert same(found[0], expected[0]) and same(found[1], expected[1])


@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
def test_the_result_goes_into_training(generator):
    image, label = scan((24, 24, 24))
    transform = synth(generator=generator, count=1)
    new_image, new_label = transform(image.requires_grad_(), label, seed=1)
    assert not new_image.is_inference() and not new_image.requires_grad
    network = torch.nn.Conv3d(1, 4, 3, padding=1)
    torch.nn.functional.cross_entropy(network(new_image[None]), new_label.long()).backward()
    assert network.weight.grad.abs().sum() > 0
    new_image += 1  # and may be changed in place, without reaching the input
    assert image.grad is None and same(transform(image, label, seed=1)[0], new_image - 1) is False


def test_copies_and_pickles_are_the_same_transform():
    image, label = scan((32, 32, 32))
    transform = synth(count=2)
    expected = transform(image, label, seed=1)
    assert len(pickle.dumps(synth())) < 2000 and not transform.state_dict()
    for other in (
        copy.deepcopy(transform),
        pickle.loads(pickle.dumps(transform)),
        transform.eval(),
    ):
        found = other(image, label, seed=1)
        assert same(found[0], expected[0]) and same(found[1], expected[1])
    assert "hu2023" in repr(transform)


# -- intensity scales ------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize("generator", ["hu2023", TINY], ids=["hu2023", "diffusion"])
@pytest.mark.parametrize(
    "scale",
    [ts.Scaled(-175, 250, 0, 1), ts.Scaled(-1000, 1000, -1, 1), ts.ZScore(80, 40, -170, 240),
     ts.ZScore(-20.5, 111), ts.Scaled(-175, 250, 0, 255, clip=False)],
    ids=str,
)  # fmt: skip
def test_other_scales_get_the_same_tumours(scale, generator, blend):
    image, label = scan((40, 40, 40))
    image.clamp_(-160, 230)
    arguments = {"generator": generator, "blend": blend, "count": 2}
    expected = synth(**arguments)(image, label, seed=3)
    transform = synth(intensity=scale, **arguments)
    offset = float(scale.to_hu(torch.zeros(1)))
    scaled = (image - offset) / scale.hu_per_unit
    assert torch.allclose(scale.to_hu(scaled), image, atol=1e-3)
    new_image, new_label = transform(scaled, label, seed=3)
    assert same(new_label, expected[1])
    check(transform, scaled, label, new_image, new_label)
    unchanged = torch.eq(image, expected[0])
    if scale.limits is not None:
        low, high = scale.limits
        assert new_image.min() >= low and new_image.max() <= high
    limits = [-1e9, 1e9] if scale.limits is None else scale.to_hu(torch.tensor(scale.limits))
    wanted = torch.where(unchanged, image, expected[0].clamp(float(limits[0]), float(limits[1])))
    difference = (scale.to_hu(new_image) - wanted).abs()
    # the generators' own thresholds turn rounding into a little more
    assert difference.max() < 0.5 and difference.mean() < 1e-3


def test_values_stay_within_a_clipped_scale():
    image, label = scan((40, 40, 40))
    image[0, 20:] -= 280  # an organ at the lower end of the window
    scaled = ((image + 175) / 425).clamp(0, 1)
    for blend in ("change", "difftumor"):
        transform = synth(intensity=ts.Scaled(), count=4, blend=blend)
        for seed in range(4):
            new_image, new_label = transform(scaled, label, seed=seed)
            assert new_image.min() >= 0 and new_image.max() <= 1


# -- as published ----------------------------------------------------------------------------------


def test_difftumor_equals_the_published_pipeline_at_1_mm():
    """(1 - a) x + a inpaint(x), a = SciPy's gaussian_filter of the mask, on the clipped image."""
    generator = tiny_generator(5, crop_size=96, crop_multiple=32)
    image, label = scan((96, 96, 96))
    transform = synth(
        generator=generator, blend="difftumor", sigma_mm=2.0, size_mm=(9, 14), count=1
    )
    new_image, new_label = transform(image, label, spacing=ISO, seed=1)
    (record,) = transform.report
    x = ((image.clamp(-175, 250) + 175) / 425)[None]
    mask = (new_label == 2)[None]
    rng = torch.Generator().manual_seed(record["seed"])
    noise = torch.randn(5, 8, 24, 24, 24, generator=rng)[:, None]
    painted = generator.inpaint(x, mask, noise=noise)
    a = torch.from_numpy(ndimage.gaussian_filter(mask[0, 0].double().numpy(), 2.0))
    expected = (1 - a) * x.double() + a * painted.double()
    difference = (new_image.double() - (expected[0] * 425 - 175)).abs()
    assert difference.max() < 2e-3  # HU, of values up to 250
    assert (new_image - image).abs().max() > 1


# -- bad input -----------------------------------------------------------------------------------

IMAGE, LABEL = scan((16, 16, 16))


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "image must be a torch tensor, got ndarray", (IMAGE.numpy(), LABEL)),
        (TypeError, "label must be a torch tensor, got list", (IMAGE, [1])),
        (ValueError, r"image must be .*got \(16, 16, 16\)", (IMAGE[0], LABEL[0])),
        (ValueError, r"image must be .*got \(2, 16, 16, 16\)",
         (IMAGE.repeat(2, 1, 1, 1), LABEL.repeat(2, 1, 1, 1))),
        (ValueError, "image must be", (IMAGE[None].repeat(1, 2, 1, 1, 1), LABEL[None])),
        (ValueError, "at least one voxel", (IMAGE[:, :0], LABEL[:, :0])),
        (ValueError, "at least one voxel", (IMAGE[None][:0], LABEL[None][:0])),
        (ValueError, "label must have the image's shape", (IMAGE, LABEL[:, 1:])),
        (ValueError, "label must have the image's shape", (IMAGE, LABEL[None])),
        (TypeError, "image must be floating point, got torch.int16", (LABEL, LABEL)),
        (TypeError, "image must be floating point, got torch.complex64",
         (IMAGE.to(torch.complex64), LABEL)),
        (TypeError, "label must hold whole numbers", (IMAGE, LABEL.to(torch.complex64))),
        (ValueError, "does not fit the label's dtype torch.bool", (IMAGE, LABEL.bool())),
        (ValueError, "must be on one device", (IMAGE, LABEL.to("meta"))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("p", [0, 1])
def test_unusable_tensors_are_refused(error, words, arguments, p):
    with pytest.raises(error, match=words):
        synth(p=p)(*arguments, seed=0)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("spacing must be three numbers in mm", {"spacing": (0.0, 1, 1)}),
        ("spacing must be", {"spacing": (1, 1)}),
        ("spacing must be", {"spacing": (1, 1, float("nan"))}),
        ("spacing must be", {"spacing": -1}),
        ("spacing must be", {"spacing": "1 mm"}),
        ("spacing must be", {"spacing": [[1, 1, 1]] * 3}),
        ("spacing must be", {"spacing": {"x": 1}}),
        ("affine must be", {"affine": np.eye(3)}),
        ("affine must", {"affine": np.zeros((4, 4))}),
        ("affine must be", {"affine": np.stack([np.eye(4)] * 3)}),
        ("affine must be", {"affine": "RAS"}),
        ("must not both be given", {"affine": np.eye(4), "spacing": (1, 1, 1)}),
        ("seed must be", {"seed": -1}),
        ("seed must be", {"seed": [1, 2]}),
        ("seed must be", {"seed": 0.5}),
        ("seed must be", {"seed": "0"}),
    ],
)
def test_unusable_arguments_are_refused(words, arguments):
    with pytest.raises(ValueError, match=words):
        synth()(IMAGE, LABEL, **arguments)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "p must be", {"p": 1.5}),
        (ValueError, "p must be", {"p": -0.1}),
        (ValueError, "p must be", {"p": float("nan")}),
        (ValueError, "p must be", {"p": "1"}),
        (ValueError, "p must be", {"p": None}),
        (ValueError, "tumor_label must be a whole number", {"tumor_label": 1.5}),
        (ValueError, "tumor_label must be a whole number", {"tumor_label": "two"}),
        (ValueError, "tumor_label must be a whole number", {"tumor_label": None}),
        (ValueError, "tumor_label must be a whole number", {"tumor_label": float("inf")}),
        (ValueError, "tumor_label must be a whole number", {"tumor_label": True}),
        (ValueError, "tumor_label must differ", {"tumor_label": 1}),
        (ValueError, "organ_labels must be", {"organ_labels": ()}),
        (ValueError, "organ_labels must be", {"organ_labels": None}),
        (ValueError, "organ_labels must be", {"organ_labels": (1.5,)}),
        (ValueError, "got 'liver' alone; pass for example", {"organ_labels": "liver"}),
        (ValueError, "got b'liver'; look up which number", {"organ_labels": b"liver"}),
        (ValueError, "got .'liver', 'spleen'. alone; pass", {"organ_labels": ["liver", "spleen"]}),
        (ValueError, "got '1' alone; pass for example", {"organ_labels": "1"}),
        (ValueError, "organ's values .* pass for example", {"organ_labels": {1: "liver"}}),
        (ValueError, "at most 1000 of them", {"organ_labels": range(1, 2000)}),
        (ValueError, "count must be", {"count": -1}),
        (ValueError, "count must be", {"count": 1.5}),
        (ValueError, "count must be", {"count": (3, 1)}),
        (ValueError, "count must be", {"count": (1, 2, 3)}),
        (ValueError, "count must be", {"count": "many"}),
        (ValueError, "size_mm must be", {"size_mm": 0}),
        (ValueError, "size_mm must be", {"size_mm": (20, 5)}),
        (ValueError, "size_mm must be", {"size_mm": (-5, 5)}),
        (ValueError, "size_mm must be", {"size_mm": (5, float("inf"))}),
        (ValueError, "size_mm must be", {"size_mm": (5, float("nan"))}),
        (ValueError, "size_mm must be", {"size_mm": (1, 2, 3)}),
        (ValueError, "size_mm must be", {"size_mm": None}),
        (ValueError, "size prior must be one of .*liver", {"size_mm": "brain"}),
        (ValueError, "sigma_mm must be", {"sigma_mm": -1}),
        (ValueError, "sigma_mm must be", {"sigma_mm": (2, 1)}),
        (ValueError, "gap_mm must be", {"gap_mm": -1}),
        (ValueError, "gap_mm must be", {"gap_mm": None}),
        (ValueError, "blend must be one of change, difftumor", {"blend": "poisson"}),
        (TypeError, "intensity must be", {"intensity": None}),
        (TypeError, "intensity must be", {"intensity": ts.HU}),
        (TypeError, "intensity must be", {"intensity": "HU"}),
        (TypeError, "generator must be", {"generator": None}),
        (FileNotFoundError, "hu2023", {"generator": "no-such-thing"}),
    ],
)
def test_unusable_settings_are_refused(error, words, settings):
    with pytest.raises(error, match=words):
        synth(**settings)


def test_a_tumour_label_that_the_dtype_cannot_hold():
    for tumor_label, dtype in ((300, torch.uint8), (-1, torch.uint8), (2049, torch.float16)):
        with pytest.raises(ValueError, match=f"tumor_label {tumor_label} does not fit"):
            synth(tumor_label=tumor_label)(IMAGE, LABEL.to(dtype), seed=0)


@pytest.mark.parametrize(
    "labels", [1, (1,), [1], np.int64(1), np.array([1]), torch.tensor([1]), {1}]
)
def test_organ_labels_in_any_form(labels):
    assert synth(organ_labels=labels).organ_labels == (1,)


def test_shapes_and_settings_in_any_form():
    image, label = scan((32, 32, 32))
    expected = synth(size_mm=(4.0, 6.0), count=(1, 2))(image, label, seed=0)
    for size in ([4, 6], (np.float64(4), np.int64(6))):
        found = synth(size_mm=size, count=[1, 2], p=np.float32(1))(image, label, seed=0)
        assert same(found[0], expected[0])


@pytest.mark.parametrize("scaled", [ts.Scaled(-175, 250, 0, 1), ts.ZScore(40.0, 150.0)])
def test_a_scaled_image_called_hu_is_refused(scaled):
    image, label = scan()
    values = (image - scaled.to_hu(torch.zeros(()))) / scaled.hu_per_unit
    values = values.clamp(*scaled.limits) if scaled.limits else values.clamp(-3, 3)
    with pytest.raises(ValueError, match="Hounsfield units.*Scaled"):
        synth()(values, label, seed=0)
    synth(intensity=scaled)(values, label, seed=0)


@pytest.mark.parametrize("blend", ["change", "difftumor"])
def test_gas_and_bone_beside_a_tumour_stay(blend):
    """They lie beyond the generator's window, which shows them as its ends."""
    rng = torch.Generator().manual_seed(0)
    image = 100 + 10 * torch.randn(1, 64, 64, 64, generator=rng)
    image[:, :24], image[:, 40:] = -900.0, 900.0
    label = torch.zeros(image.shape, dtype=torch.uint8)
    label[:, 24:40] = 1
    transform = ts.SynthesizeTumor("hu2023", count=1, size_mm=14.0, blend=blend, sigma_mm=3.0)
    after, made = transform(image, label, spacing=1.0, seed=2)
    changed = (after - image).abs()
    assert int((made == 2).sum()) > 500 and float(changed[:, 24:40].max()) > 10
    assert float(changed[:, :24].max()) < 30 and float(changed[:, 40:].max()) < 30
