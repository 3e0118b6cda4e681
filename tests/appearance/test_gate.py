"""The quality gate: its scores, its limits, and calls that repeat."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import ndimage
from tiny import tiny_generator

import tumorsynth as ts
from tumorsynth.appearance.gate import LIMITS, Gate, check_gate, measure

ISO = (1.0, 1.0, 1.0)
OPEN = Gate(**dict.fromkeys(LIMITS))  # measures, never rejects


def scan(side=40, noise=12.0, seed=0):
    """An organ of 110 HU in fat: HU and organ, (side, side, side)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(side) - side // 2] * 3, indexing="ij"))
    organ = grid.square().sum(0).sqrt() < 0.46 * side
    rng = torch.Generator().manual_seed(seed)
    hu = torch.where(organ, 110.0, -100.0) + noise * torch.randn(organ.shape, generator=rng)
    return hu, organ


def ball(side=40, radius=8):
    grid = torch.stack(torch.meshgrid(*[torch.arange(side) - side // 2] * 3, indexing="ij"))
    return grid.square().sum(0) <= radius**2


def tumour(contrast=-40.0, blur=1.0, noise=12.0, inside_noise=1.0):
    hu, organ = scan(noise=noise)
    mask = ball()
    hu = torch.where(mask, 110 + inside_noise * (hu - 110), hu)
    soft = torch.from_numpy(ndimage.gaussian_filter(mask.float().numpy(), blur))
    return measure(hu + contrast * soft, mask, organ, ISO)


# -- the scores ------------------------------------------------------------------------------------


def test_scores_agree_with_what_was_painted():
    scores = tumour(contrast=-40)
    assert scores["contrast_hu"] == pytest.approx(-40, abs=3)
    assert scores["level_hu"] == pytest.approx(70, abs=3)
    # over the noise, for a section of pi 8^2 voxels whose soft edge takes some of the contrast
    assert scores["visibility"] == pytest.approx(40 / 12 * math.sqrt(math.pi) * 8, rel=0.2)
    assert scores["noise_ratio"] == pytest.approx(1, abs=0.1)
    assert scores["flatness"] == pytest.approx(1, abs=0.02)
    assert tumour(contrast=30)["contrast_hu"] == pytest.approx(30, abs=3)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 1.5])
def test_noise_ratio_is_that_of_the_noise(ratio):
    assert tumour(inside_noise=ratio)["noise_ratio"] == pytest.approx(ratio, rel=0.12)


def test_edge_width_is_that_of_the_blur():
    widths = {b: tumour(contrast=-60, blur=b, noise=5)["edge_mm"] for b in (0.1, 1.2, 2.0, 3.0)}
    assert widths[0.1] < 2.6  # the sharpest that it can tell
    for blur in (1.2, 2.0):
        assert widths[blur] == pytest.approx(2.56 * blur, rel=0.25)
    assert widths[3.0] > 1.1 * widths[2.0]


def test_edge_of_coarse_voxels():
    spacing = (0.8, 0.8, 2.5)
    axes = [(torch.arange(n) - n // 2) * s for n, s in zip((60, 60, 20), spacing, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    far = grid.square().sum(0).sqrt()
    for sigma in (1.5, 3.0):
        hu = 110 - 30 * (1 - torch.erf((far - 10) / sigma / math.sqrt(2)))
        scores = measure(hu, far < 10, far < 30, spacing)
        assert scores["edge_mm"] == pytest.approx(2.56 * sigma, rel=0.3)


def test_what_cannot_be_measured_is_none_and_breaks_no_limit():
    hu, organ = scan()
    scores = measure(hu, ball(), torch.zeros_like(organ), ISO)
    assert [name for name in LIMITS if scores[name] is not None] == ["flatness"]
    assert Gate().objection(scores) is None
    still = measure(torch.full_like(hu, 50.0), ball(), organ, ISO)  # no noise at all
    assert still["visibility"] is None and still["edge_mm"] is None
    odd = hu.clone()
    odd[ball(radius=14) & ~ball(radius=11)] = math.nan
    assert math.isfinite(measure(odd, ball(), organ, ISO)["contrast_hu"])


def test_level_is_not_scored_in_lungs():
    hu, organ = scan()
    assert measure(hu - 900, ball(), organ, ISO)["level_hu"] is None


# -- the limits ------------------------------------------------------------------------------------


def test_the_default_gate_rejects_bad_tumours():
    assert Gate().objection(tumour()) is None
    assert "level_hu" in Gate().objection(tumour(contrast=-160))  # like fat
    assert "level_hu" in Gate().objection(tumour(contrast=-105))  # like fluid
    assert "visibility" in Gate().objection(tumour(contrast=0))
    assert "noise_ratio" in Gate().objection(tumour(inside_noise=0.1))  # like plastic


def test_a_contrast_of_the_wrong_sign_or_size_is_rejected():
    hu, organ = scan()
    soft = torch.from_numpy(ndimage.gaussian_filter(ball().float().numpy(), 1.0))
    for requested, painted, passes in (
        (-25, -25, True),
        (-25, 25, False),
        (-60, -20, False),
        (20, 20, True),
    ):
        scores = Gate().scores(hu + painted * soft, ball(), organ, ISO, requested)
        assert scores["off_hu"] == pytest.approx(painted - requested, abs=4)
        assert (Gate().objection(scores) is None) == passes
    assert Gate().scores(hu - 25 * soft, ball(), organ, ISO)["off_hu"] is None  # none requested


class Learned(torch.nn.Module):
    """A trained scorer: how likely a tumour's noise and contrast are those of a real one."""

    def __init__(self, real, fake):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(self.layer.weight)
        x = torch.stack([self.features(*each) for each in real + fake])
        y = torch.tensor([1.0] * len(real) + [0.0] * len(fake))
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=20)

        def loss():
            optimizer.zero_grad()
            logits = self.layer(x)[:, 0]
            value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
            value = value + 1e-2 * self.layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    def features(self, hu, tumor_mask):
        inside = hu[tumor_mask]
        return torch.stack([inside.diff().abs().mean() / 10, (inside.mean() - 80) / 40])

    @torch.no_grad()
    def forward(self, hu, tumor_mask, spacing):
        return torch.sigmoid(self.layer(self.features(hu, tumor_mask))).item()


def test_a_trained_scorer_rejects_what_it_was_trained_to_reject():
    def example(seed, noise, contrast):
        hu, _ = scan(noise=noise, seed=seed)
        return hu + contrast * ball().float(), ball()

    real = [example(k, 12.0, -35.0) for k in range(4)]
    learned = Learned(real, [example(k, 3.0, -35.0) for k in range(4)])  # real ones are noisy
    gate = replace(OPEN, tries=1, scorer=learned, least=0.5)
    for noise, passes in ((12.0, True), (3.0, False)):
        hu, organ = scan(64, noise=noise, seed=9)
        synth = ts.SynthesizeTumor("hu2023", 1, 2, count=1, size_mm=12, contrast_hu=-35, gate=gate)
        synth(hu[None], organ[None].short(), spacing=ISO, seed=1)
        (record,) = synth.report
        assert record["applied"] == passes, record
        assert 0 <= record["scores"]["scorer"] <= 1


def test_real_tumours_pass_the_default_gate(shared: Path):
    nibabel = pytest.importorskip("nibabel")
    folder = shared / "data" / "ct"
    (image,) = folder.glob("ircadb_p01*ct*.nii.gz")
    (label,) = folder.glob("ircadb_p01*label*.nii.gz")
    scan = nibabel.load(image)
    hu = torch.from_numpy(scan.get_fdata(dtype="float32"))
    labels = torch.from_numpy(nibabel.load(label).get_fdata(dtype="float32")).short()
    spacing = tuple(float(s) for s in scan.header.get_zooms()[:3])
    parts, count = ndimage.label(labels.numpy() == 2)
    reasons = []
    for box, index in zip(ndimage.find_objects(parts), range(1, count + 1), strict=True):
        around = tuple(
            slice(max(0, b.start - math.ceil(8 / s)), b.stop + math.ceil(8 / s))
            for b, s in zip(box, spacing, strict=True)
        )
        mask = torch.from_numpy(parts[around] == index)
        if mask.sum() * math.prod(spacing) > 400:
            scores = measure(hu[around], mask, labels[around] == 1, spacing)
            reasons.append(Gate().objection(scores))
    assert len(reasons) >= 5 and not any(reasons), reasons


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("tries must be a whole number", {"tries": 0}),
        ("visibility must be .low, high.", {"visibility": (2, 1)}),
        ("edge_mm must be .low, high.", {"edge_mm": 3}),
        ("level_hu must be .low, high.", {"level_hu": (math.nan, 3)}),
    ],
)
def test_invalid_limits_are_refused(words, settings):
    with pytest.raises(ValueError, match=words):
        Gate(**settings)


