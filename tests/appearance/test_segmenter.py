"""`SegmenterScorer`: the share of a tumour that a segmentation network finds."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tumorsynth as ts
from tumorsynth.appearance.gate import LIMITS, Gate

OPEN = Gate(**dict.fromkeys(LIMITS))  # measures, never rejects
ISO = (1.0, 1.0, 1.0)


def scan(side=48, noise=3.0, seed=0):
    grid = torch.stack(torch.meshgrid(*[torch.arange(side) - side // 2] * 3, indexing="ij"))
    organ = grid.square().sum(0).sqrt() < 0.46 * side
    rng = torch.Generator().manual_seed(seed)
    hu = torch.where(organ, 110.0, -100.0) + noise * torch.randn(organ.shape, generator=rng)
    return hu[None], organ[None].short()


class Dark(nn.Module):
    """Finds what is darker than a threshold, and nothing outside of soft tissue: three classes."""

    def __init__(self, below=90.0, scale=1.0):
        super().__init__()
        self.below, self.scale = below, scale
        self.norm = nn.BatchNorm3d(1)
        self.drop = nn.Dropout(0.5)
        self.seen = []

    def forward(self, x):
        self.seen.append((tuple(x.shape), self.training, self.norm.training, x.requires_grad))
        x = self.drop(x) * self.scale  # dropout would find holes, in training
        tumor = 20 * ((x < self.below) & (x > 0)).float() - 10
        background = torch.full_like(tumor, -5.0)
        return torch.cat([background, -tumor, tumor], 1)


def synthesize(scorer, seed=3, spacing=ISO, given=None, **settings):
    least, most = settings.pop("least", 0.0), settings.pop("most", None)
    tries = settings.pop("tries", 1)
    gate = replace(OPEN, scorer=scorer, least=least, most=most, tries=tries)
    settings = {"count": 1, "size_mm": 14, "contrast_hu": -60, **settings}
    synth = ts.SynthesizeTumor("hu2023", 1, 2, gate=gate, **settings)
    image, label = scan() if given is None else given
    result = synth(image, label, spacing=spacing, seed=seed)
    json.dumps(synth.report, allow_nan=False)
    return synth, result


def test_score_is_the_share_of_voxels_that_the_network_finds():
    network = Dark(below=70.0)
    synth, (image, label) = synthesize(ts.SegmenterScorer(network, 2, 32))
    inside = (image < 70) & (image > 0)
    share = float(inside[label == 2].float().mean())
    assert 0.2 < share < 1  # the soft edge is not found
    assert synth.report[0]["scores"]["scorer"] == pytest.approx(share, abs=1e-6)
    assert network.seen == [((1, 1, 32, 32, 32), False, False, False)]


@pytest.mark.parametrize(
    ("limits", "applied"),
    [
        ({"least": 0.2}, True),
        ({"least": 0.0, "most": 0.1}, False),
        ({"least": 0.999}, False),
        ({"least": 0.1, "most": 0.99}, True),
    ],
)
def test_limits_keep_what_is_found_or_what_is_missed(limits, applied):
    synth, (image, label) = synthesize(ts.SegmenterScorer(Dark(below=75.0), 2, 32), **limits)
    (record,) = synth.report
    assert record["applied"] == applied and 0.2 < record["scores"]["scorer"] < 0.99
    if not applied:
        assert record["code"] == "gate" and "the scorer gave" in record["reason"]
        assert not (label == 2).any() and torch.equal(image, scan()[0])
    again = ts.SynthesizeTumor("hu2023", 1, 2)(*scan(), spacing=ISO, params=synth.params)
    assert torch.equal(again[0], image) and torch.equal(again[1], label)


def test_network_and_random_state_are_left_as_they_were():
    network = Dark()
    network.train()
    network.norm.eval()  # frozen, as in fine-tuning
    network.weight = nn.Parameter(torch.ones(1))
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())

    def noisy(hu):
        torch.rand(3), np.random.rand(3), random.random()
        return hu

    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    synthesize(ts.SegmenterScorer(network, 2, 32, preprocess=noisy))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.weight.grad is None and network.weight.requires_grad


def test_modes_come_back_after_an_error():
    class Broken(Dark):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    network = Broken().train()
    with pytest.raises(ValueError, match=r"must take a patch of shape \(1, 1, 32, 32, 32\)"):
        synthesize(ts.SegmenterScorer(network, 2, 32))
    assert network.training and network.drop.training


def test_a_model_with_random_numbers_of_its_own_repeats():
    class Random(nn.Module):
        def forward(self, x):
            return torch.randn(1, 2, *x.shape[2:])

    scores = [
        synthesize(ts.SegmenterScorer(Random(), 1, 32))[0].report[0]["scores"]["scorer"]
        for _ in range(2)
    ]
    assert scores[0] == scores[1]


# -- the network's input ---------------------------------------------------------------------------


class Keep(Dark):
    def forward(self, x):
        self.x = x.clone()
        return super().forward(x)


@pytest.mark.parametrize("shape", [(32, 32, 32), (48, 48, 48), (20, 24, 36), (64, 48, 16)])
def test_patch_is_the_sample_with_the_tumour_and_0_beyond(shape):
    network = Keep()
    _, (image, label) = synthesize(ts.SegmenterScorer(network, 2, shape))
    (patch,) = network.x[0]
    assert patch.shape == shape
    if shape == (48, 48, 48):  # a training patch comes as it is
        assert torch.equal(patch, image[0])
    if shape == (64, 48, 16):
        assert (patch[:8] == 0).all() and (patch[-8:] == 0).all() and (patch[8] != 0).any()


def test_a_tumour_larger_than_the_patch_takes_several():
    network = Dark(below=75.0)
    settings = {"size_mm": 30, "given": scan(72)}
    whole, _ = synthesize(ts.SegmenterScorer(Dark(below=75.0), 2, 64), **settings)
    parts, _ = synthesize(ts.SegmenterScorer(network, 2, (16, 32, 24)), **settings)
    assert len(network.seen) > 3
    scores = [synth.report[0]["scores"]["scorer"] for synth in (whole, parts)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize(
    "preprocess",
    [
        ts.Scaled(-175, 250, 0, 1),
        lambda hu: ((hu + 175) / 425).clamp(0, 1),
        lambda hu: ((hu + 175) / 425).clamp(0, 1).numpy(),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_the_networks_scale(preprocess, own):
    """HU in the pipeline and in [0, 1] for the network; or the scale of both, without a word."""
    image, label = scan()
    settings, below = {}, (75 + 175) / 425
    if own:
        settings["intensity"], preprocess = ts.Scaled(-175, 250, 0, 1), None
        image = ((image + 175) / 425).clamp(0, 1)
    plain, _ = synthesize(ts.SegmenterScorer(Dark(below=75.0), 2, 32))
    network = Keep(below)
    scorer = ts.SegmenterScorer(network, 2, 32, preprocess=preprocess)
    scaled, _ = synthesize(scorer, given=(image, label), **settings)
    assert 0 <= network.x.min() and network.x.max() <= 1
    found = scaled.report[0]["scores"]["scorer"]
    assert found == pytest.approx(plain.report[0]["scores"]["scorer"], abs=0.02)


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.7, 2.0, 1.0), 2.0])
def test_the_networks_spacing(spacing):
    image, label = scan()
    whole = image.clamp_min(100.0), torch.ones_like(label)  # the organ fills the scan
    settings = {"size_mm": 18, "given": whole}
    fine, _ = synthesize(ts.SegmenterScorer(Dark(below=75.0), 2, 64), **settings)
    network = Keep(75.0)
    other, _ = synthesize(ts.SegmenterScorer(network, 2, 40, spacing=spacing), **settings)
    scores = [synth.report[0]["scores"]["scorer"] for synth in (fine, other)]
    assert scores[0] == pytest.approx(scores[1], abs=0.2)  # a coarse grid blurs the edge
    tumor = (network.x[0, 0] < 75) & (network.x[0, 0] > 60)
    mm = np.broadcast_to(spacing, 3)
    extent = [len(set(tumor.nonzero()[:, axis].tolist())) * mm[axis] for axis in range(3)]
    assert all(12 < one < 28 for one in extent)


@pytest.mark.parametrize(
    ("orientation", "affine"),
    [
        ("RAS", np.diag([-1.0, -1.0, 1.0, 1.0])),
        ("SPL", np.diag([-1.0, 1.0, 1.0, 1.0])),
        ("PIR", np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])),
    ],
)
def test_the_networks_axes(orientation, affine):
    nibabel = pytest.importorskip("nibabel")
    image, label = scan()
    image[0, :6, :8, :10] += torch.rand(6, 8, 10)  # no symmetry
    network = Keep()
    scorer = ts.SegmenterScorer(network, 2, 48, orientation=orientation)
    synth = ts.SynthesizeTumor(
        "hu2023", 1, 2, count=1, size_mm=14, gate=replace(OPEN, scorer=scorer, least=0.0)
    )
    made, _ = synth(image, label, affine=affine, seed=1)
    current = nibabel.io_orientation(affine)
    turn = nibabel.orientations.ornt_transform(
        current, nibabel.orientations.axcodes2ornt(tuple(orientation))
    )
    expected = nibabel.orientations.apply_orientation(made[0].numpy(), turn)
    assert np.array_equal(network.x[0, 0].numpy(), expected)


# -- the network's output --------------------------------------------------------------------------


def logits_of(kind):
    network = Dark(below=75.0)

    def run(x):
        out = network(x)
        half = torch.nn.functional.avg_pool3d(out, 2)
        return {
            "logits": out,
            "list": [out, half],
            "coarse first": (half, out),
            "stacked": torch.stack([out, -out], 1),
            "probabilities": out.softmax(1),
            "one channel": out[:, 2:],
            "sigmoid": out,
            "half": out.half(),
        }[kind]

    network.eval()
    return run


@pytest.mark.parametrize(
    ("kind", "channel", "activation"),
    [
        ("list", 2, None),
        ("coarse first", 2, None),
        ("stacked", 2, None),
        ("probabilities", 2, "none"),
        ("one channel", 0, None),
        ("sigmoid", 2, "sigmoid"),
        ("half", 2, None),
        ("logits", (2,), "softmax"),
    ],
)
def test_outputs_of_many_kinds(kind, channel, activation):
    plain, _ = synthesize(ts.SegmenterScorer(logits_of("logits"), 2, 32))
    scorer = ts.SegmenterScorer(logits_of(kind), channel, 32, activation=activation)
    other, _ = synthesize(scorer)
    assert plain.report[0]["scores"]["scorer"] == other.report[0]["scores"]["scorer"]


@pytest.mark.parametrize(
    ("name", "model", "error"),
    [
        ("two channels", lambda x: torch.zeros(1, 2, *x.shape[2:]), "returns 2 .0 to 1., got 2"),
        ("NaN", lambda x: torch.full((1, 3, *x.shape[2:]), math.nan), "finite values, got NaN"),
        ("half size", lambda x: torch.zeros(1, 3, 16, 16, 16), r"must return \(1, channels, 32,"),
        ("pooled", lambda x: torch.zeros(1, 3), r"got \(1, 3\)"),
        ("a number", lambda x: 0.5, "must return a tensor .*, got float"),
        ("a dict", lambda x: {"out": x}, "must return a tensor .*, got dict"),
        ("empty", lambda x: [], "must return a tensor .*, got list"),
        ("bad", lambda x: torch.zeros(3)[x.long()], "the segmenter must take a patch"),
    ],
)
def test_bad_models_are_named(name, model, error):
    with pytest.raises((ValueError, TypeError), match=error):
        synthesize(ts.SegmenterScorer(model, 2, 32))


def test_logits_are_no_probabilities():
    with pytest.raises(ValueError, match='activation="none" needs probabilities'):
        synthesize(ts.SegmenterScorer(Dark(), 2, 32, activation="none"))
    with pytest.raises(ValueError, match="needs a model here"):
        synthesize(ts.SegmenterScorer(None, 2, 32))
    with pytest.raises(ValueError, match="preprocess must return .C, X, Y, Z."):
        synthesize(ts.SegmenterScorer(Dark(), 2, 32, preprocess=lambda hu: hu[0]))
    with pytest.raises(ValueError, match="preprocess must return finite"):
        synthesize(ts.SegmenterScorer(Dark(), 2, 32, preprocess=lambda hu: hu / 0))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "net.pt"}, "model must be a network"),
        ({"tumor_channel": -1}, "tumor_channel must be"),
        ({"tumor_channel": True}, "tumor_channel must be"),
        ({"tumor_channel": ()}, "tumor_channel must be"),
        ({"patch_size": (32, 32)}, "patch_size must be"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"patch_size": 32.5}, "patch_size must be"),
        ({"preprocess": "scale"}, "preprocess must be"),
        ({"preprocess": ts.HU}, "preprocess must be"),
        ({"spacing": (1, 1)}, "spacing must be"),
        ({"orientation": "RAR"}, "orientation must be"),
        ({"orientation": "XYZ"}, "orientation must be"),
        ({"activation": "tanh"}, "activation must be"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"treshold": 0.5}, "did you mean threshold"),
    ],
)
def test_bad_arguments_are_named(arguments, error):
    with pytest.raises((ValueError, TypeError), match=error):
        ts.SegmenterScorer(**{"model": Dark(), "tumor_channel": 2, **arguments})
    with pytest.raises(ValueError, match="least must not be above most"):
        ts.Gate(least=0.5, most=0.3)
    with pytest.raises(ValueError, match="most must be a number"):
        ts.Gate(most="high")


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"least": 70}, "shares from 0 to 1, got least=70"),
        ({"least": 0.0, "most": 30}, "got least=0 and most=30"),
        ({"scorer": None, "least": 0.7}, "limits of a scorer, got least=0.7 without one"),
        ({"scorer": None, "least": 0.0, "most": 0.3}, "pass scorer="),
    ],
)
def test_limits_that_cannot_be_meant_are_named(limits, error):
    with pytest.raises(ValueError, match=error):
        ts.Gate(**{"scorer": ts.SegmenterScorer(Dark(), 2, 32), **limits})
    ts.Gate(scorer=lambda *_: 70, least=70)  # another scorer's numbers are its own


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_probabilities_are_not_taken_for_logits(channels):
    """After a second softmax over five channels, no tumour could ever be found."""
    mask = torch.zeros(32, 32, 32, dtype=torch.bool)
    mask[12:20, 12:20, 12:20] = True
    hu = torch.where(mask, 55.0, 110.0) + 8 * torch.randn(mask.shape)
    channel = channels - 1

    def logits(x):
        tumor = 0.2 * (70 - x)
        rest = [-tumor] + [torch.full_like(x, -20.0)] * (channels - 2)
        return torch.cat([*rest[: channels - 1], tumor], 1)

    def network(x):
        return logits(x).sigmoid() if channels == 1 else logits(x).softmax(1)

    with pytest.raises(ValueError, match='look like probabilities.*activation="none"'):
        ts.SegmenterScorer(network, channel, 32)(hu, mask, (1, 1, 1))
    given = ts.SegmenterScorer(network, channel, 32, activation="none")(hu, mask, (1, 1, 1))
    assert given == ts.SegmenterScorer(logits, channel, 32)(hu, mask, (1, 1, 1)) > 0.5
    for small in (torch.zeros, torch.randn):  # an untrained network's logits are no probabilities
        ts.SegmenterScorer(
            lambda x, small=small: 0.1 * small(1, channels, *x.shape[2:]), channel, 32
        )(hu, mask, (1, 1, 1))


def test_repr_is_short_and_the_same_in_each_process():
    scorer = ts.SegmenterScorer(Dark(), 2, 32, preprocess=ts.Scaled(), spacing=1.5)
    assert "0x" not in repr(scorer) and len(repr(scorer)) < 200
    assert repr(pickle.loads(pickle.dumps(scorer))) == repr(scorer)


def test_a_scorer_runs_by_itself():
    hu, _ = scan()
    mask = torch.zeros(48, 48, 48, dtype=torch.bool)
    mask[20:28, 20:28, 20:28] = True
    dark = torch.where(mask, 50.0, hu[0])
    scorer = ts.SegmenterScorer(Dark(75.0), 2, 32)
    assert scorer(dark, mask, ISO) == 1.0 and scorer(hu[0], mask, ISO) == 0.0
    with pytest.raises(ValueError, match="tumor_mask must hold a voxel"):
        scorer(dark, mask & False, ISO)


class Made(torch.utils.data.Dataset):
    def __init__(self, network):
        gate = replace(OPEN, scorer=ts.SegmenterScorer(network, 2, 32), least=0.0)
        self.synth = ts.SynthesizeTumor("hu2023", 1, 2, count=1, size_mm=14, gate=gate)

    def __len__(self):
        return 2

    def __getitem__(self, k):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.synth(*scan(), spacing=ISO, seed=k)
        return sum("has a copy that learns nothing" in str(one.message) for one in caught)


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_in_a_worker_is_named_once(training):
    network = Dark().train(training)
    counts = list(torch.utils.data.DataLoader(Made(network), num_workers=1, batch_size=None))
    assert counts == ([1, 0] if training else [0, 0])
    assert Made(network)[0] == 0  # in the training process itself


def refuse(*_):
    raise RuntimeError("a replay must not call the scorer")


@pytest.mark.parametrize("scorer", [refuse, ts.SegmenterScorer(refuse, 2, 32)])
@pytest.mark.parametrize("limits", [{"least": 0.2}, {"least": 0.999, "tries": 2}])
def test_a_replay_never_calls_the_scorer(scorer, limits):
    synth, (image, label) = synthesize(ts.SegmenterScorer(Dark(below=75.0), 2, 32), **limits)
    gate = replace(OPEN, scorer=scorer, least=0.5)
    other = ts.SynthesizeTumor("hu2023", 1, 2, gate=gate)
    again = other(*scan(), spacing=ISO, params=synth.params)
    assert torch.equal(again[0], image) and torch.equal(again[1], label)
    first, second = synth.report[0], other.report[0]
    assert first["applied"] == second["applied"] == (limits["least"] == 0.2)
    if first["applied"]:
        assert first["scores"]["scorer"] is not None
        assert second["scores"] == {**first["scores"], "scorer": None}
