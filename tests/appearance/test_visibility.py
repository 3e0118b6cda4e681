"""Visibility: what it measures, where the report has it, and what becomes of faint tumours."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import ndimage

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.appearance.gate import LIMITS, Gate
from tumorsynth.appearance.noise import ScanNoise, measure_noise
from tumorsynth.appearance.visibility import (
    VISIBLE_FROM,
    FaintTumorWarning,
    contrast_for,
    measure_visibility,
    section_mm2,
    visibility,
)
from tumorsynth.geometry import bounding_box
from tumorsynth.phantom.landmarks import LABELS
from tumorsynth.pipeline.paint import Painter
from tumorsynth.pipeline.settings import Settings
from tumorsynth.placement.rasterize import equivalent_diameter

ISO = (1.0, 1.0, 1.0)
COARSE = (3.0, 3.0, 3.0)
OPEN = Gate(**dict.fromkeys(LIMITS))  # measures, never rejects


def scan(noise=12.0, level=50.0, spacing=COARSE, side_mm=120, seed=0):
    """An organ (1) in fat; with the defaults an unenhanced liver in thick, noisy slices."""
    axes = [(torch.arange(round(side_mm / s)) + 0.5) * s - side_mm / 2 for s in spacing]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    organ = grid.square().sum(0).sqrt() < 0.42 * side_mm
    rng = torch.Generator().manual_seed(seed)
    hu = torch.where(organ, level, -100.0) + noise * torch.randn(organ.shape, generator=rng)
    return hu[None], organ[None].to(torch.int16)


def synth(generator="hu2023", **changes):
    settings = {"organ_labels": 1, "tumor_label": 2, "count": 3, "size_mm": (5, 20)}
    return ts.SynthesizeTumor(generator, **{**settings, **changes})


def call(transform, image, label, seed=0, spacing=COARSE, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FaintTumorWarning)
        seed = None if "params" in more else seed
        result = transform(image, label, spacing=spacing, seed=seed, **more)
    json.dumps(transform.report, allow_nan=False)
    return result


def own_contrast():
    """Within it, every generator keeps its own contrast, whatever the noise."""
    return mock.patch.object(Settings, "keeps_visible", False)


# -- the measure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 8.0), (0.8, 0.8, 5.0)])
def test_visibility_is_the_contrast_over_the_noise_of_the_mean_of_a_section(sigma, spacing):
    """By the noise of many discs' means; sigma: of the scan's filter, in voxels of its plane."""
    rng = np.random.default_rng(0)
    radius = 9.0
    side = round(48 / spacing[0])
    x, y = np.meshgrid(*[(np.arange(side) - side // 2) * spacing[0]] * 2, indexing="ij")
    disc = np.hypot(x, y) <= radius
    planes = ndimage.gaussian_filter(rng.normal(0, 10, (60, side, side)), (0, sigma, sigma))
    planes *= 10 / planes.std()
    of_means = np.std([plane[disc].mean() for plane in planes])
    volume = torch.from_numpy(np.moveaxis(planes, 0, 2)).float()
    noise = measure_noise(volume, torch.ones_like(volume, dtype=torch.bool), spacing)
    section = math.pi * radius**2
    expected = contrast_for(1.0, section, noise, spacing)
    # near its border a disc averages more than the formula knows: a careful estimate
    assert 0.65 < of_means / expected < 1.3
    assert visibility(-20.0, section, noise, spacing) == pytest.approx(20.0 / expected)


def test_noise_is_the_standard_deviation_of_the_organ_without_vessels():
    hu, organ = (x[0] for x in scan(noise=9.0, spacing=ISO))
    vessel = torch.zeros_like(organ, dtype=torch.bool)
    vessel[60, 40:80, 50:70] = True
    for values in (hu, hu.round(), (hu / 4).round() * 4, torch.where(vessel, hu + 150, hu)):
        noise = measure_noise(values, organ == 1, ISO)
        assert noise.sd_hu == pytest.approx(9.0, rel=0.06)
        assert noise.level_hu == pytest.approx(50.0, abs=2.1)  # half a step of 4
    hu[organ == 1][::7] = math.nan
    assert measure_noise(hu, organ == 1, ISO).sd_hu == pytest.approx(9.0, rel=0.06)


def test_what_cannot_be_measured_is_none():
    hu, organ = (x[0] for x in scan())
    nothing = torch.zeros_like(organ, dtype=torch.bool)
    assert measure_noise(hu, nothing, COARSE).sd_hu is None
    assert measure_visibility(hu, organ == 1, nothing, COARSE) is None
    assert measure_visibility(hu, nothing, organ == 1, COARSE) is None
    assert visibility(-30.0, 80.0, ScanNoise(ISO, 50.0, 0.0), ISO) is None
    assert visibility(math.nan, 80.0, ScanNoise(ISO, 50.0, 9.0), ISO) is None


@pytest.mark.parametrize("thick", [0, 1, 2])
@pytest.mark.parametrize("per_slice", [(16,), (10, 6), (2, 12, 2), (5, 6, 5)])
def test_in_thick_slices_a_tumour_is_as_visible_as_its_largest_section(thick, per_slice):
    """The volume of all slices together would count what no slice shows."""
    spacing = tuple(8.0 if axis == thick else 2.0 for axis in range(3))
    hu = 100 + 11 * torch.randn(9, 40, 40, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(hu.shape, dtype=torch.bool)
    for number, voxels in enumerate(per_slice):
        mask[3 + number].view(-1)[800 : 800 + voxels] = True
    hu[mask] -= 30
    contrast = 100 - float(hu[mask].mean())
    hu, mask = (volume.movedim(0, thick) for volume in (hu, mask))
    found = measure_visibility(hu, mask, ~mask, spacing)
    assert found == pytest.approx(contrast / 11 * math.sqrt(max(per_slice)), rel=0.1)


def test_the_section_does_not_depend_on_the_order_of_axes():
    mask = torch.zeros(9, 9, 9, dtype=torch.bool)
    mask[2, 2:5, 2:7] = True
    mask[3, 3, 3] = True
    for spacing in ((3.0, 3.0, 3.0), (3.0, 3.0, 5.0), (2.0, 5.0, 5.0)):
        areas = {
            round(section_mm2(mask.permute(order), 12.0, [spacing[a] for a in order]), 6)
            for order in itertools.permutations(range(3))
        }
        assert len(areas) == 1
    assert section_mm2(mask, 14.0, (3.0, 3.0, 3.0)) == 15 * 9  # of the three planes the best


def test_in_fine_voxels_a_tumour_is_as_visible_as_a_ball_of_its_volume():
    hu = 100 + 11 * torch.randn(30, 30, 30, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(hu.shape, dtype=torch.bool)
    mask[10:20, 12:17, 10:20] = True
    found = measure_visibility(hu - 30 * mask, mask, ~mask, ISO)
    section = math.pi / 4 * equivalent_diameter(500) ** 2
    assert found == pytest.approx(30 / 11 * math.sqrt(section), rel=0.1)


@pytest.mark.parametrize("voxels", [1, 40])
def test_a_speck_is_one_sample_of_noise_at_least(voxels):
    noise = ScanNoise(ISO, 50.0, 10.0)
    diameter = (6 * voxels / math.pi) ** (1 / 3)
    section = math.pi / 4 * diameter**2
    assert visibility(-20.0, section, noise, ISO) >= 0.5  # not below contrast over noise / 4


def test_most_annotated_tumours_are_visible_and_most_outlines_of_nothing_are_not(shared: Path):
    nibabel = pytest.importorskip("nibabel")
    folder = shared / "data" / "ct"
    found = []
    for name in ("lits000", "radcttace_0697_eqp"):
        image = nibabel.load(folder / f"{name}_ct.nii.gz")
        spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
        hu = torch.from_numpy(np.asarray(image.dataobj, np.float32))
        label = np.asarray(nibabel.load(folder / f"{name}_label.nii.gz").dataobj)
        parts, count = ndimage.label(label == 2, structure=np.ones((3, 3, 3)))
        for index, box in enumerate(ndimage.find_objects(parts), 1):
            margin = [math.ceil(8 / s) for s in spacing]
            part = tuple(
                slice(max(0, b.start - m), b.stop + m) for b, m in zip(box, margin, strict=True)
            )
            mask = parts[part] == index
            if mask.sum() * math.prod(spacing) < 50:
                continue
            far = ndimage.distance_transform_edt(~mask, sampling=spacing) > 2
            around = torch.from_numpy((label[part] == 1) & far)
            found.append(measure_visibility(hu[part], torch.from_numpy(mask), around, spacing))
    assert len(found) >= 10
    assert np.mean([value >= VISIBLE_FROM for value in found]) >= 0.8, found


# -- in the report ---------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize("contrast", [None, -60.0])
def test_every_record_has_its_visibility_with_and_without_a_gate(blend, contrast):
    image, label = scan(level=110.0, noise=8.0, spacing=ISO, side_mm=70)
    found = []
    for gate in (None, OPEN):
        transform = synth(blend=blend, contrast_hu=contrast, gate=gate)
        call(transform, image, label, spacing=ISO)
        found.append([r["visibility"] for r in transform.report if r["applied"]])
    assert found[0] == found[1] and len(found[0]) == 3
    assert found[1] == [r["scores"]["visibility"] for r in transform.report]
    assert all(math.isfinite(value) and value > 0 for value in found[0])


def test_visibility_falls_with_the_noise_and_grows_with_contrast_and_size():
    def mean(noise, contrast, size):
        image, label = scan(noise=noise, level=110.0, spacing=ISO, side_mm=80)
        transform = synth(contrast_hu=contrast, size_mm=size)
        call(transform, image, label, spacing=ISO)
        return np.mean([r["visibility"] for r in transform.report if r["applied"]])

    middle = mean(12.0, -30.0, 10.0)
    assert mean(24.0, -30.0, 10.0) == pytest.approx(middle / 2, rel=0.15)
    assert mean(12.0, -60.0, 10.0) == pytest.approx(2 * middle, rel=0.15)
    assert mean(12.0, -30.0, 20.0) > 1.7 * middle


def test_without_noise_nothing_is_said_and_nothing_is_skipped():
    image, label = scan(noise=0.0)
    transform = synth()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(image, label, spacing=COARSE, seed=0)
    assert [(r["applied"], r["visibility"]) for r in transform.report] == [(True, None)] * 3


@pytest.mark.parametrize(
    "scale", [ts.Scaled(-175, 250, 0, 1), ts.ZScore(50.0, 100.0, -175.0, 250.0)]
)
def test_visibility_is_the_same_in_any_scale(scale):
    image, label = scan(level=110.0, noise=8.0)
    plain, scaled = synth(contrast_hu=-40.0), synth(contrast_hu=-40.0, intensity=scale)
    call(plain, image, label)
    if isinstance(scale, ts.Scaled):
        call(scaled, (image.clamp(-175, 250) + 175) / 425, label)
    else:
        call(scaled, (image.clamp(-175, 250) - 50.0) / 100.0, label)
    for one, other in zip(plain.report, scaled.report, strict=True):
        assert one["visibility"] == pytest.approx(other["visibility"], rel=0.02)


# -- the default contrast --------------------------------------------------------------------------


@pytest.mark.parametrize(("generator", "seeds"), [("hu2023", range(4)), ("liver-early", [1])])
def test_the_default_contrast_is_visible_or_the_tumour_is_skipped(generator, seeds):
    raised = skipped = kept = 0
    transform = synth(generator)
    for seed in seeds:
        image, label = scan(seed=seed)
        with own_contrast():
            own_image, own_label = call(transform, image, label, seed=seed)
            own = transform.report
        new_image, new_label = call(transform, image, label, seed=seed)
        for before, after in zip(own, transform.report, strict=True):
            if before["visibility"] >= VISIBLE_FROM:
                assert before == after
                kept += 1
            elif after["applied"]:
                assert after["visibility"] >= VISIBLE_FROM
                assert 0 < abs(after["contrast_hu"]) <= 60
                assert after["centre_voxel"] == before["centre_voxel"]
                raised += 1
            else:
                assert after["code"] == "faint" and "would hide a tumour" in after["reason"]
                skipped += 1
        if all(r["visibility"] >= VISIBLE_FROM for r in own):
            assert torch.equal(own_image, new_image) and torch.equal(own_label, new_label)
        # solid tissue does not become fluid
        assert float((new_image - image)[new_label == 2].mean()) > -45
    assert raised and kept and raised + kept > skipped


class Changes:
    """Adds ``by`` HU to the mask, or what is asked for."""

    name, window, crop_size, crop_multiple = "changes", (-175.0, 250.0), 64, 1
    own_edge, even, keeps_detail = False, False, True
    device, card = torch.device("cpu"), {"name": "changes"}

    def __init__(self, by, **more):
        self.by = by
        vars(self).update(more)

    def to(self, device):
        return self

    def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return tumor_mask * ((contrast_hu or [self.by])[0] / 425)

    def inpaint(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return crop + self.change(crop, tumor_mask, seed, contrast_hu)


def raised_contrasts(generator, level=60.0, seeds=range(4)):
    """The contrasts to which faint tumours were raised in lumpy tissue."""
    found = []
    for seed in seeds:
        image, label = scan(level=level, noise=10.0, seed=seed)
        lumps = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        image += 12 * torch.nn.functional.interpolate(lumps, image.shape[1:], mode="trilinear")[0]
        transform = synth(generator)
        call(transform, image, label, seed=seed)
        found += [tumor.get("raised_hu") for tumor in transform.params[0]["tumors"]]
    return [contrast for contrast in found if contrast is not None]


def test_a_faint_tumour_is_raised_the_way_its_generator_goes():
    assert max(raised_contrasts(Changes(-15.0))) < 0 < min(raised_contrasts(Changes(15.0)))
    for by in (-15.0, 0.1, 3.0):  # the last is less than the lumps
        raised = raised_contrasts(Changes(by, darkens=True))
        assert raised and max(raised) < 0
    assert min(raised_contrasts(Changes(3.0))) < 0  # where the place is darker than the tissue


@cache
def fine_phantom():
    return ts.make_phantom(spacing=(1.5, 1.5, 1.5))


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
def test_dark_tumours_never_become_bright_ones(generator):
    """In bile and stool, whose lumps are darker and brighter than any such tumour."""
    assert ts.load_generator(generator).darkens and not ts.load_generator("lung").darkens
    ct = fine_phantom()
    for organ in (LABELS["gallbladder"], LABELS["colon"]):
        box = bounding_box(ct.label[0] == organ, 24)
        part = (0, *box.slices)
        transform = synth(generator, organ_labels=organ, tumor_label=99, count=1, size_mm=(6, 18))
        for seed in (0, 2):
            call(transform, ct.image[part][None], ct.label[part][None], seed, (1.5, 1.5, 1.5))
            assert all(record.get("hu_change", 0) < 10 for record in transform.report)


def test_visible_tumours_keep_every_bit():
    image, label = scan(level=110.0, noise=8.0, spacing=ISO, side_mm=80)
    for generator in ("hu2023", "liver-early"):
        transform = synth(generator)
        with own_contrast():
            own = call(transform, image, label, spacing=ISO)
        new = call(transform, image, label, spacing=ISO)
        assert all(map(torch.equal, own, new))
        assert all(r["contrast_hu"] is None for r in transform.report)


def test_a_tumour_that_noise_would_hide_is_skipped_with_a_reason_and_replays():
    image, label = scan(noise=70.0)
    transform = synth()
    new_image, new_label = call(transform, image, label)
    assert new_image is image and new_label is label
    for record in transform.report:
        assert not record["applied"] and record["code"] == "faint"
        assert " would hide a tumour" in record["reason"] and "set contrast_hu" in record["reason"]
    again = synth()
    call(again, image, label, params=json.loads(json.dumps(transform.params)))
    assert again.report == transform.report
    assert json.dumps(again.params) == json.dumps(transform.params)


def outcome(record):
    return record.get("code", "raised" if record.get("contrast_hu") else "own")


@pytest.mark.parametrize("changes", [{}, {"mass_effect": 0.4}, {"gate": True}])
def test_raised_and_skipped_tumours_replay_bit_by_bit(changes):
    codes = set()
    for seed in range(3):
        image, label = scan(noise=16.0, seed=seed)
        transform = synth(count=4, **changes)
        made = call(transform, image, label, seed=seed)
        codes |= set(map(outcome, transform.report))
        params = json.loads(json.dumps(transform.params))
        again = synth(count=4)
        assert all(map(torch.equal, made, call(again, image, label, params=params)))
        assert [r["applied"] for r in again.report] == [r["applied"] for r in transform.report]
        assert json.dumps(again.params) == json.dumps(transform.params)
    assert {"raised"} < codes


def run_as_a_gpu(painter, batch, *arguments, run=Painter._run_generator):
    """The last bits of a crop depend on how many it is painted with, and which of them it is."""
    made = [run(painter, [request], *arguments) for request in batch]
    return torch.cat([one * (1 + 1e-6 * len(made)) + 1e-6 * i for i, one in enumerate(made)])


def accepts_half(hu, tumor_mask, spacing):
    return float(hu[tumor_mask].sum()) % 2 < 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mass_effect": 0.4},
        {"gate": Gate(scorer=accepts_half, off_hu=None), "mass_effect": 0.4},
        {"gate": Gate(scorer=accepts_half, tries=1), "contrast_hu": (-60, -30)},
        {"gate": Gate(scorer=accepts_half, tries=2), "contrast_hu": "liver-portal"},
        {
            "gate": Gate(scorer=accepts_half, visibility=None),
            "blend": "difftumor",
            "mass_effect": 0.4,
        },
    ],
)
def test_a_replay_forms_the_batches_of_the_call(changes, monkeypatch):
    """With raised, retried and skipped tumours, where the last bits depend on the batch."""
    monkeypatch.setattr(Painter, "_batch_size", lambda self, device: 3)
    monkeypatch.setattr(Painter, "_run_generator", run_as_a_gpu)
    codes, retries, raised, own = set(), 0, 0, 0
    for seed in range(3):
        parts = zip(*(scan(noise=16.0 - 5 * b, level=80.0, seed=seed) for b in (0, 1)), strict=True)
        image, label = map(torch.stack, parts)
        transform = synth(count=4, **changes)
        made = call(transform, image, label, seed=seed)
        params = json.loads(json.dumps(transform.params))
        again = synth(count=4, blend=changes.get("blend", "change"))
        assert all(map(torch.equal, made, call(again, image, label, params=params)))
        assert [r["applied"] for r in again.report] == [r["applied"] for r in transform.report]
        assert json.dumps(again.params) == json.dumps(transform.params)
        codes |= {r["code"] for r in transform.report if not r["applied"]}
        tumors = [tumor for entry in params for tumor in entry["tumors"]]
        retries += sum(tumor.get("retries", 0) for tumor in tumors)
        raised += sum("raised_hu" in tumor for tumor in tumors)
        own += sum("retries" not in tumor and "raised_hu" not in tumor for tumor in tumors)
    assert own and codes & {"faint", "gate"}
    assert bool(raised) == ("contrast_hu" not in changes and "blend" not in changes)
    gate = changes.get("gate")
    assert bool(retries) == (gate is not None and gate.tries > 1)


def test_params_of_several_calls_replay_together(monkeypatch):
    """One with a contrast and one without, and a raised one of an earlier version."""
    monkeypatch.setattr(Painter, "_batch_size", lambda self, device: 8)
    scans = [scan(noise=16.0, seed=seed) for seed in range(2)]
    image, label = map(torch.stack, zip(*scans, strict=True))
    own, asked = synth(), synth(contrast_hu=-30.0)
    call(own, *scans[0], seed=0)
    call(asked, *scans[1], seed=1)
    earlier = json.loads(json.dumps(own.params))
    for tumor in earlier[0]["tumors"]:
        tumor["contrast_hu"] = tumor.pop("raised_hu", None)
    assert len({tumor["contrast_hu"] for tumor in earlier[0]["tumors"]}) > 1
    for entry in (own.params, earlier):
        again = synth()
        call(again, image, label, params=[*entry, *asked.params])
        found = [(r["applied"], r.get("contrast_hu")) for r in again.report]
        assert found == [(r["applied"], r.get("contrast_hu")) for r in own.report + asked.report]


@pytest.mark.parametrize(
    "changes",
    [{"contrast_hu": (-6, -4)}, {"contrast_hu": ts.ContrastPrior(iso=(-2, 2), hypo=(-5, -3))}],
)
def test_a_contrast_of_the_users_is_obeyed(changes):
    image, label = scan(level=110.0)
    transform = synth(**changes)
    with pytest.warns(FaintTumorWarning):
        transform(image, label, spacing=COARSE, seed=0)
    assert all(r["applied"] for r in transform.report)
    assert all(abs(r["contrast_hu"]) <= 6 for r in transform.report)


def test_the_published_blend_is_left_as_it_is():
    image, label = scan()
    transform = synth(blend="difftumor")
    with pytest.warns(FaintTumorWarning):
        transform(image, label, spacing=COARSE, seed=0)
    assert all(r["applied"] and r["contrast_hu"] is None for r in transform.report)


class Stubborn:
    """Darkens by 4 HU whatever contrast is asked for."""

    name, window, crop_size, crop_multiple = "stubborn", (-175.0, 250.0), 64, 1
    own_edge, even, keeps_detail = False, False, True
    device, card = torch.device("cpu"), {"name": "stubborn"}

    def to(self, device):
        return self

    def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return torch.full_like(crop, -4 / 425)

    def inpaint(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return crop + tumor_mask * self.change(crop, tumor_mask, seed)


def test_a_generator_without_control_of_contrast_skips_what_nobody_sees():
    image, label = scan()
    transform = synth(Stubborn())
    call(transform, image, label)
    assert {r["code"] for r in transform.report} == {"faint"}
    image, label = scan(noise=0.5)
    call(transform, image, label)
    assert all(r["applied"] for r in transform.report)


# -- warnings --------------------------------------------------------------------------------------


def warned(transform, image, label, seed=0, **more):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seed = None if "params" in more else seed
        transform(image, label, spacing=COARSE, seed=seed, **more)
    return [str(w.message) for w in caught if w.category is FaintTumorWarning]


def test_a_transform_warns_once_with_the_value_and_what_to_do():
    image, label = scan(level=110.0)
    for _ in range(2):  # the next transform warns again
        transform = synth(contrast_hu=-5.0)
        (words,) = warned(transform, image, label)
        assert "must be 5 or more, got " in words and "gate=True" in words
        assert warned(transform, image, label, seed=1) == []
    assert warned(pickle.loads(pickle.dumps(transform)), image, label) == []
    fresh = pickle.loads(pickle.dumps(synth(contrast_hu=-5.0)))
    assert len(warned(fresh, image, label)) == 1


def test_nobody_is_warned_of_what_is_visible_gated_or_replayed():
    image, label = scan(level=110.0)
    transform = synth(contrast_hu=-60.0, size_mm=(12, 20))
    assert warned(transform, image, label) == []
    assert warned(synth(contrast_hu=-5.0, gate=OPEN), image, label) == []
    call(transform := synth(contrast_hu=-5.0), image, label)
    assert warned(synth(), image, label, params=transform.params) == []
    noisy, label = scan(noise=70.0)
    assert warned(synth(), noisy, label) == []  # skipped


def test_adapters_warn_too():
    image, label = scan(level=110.0)
    adapter = Adapter(tumor_label=2, generator="hu2023", contrast_hu=-5.0)
    for dtype in (torch.int16, torch.float32):
        if dtype is torch.int16:
            assert len(warned(adapter, image.round().to(dtype), label)) == 1
        else:
            assert warned(adapter, image.to(dtype), label) == []


def test_the_scan_of_the_report_shows_its_tumours(shared: Path):
    nibabel = pytest.importorskip("nibabel")
    folder = shared / "data" / "ct"
    image = nibabel.load(folder / "totalseg_example_ct.nii.gz")
    label = nibabel.load(folder / "totalseg_example_label.nii.gz")
    hu = torch.from_numpy(np.asarray(image.dataobj, np.float32))[None]
    organs = torch.from_numpy(np.asarray(label.dataobj, np.int16))[None]
    transform = synth("hu2023", tumor_label=99)
    made = []
    for seed in range(4):
        transform(hu, organs, affine=image.affine, seed=seed)
        made += [r for r in transform.report if r["applied"]]
    assert len(made) >= 6 and all(r["visibility"] >= VISIBLE_FROM for r in made)


# -- generators that only darken -------------------------------------------------------------------


class Brightens(Changes):
    """Brightens, whatever is asked for."""

    def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return super().change(crop, tumor_mask, seed)


@pytest.mark.parametrize("gate", [None, OPEN])
def test_a_bright_tumour_of_a_generator_that_darkens_is_skipped_and_stays_so(gate):
    image, label = scan(level=90.0, noise=4.0)
    transform = synth(Brightens(40.0, darkens=True), gate=gate, size_mm=(14, 18))
    made, made_label = call(transform, image, label)
    assert torch.equal(made, image) and torch.equal(made_label, label)
    for record in transform.report:
        assert record["code"] == "tissue" and "must be darker than the tissue" in record["reason"]
    params = json.loads(json.dumps(transform.params))
    again, _ = call(transform, image, label, params=params)
    assert torch.equal(again, image)
    assert [record["code"] for record in transform.report] == ["tissue"] * 3


def test_a_bright_tumour_is_painted_again_darker_where_its_generator_takes_a_contrast():
    image, label = scan(level=90.0, noise=4.0)
    transform = synth(Changes(40.0, darkens=True), size_mm=(14, 18))
    call(transform, image, label)
    for record in transform.report:
        assert record["applied"] and record["contrast_hu"] <= -8 and record["hu_change"] < -4


@pytest.mark.parametrize("more", [{"contrast_hu": 40.0}, {"contrast_hu": (20.0, 40.0)}])
def test_a_bright_tumour_that_was_asked_for_stays(more):
    image, label = scan(level=90.0, noise=4.0)
    transform = synth(Changes(40.0, darkens=True), size_mm=(14, 18), **more)
    call(transform, image, label)
    assert all(record["hu_change"] > 10 for record in transform.report)
    without = synth(Changes(40.0, darkens=True), size_mm=(14, 18))  # its params asked for it
    call(without, image, label, params=transform.params)
    assert all(record["hu_change"] > 10 for record in without.report)
    transform = synth(Changes(40.0), size_mm=(14, 18))  # a generator that also brightens
    call(transform, image, label)
    assert all(record["hu_change"] > 10 for record in transform.report)


def fatty_liver(level, noise, seed=0, spacing=(1.5, 1.5, 2.0)):
    """A liver (1) darker than the muscle around it."""
    image, label = scan(noise, level, spacing, side_mm=64, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    muscle = 50 + 8 * torch.randn(image.shape, generator=rng)
    return torch.where(label == 1, image, muscle), label


@pytest.mark.parametrize("generator", ["hu2023", "liver-early"])
@pytest.mark.parametrize(("level", "noise"), [(0, 4), (10, 8), (25, 8)])
def test_tumours_of_a_fatty_liver_are_darker_by_their_core_s_8_hu(generator, level, noise):
    painted = 0
    for seed in range(3 if generator == "hu2023" else 2):
        image, label = fatty_liver(level, noise, seed)
        transform = synth(generator, size_mm=(9, 16), count=2)
        made, made_label = call(transform, image, label, seed, (1.5, 1.5, 2.0))
        organ = image[(label == 1)].median()
        for record in transform.report:
            if not record["applied"]:
                assert record["code"] in ("faint", "no_room")
                continue
            painted += 1
            assert record["hu_change"] < -4
        tumor = made_label == 2
        if bool(tumor.any()):
            assert float(made[tumor].mean() - organ) < -4
    assert painted or level + noise == 18


def test_a_file_of_a_fatty_liver_gets_no_bright_tumour(tmp_path):
    nib = pytest.importorskip("nibabel")
    pytest.importorskip("typer")
    from tumorsynth.commands.main import main

    image, label = fatty_liver(10, 4)
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    affine[:3, 3] = -30
    for name, data in (("ct", image[0].round().to(torch.int16)), ("label", label[0])):
        nib.save(nib.Nifti1Image(data.numpy(), affine), tmp_path / f"{name}.nii.gz")
    out = tmp_path / "out"
    main([
        "synthesize", str(tmp_path / "ct.nii.gz"), str(tmp_path / "label.nii.gz"), "-o", str(out),
        "--seed", "2", "--count", "2", "--size-mm", "9", "16",
    ])  # fmt: skip
    (report,) = out.glob("*_report.json")
    records = json.loads(report.read_text())["tumors"]
    assert any(record["applied"] for record in records)
    assert all(record["hu_change"] < -4 for record in records if record["applied"])