def test_invalid_gates_are_refused():
    assert check_gate(None) is None and check_gate(False) is None
    assert check_gate(True) == Gate()
    with pytest.raises(TypeError, match="True, False or a tumorsynth.Gate, got 'yes'"):
        check_gate("yes")
    with pytest.raises(TypeError, match="scorer must be a function"):
        Gate(scorer=0.5)
    with pytest.raises(TypeError, match="gate must be"):
        ts.SynthesizeTumor(gate=3)


# -- in a call -------------------------------------------------------------------------------------


def call(gate, seed=3, generator="hu2023", count=4, **more):
    hu, organ = scan(64)
    synth = ts.SynthesizeTumor(generator, 1, 2, count=count, size_mm=(7, 12), gate=gate)
    image, label = hu[None], organ[None].to(torch.int16)
    seed = None if "params" in more else seed
    result = synth(image, label, spacing=ISO, seed=seed, **more)
    json.dumps(synth.report, allow_nan=False)
    return synth, result


def test_the_gate_is_off_by_default_and_does_not_change_what_passes():
    plain, (image, label) = call(None)
    assert not any("scores" in record for record in plain.report)
    gated, (image2, label2) = call(OPEN)
    assert torch.equal(image, image2) and torch.equal(label, label2)
    assert gated.params == plain.params
    for record in gated.report:
        assert set(record["scores"]) == set(LIMITS)
        # the score shows that the tumour was painted
        assert record["scores"]["contrast_hu"] < -10


