"""A generator written by somebody else: any object with the members of `TumorGenerator`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.appearance.tissue import SOFT_TISSUE
from tumorsynth.generators.protocol import MEMBERS, TumorGenerator, missing_members
from tumorsynth.generators.store import Handle

DROP_HU = -40.0
SPACING = (1.0, 1.0, 1.0)


class Darker:
    """Lowers HU evenly in the tumour. Inherits nothing and holds no weights."""

    name = "darker"
    window = (-160.0, 240.0)
    crop_size = 40
    crop_multiple = 4
    own_edge = False
    even = False
    keeps_detail = True

    def __init__(self):
        self.device = torch.device("cpu")
        self.card = {"name": "darker", "licence": "MIT"}
        self.calls = []

    def to(self, device):
        self.device = torch.device(device)
        return self

    def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        assert crop.shape == tumor_mask.shape and tumor_mask.dtype == torch.bool
        assert crop.shape[2] % self.crop_multiple == 0 and crop.shape[2] >= self.crop_size
        assert len(seed) == len(crop) and all(type(one) is int for one in seed)
        self.calls.append((crop, tumor_mask, list(seed), contrast_hu, near))
        drops = [DROP_HU] * len(crop) if contrast_hu is None else list(contrast_hu)
        low, high = self.window
        change = torch.zeros_like(crop)
        for sample, drop in enumerate(drops):
            change[sample] = drop / (high - low)
        return change

    def inpaint(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return crop + tumor_mask * self.change(crop, tumor_mask, seed, contrast_hu, near)


def scan():
    """An organ of 110 HU with noise, label 1, in fat: (1, 64, 60, 56)."""
    shape = (64, 60, 56)
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[0, 6:-6, 6:-6, 6:-6] = 1
    noise = 8 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return torch.where(label == 1, 110.0, -90.0) + noise, label


def synth(generator, **settings):
    fixed = {"organ_labels": 1, "tumor_label": 2, "size_mm": 16.0, "count": 1}
    return ts.SynthesizeTumor(generator, **{**fixed, **settings})


def mean_change(transform, image, label, **options):
    """Mean HU change in the tumour, and the results; fails unless a tumour was made."""
    new_image, new_label = transform(image, label, spacing=SPACING, seed=3, **options)
    assert [record["applied"] for record in transform.report] == [True]
    assert transform.report[0]["generator"] == "darker"
    tumor = new_label == 2
    assert int(tumor.sum()) > 1000
    return float((new_image - image)[tumor].mean()), new_image, new_label


def test_it_satisfies_the_protocol():
    assert isinstance(Darker(), TumorGenerator) and missing_members(Darker()) == []


def test_the_packages_own_generators_satisfy_the_protocol():
    for name in ("liver-early", "hu2023"):
        assert missing_members(ts.load_generator(name)) == []


@pytest.mark.parametrize("blend", ["change", "difftumor"])
def test_both_blends_write_its_tumour(blend):
    generator, (image, label) = Darker(), scan()
    change, new_image, new_label = mean_change(synth(generator, blend=blend), image, label)
    assert 0.5 * DROP_HU > change > 1.2 * DROP_HU
    assert len(generator.calls) == 1
    near = generator.calls[0][4]
    assert len(near) == 3 and all(isinstance(one, slice) for one in near)
    replay = synth(Darker(), blend=blend)
    replay(image, label, spacing=SPACING, seed=3)
    again = replay(image, label, spacing=SPACING, params=replay.params)
    assert torch.equal(again[0], new_image) and torch.equal(again[1], new_label)


def test_it_gets_the_contrast_that_the_user_asked_for():
    generator, (image, label) = Darker(), scan()
    change, _, new_label = mean_change(synth(generator, contrast_hu=-70.0), image, label)
    assert bool((new_label[new_label != label] == 2).all())
    assert generator.calls[0][3] == [-70.0] and 0.5 * -70 > change > 1.2 * -70


def test_its_window_sets_the_scale_of_crops():
    generator, (image, label) = Darker(), scan()
    mean_change(synth(generator), image, label)
    crop, mask = generator.calls[0][:2]
    low, high = generator.window
    expected = (110.0 - low) / (high - low)
    assert float(crop[mask].mean()) == pytest.approx(expected, abs=0.01)


def test_the_gate_measures_it():
    image, label = scan()
    transform = synth(Darker(), gate=True)
    mean_change(transform, image, label)
    assert transform.report[0]["scores"]


def test_the_gate_rejects_what_nobody_would_see():
    class Faint(Darker):
        def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
            return 0.02 * super().change(crop, tumor_mask, seed, contrast_hu, near)

    image, label = scan()
    transform = synth(Faint(), gate=True)
    new_image, new_label = transform(image, label, spacing=SPACING, seed=3)
    assert new_image is image and new_label is label
    assert [record["applied"] for record in transform.report] == [False]
    assert transform.report[0]["code"] == "gate"


@pytest.mark.parametrize("settings", [{}, {"mass_effect": 0.5}], ids=["plain", "mass effect"])
def test_the_inputs_come_back_if_no_painted_tumour_is_visible(settings):
    class Idle(Darker):
        def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
            self.calls.append(seed)
            return torch.zeros_like(crop)

    (image, label), generator = scan(), Idle()
    before = image.clone(), label.clone()
    transform = synth(generator, **settings)
    new_image, new_label = transform(image, label, spacing=SPACING, seed=3)
    assert len(generator.calls) == 1 and transform.report[0]["code"] == "no_visible_change"
    assert new_image is image and new_label is label
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])
    adapter = Adapter(generator=Idle(), organ_labels=1, tumor_label=2, size_mm=16.0, count=1)
    whole = image.round().to(torch.int16)  # the adapter works on a float copy of it
    new_image, new_label = adapter(whole, label, spacing=SPACING, seed=3)
    assert new_image is whole and new_label is label


class Misshapen(Darker):
    """Returns something other than one value for each voxel of its crops."""

    def __init__(self, distort):
        super().__init__()
        self.distort = distort

    def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return self.distort(super().change(crop, tumor_mask, seed, contrast_hu, near))

    def inpaint(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return self.distort(crop.clone())


@pytest.mark.parametrize(("blend", "method"), [("change", "change"), ("difftumor", "inpaint")])
@pytest.mark.parametrize(
    ("distort", "got"),
    [
        (lambda x: x[:, 0], r"\(1, 40, 40, 40\)"),
        (lambda x: x[..., 1:], r"\(1, 1, 40, 40, 39\)"),
        (lambda x: x.mean(dim=(2, 3, 4), keepdim=True), r"\(1, 1, 1, 1, 1\)"),
        (lambda x: torch.cat([x, x], 1), r"\(1, 2, 40, 40, 40\)"),
    ],
    ids=["no channel", "cropped", "one value", "two channels"],
)
def test_a_result_of_another_shape_is_refused(blend, method, distort, got):
    image, label = scan()
    transform = synth(Misshapen(distort), blend=blend, size_mm=6.0)
    rule = rf"darker.{method}\(\) must return its crop's shape \(1, 1, 40, 40, 40\), got {got}; "
    with pytest.raises(ValueError, match=rule + "return one value for each voxel"):
        transform(image, label, spacing=SPACING, seed=3)


def test_a_result_that_is_no_tensor_is_refused():
    image, label = scan()
    transform = synth(Misshapen(torch.Tensor.numpy))
    with pytest.raises(TypeError, match=r"darker.change\(\) must return a tensor, got ndarray; "):
        transform(image, label, spacing=SPACING, seed=3)


def test_mass_effect_moves_the_tissue_around_it():
    image, label = scan()
    change, moved, _ = mean_change(synth(Darker(), mass_effect=0.5), image, label)
    _, still, _ = mean_change(synth(Darker()), image, label)
    assert 0.4 * DROP_HU > change > 1.3 * DROP_HU
    assert int((moved != image).sum()) > int((still != image).sum())


def test_the_monai_adapter_takes_it():
    pytest.importorskip("monai")
    from monai.data import MetaTensor

    from tumorsynth.monai import RandSynthesizeTumord

    image, label = scan()
    transform = RandSynthesizeTumord(
        "image", "label", prob=1.0, generator=Darker(), organ_labels=1, tumor_label=2, size_mm=16.0
    )
    out = transform.set_random_state(0)({"image": MetaTensor(image), "label": MetaTensor(label)})
    written = out["label"] != label
    assert written.any()
    change = float((out["image"] - image)[written].mean())
    assert 0.5 * DROP_HU > change > 1.2 * DROP_HU


def test_it_pickles_and_copies_with_its_transform():
    transform, (image, label) = synth(Darker()), scan()
    expected = transform(image, label, spacing=SPACING, seed=3)
    for other in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):
        found = other(image, label, spacing=SPACING, seed=3)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("member", MEMBERS)
def test_a_missing_member_is_named(member):
    complete = {name: getattr(Darker(), name) for name in MEMBERS}
    complete.pop(member)
    generator = type("Incomplete", (), complete)()
    with pytest.raises(TypeError, match=f"got Incomplete, which lacks {member};"):
        Handle(generator)


def test_all_missing_members_are_named():
    class Painter:
        name = "painter"

        def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
            return crop

    with pytest.raises(TypeError, match="generator must be") as error:
        ts.SynthesizeTumor(Painter())
    for member in set(MEMBERS) - {"name", "change"}:
        assert member in str(error.value)
    assert "lacks name" not in str(error.value)


def test_a_class_in_place_of_an_instance_is_named():
    with pytest.raises(TypeError, match="got the class Darker, not an instance of it"):
        ts.SynthesizeTumor(Darker)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("crop_size", 0),
        ("crop_size", 65.5),
        ("crop_multiple", 0),
        ("crop_multiple", True),
        ("window", (250.0, -175.0)),
        ("window", "abc"),
        ("window", (float("nan"), 1.0)),
        ("device", "cpu"),
    ],
)
def test_a_member_of_no_use_is_refused_at_construction(member, value):
    generator = Darker()
    setattr(generator, member, value)
    with pytest.raises(ValueError, match=rf"the generator's {member} must be .*; set it to"):
        ts.SynthesizeTumor(generator, tumor_label=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
def test_a_result_of_another_dtype_is_refused(dtype):
    class Other(Darker):
        def change(self, *args, **kwargs):
            return super().change(*args, **kwargs).to(dtype)

    image, label = scan()
    with pytest.raises(TypeError, match=r"dtype torch.float32, got .*\.to\(crop\.dtype\)"):
        synth(Other())(image, label, spacing=SPACING, seed=0)


BAD = {
    "NaN": lambda x: x * torch.nan,
    "one NaN": lambda x: x.index_fill(3, torch.tensor([20]), torch.nan),
    "infinite": lambda x: x + torch.inf,
    "HU": lambda x: x * 400,
    "beyond the window": lambda x: torch.full_like(x, 2.0),
    "far below": lambda x: torch.full_like(x, -8.0),
}


@pytest.mark.parametrize("distort", BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "settings", [{}, {"blend": "difftumor"}, {"gate": True}, {"mass_effect": 0.5}]
)
def test_implausible_values_are_skipped_and_name_the_generator(distort, settings):
    if settings.get("blend") and distort is BAD["HU"]:
        distort = lambda x: x * 400 - 160  # noqa: E731
    if settings.get("blend") and distort is BAD["beyond the window"]:
        distort = lambda x: torch.full_like(x, 3.0)  # noqa: E731
    image, label = scan()
    transform = synth(Misshapen(distort), **settings)
    with pytest.warns(UserWarning, match="skipped: the generator 'darker' gave NaN") as caught:
        for _ in range(2):
            made = transform(image, label, spacing=SPACING, seed=3)
    assert sum("tumours are skipped" in str(w.message) for w in caught) == 1
    (record,) = transform.report
    assert not record["applied"] and "the generator 'darker' gave" in record["reason"]
    assert record["code"] == "implausible"
    assert made[0].equal(image) and made[1].equal(label)
    again = transform(image, label, spacing=SPACING, params=transform.params)
    assert again[0].equal(image) and again[1].equal(label)


@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize("contrast_hu", [None, 600, -600])
def test_strong_changes_are_no_fault(blend, contrast_hu):
    """As a calcified metastasis, or gas."""
    if contrast_hu is None:
        generator = Misshapen(lambda x: torch.full_like(x, 0.9))
    else:
        generator = Darker()
    image, label = scan()
    transform = synth(generator, blend=blend, contrast_hu=contrast_hu)
    transform(image, label, spacing=SPACING, seed=3)
    assert transform.report[0]["applied"], transform.report


class Wide(Darker):
    """A generator with a wide window, as of bone, that changes the tumour by some HU."""

    window = (-1100.0, 3100.0)

    def __init__(self, change_hu, card=None):
        super().__init__()
        self.change_hu = change_hu
        self.card = {**self.card, **(card or {})}

    def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        low, high = self.window
        return tumor_mask.to(crop.dtype) * self.change_hu / (high - low)

    def inpaint(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
        return crop + self.change(crop, tumor_mask, seed)


SOFT = {"tissue_range": SOFT_TISSUE.to_card()}


@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize(
    "change_hu, card", [(2458, None), (-964, None), (926, SOFT), (-858, SOFT), (-450, SOFT)]
)
def test_a_wide_window_permits_no_metal_and_no_air(change_hu, card, blend):
    image, label = scan()
    transform = synth(Wide(change_hu, card), blend=blend)
    with pytest.warns(UserWarning, match="impossible values"):
        made = transform(image, label, spacing=SPACING, seed=3)
    assert transform.report[0]["code"] == "implausible"
    assert made[0].equal(image) and made[1].equal(label)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("blend", ["change", "difftumor"])
@pytest.mark.parametrize(
    "level, change_hu, card",
    [(100, 400, SOFT), (100, -150, SOFT), (-850, 880, None), (-850, -100, None), (300, 900, None),
     (-850, -40, None), (450, -60, None)],
)  # fmt: skip
def test_strong_changes_within_tissue_are_no_fault(level, change_hu, card, blend):
    """As calcified lesions, nodules and cavities of lungs, dense metastases of bone."""
    image, label = scan()
    image = torch.where(label > 0, image - 110 + level, image)
    transform = synth(Wide(change_hu, card), blend=blend, any_tissue=True)
    transform(image, label, spacing=SPACING, seed=3)
    assert transform.report[0]["applied"], transform.report


def test_a_batch_mate_of_an_implausible_tumour_is_made():
    class Sometimes(Darker):
        def change(self, crop, tumor_mask, seed, contrast_hu=None, near=None):
            change = super().change(crop, tumor_mask, seed, contrast_hu, near)
            for sample, one in enumerate(seed):
                change[sample] = change[sample] if one % 2 else torch.nan
            return change

    image, label = scan()
    transform = synth(Sometimes(), count=6, size_mm=(6, 8))
    with pytest.warns(UserWarning, match="'darker' gave NaN"):
        _, made = transform(image, label, spacing=SPACING, seed=0)
    applied = [record["applied"] for record in transform.report]
    assert True in applied and False in applied
    assert int((made == 2).sum()) == sum(r.get("label_voxels", 0) for r in transform.report)