@pytest.mark.parametrize("generator", ["hu2023", tiny_generator()], ids=["hu2023", "tiny"])
def test_a_rejected_tumour_is_painted_again_with_the_next_seed(generator):
    plain, _ = call(OPEN, generator=generator, count=1)
    (first,) = plain.report
    darker = Gate(**{**dict.fromkeys(LIMITS), "tries": 4})
    low = first["scores"]["contrast_hu"]
    for limits in ((low + 1e-3, 1e3), (-1e3, low - 1e-3)):  # the first one just fails
        gate = replace(darker, contrast_hu=limits)
        synth, (image, label) = call(gate, generator=generator, count=1)
        (record,) = synth.report
        if record["applied"]:
            assert 1 <= record["seed"] - first["seed"] <= 3
            assert limits[0] <= record["scores"]["contrast_hu"] <= limits[1]
        else:
            assert record["reason"].startswith("the gate: contrast_hu")
        # the params replay the accepted attempt without a gate
        again, (image2, label2) = call(
            None, generator=generator, count=1, params=json.loads(json.dumps(synth.params))
        )
        assert torch.equal(image, image2) and torch.equal(label, label2)
        assert again.report[0]["applied"] == record["applied"]
        assert record["applied"] or again.report[0]["reason"] == record["reason"]


def test_a_requested_contrast_is_sampled_again_too():
    hu, organ = scan(64)
    # rejects more than half of the range
    gate = replace(OPEN, tries=8, contrast_hu=(-1e3, -45))
    synth = ts.SynthesizeTumor(
        "hu2023", 1, 2, count=1, size_mm=10, contrast_hu=(-60, -10), gate=gate
    )
    redrawn = 0
    for seed in range(6):
        synth(hu[None], organ[None].short(), spacing=ISO, seed=seed)
        (record,) = synth.report
        if record["applied"]:
            assert record["scores"]["contrast_hu"] <= -45
            (params,) = synth.params[0]["tumors"]
            assert params["contrast_hu"] == record["contrast_hu"]
            redrawn += 1
    assert redrawn >= 4


def test_some_are_skipped_and_the_others_stay_where_they_were():
    free, _ = call(OPEN)
    levels = sorted(r["scores"]["contrast_hu"] for r in free.report)
    gate = replace(OPEN, tries=1, contrast_hu=(-1e3, (levels[1] + levels[2]) / 2))
    synth, (image, label) = call(gate)
    applied = [r for r in synth.report if r["applied"]]
    assert len(applied) == 2 and len(synth.report) == 4
    places = [r["centre_voxel"] for r in free.report]
    assert all(r["centre_voxel"] in places for r in applied)
    assert all("scores" in r for r in synth.report)
    for replay_gate in (None, gate, True):  # a replay does not judge again
        again, (image2, label2) = call(replay_gate, params=json.loads(json.dumps(synth.params)))
        assert torch.equal(image, image2) and torch.equal(label, label2)
        assert [r["applied"] for r in again.report] == [r["applied"] for r in synth.report]


def test_without_any_tumour_the_input_comes_back_unchanged():
    hu, organ = scan(64)
    _, (image, label) = call(replace(OPEN, contrast_hu=(500, 600)))
    assert torch.equal(image[0], hu) and torch.equal(label[0], organ.short())


def test_a_custom_scorer():
    calls = []

    def scorer(hu, tumor_mask, spacing):
        calls.append((hu.shape, tumor_mask.dtype, spacing))
        return float(hu[tumor_mask].mean())

    synth, _ = call(replace(OPEN, scorer=scorer, least=-1e6))
    assert [set(r["scores"]) - set(LIMITS) for r in synth.report] == [{"scorer"}] * 4
    assert len(calls) == 4 and all(c[1:] == (torch.bool, ISO) for c in calls)
    calls.clear()
    synth, _ = call(replace(OPEN, tries=2, scorer=scorer, least=1e6))
    assert len(calls) == 8 and "the scorer gave" in synth.report[0]["reason"]
    synth, _ = call(replace(OPEN, tries=1, scorer=lambda *_: math.nan), count=1)
    assert synth.report[0]["reason"] == "the gate: the scorer gave no number"


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (lambda: Gate(tries=0), "the default is 3"),
        (lambda: Gate(off_hu=(5, -5)), "the default is (-15.0, 15.0)"),
        (lambda: Gate(contrast_hu=3), "or None for no limit"),
        (lambda: Gate(scorer="net"), "pass the function"),
        (lambda: check_gate("yes"), "tumorsynth.Gate(tries=5)"),
    ],
)
def test_errors_name_the_value_and_the_fix(wrong, fix):
    with pytest.raises((TypeError, ValueError)) as error:
        wrong()
    assert fix in str(error.value) and ", got " in str(error.value)
