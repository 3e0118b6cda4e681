"""How often a call waits for a GPU, counted on a pretended one; that it draws the same there."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from pretend import pretended
from tiny import tiny_generator
from torch import Tensor

from tumorsynth.appearance.contrast import ContrastConfig
from tumorsynth.appearance.tissue import SOFT_TISSUE
from tumorsynth.pipeline import finish
from tumorsynth.placement.organ import organ_box
from tumorsynth.synthesizer import SynthesizeTumor

SHAPE = (60, 52, 44)
CALL, TUMOUR = 5, 1  # waits that a call costs, and each tumour of a sample


def scan(kind: str = "ball", dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    image = 110 + 0.5 * torch.randn(1, *SHAPE, generator=rng)
    x, y, z = torch.meshgrid(*[torch.arange(n) / n - 0.5 for n in SHAPE], indexing="ij")
    label = (x.square() + y.square() + z.square() < 0.22)[None].to(dtype)
    if kind == "corner":  # cut by three of the volume's faces
        label.zero_()
        label[:, 30:, :30, :25] = 1
    if kind == "tumours":  # one inside the organ, one beyond it
        label[:, 26:32, 20:28, 18:24] = 2
        label[:, 52:58, 2:8, 2:8] = 2
    if kind == "not finite":
        image[:, 14:18] = torch.nan
        image[0, 0, 0, 0] = torch.inf
    if kind == "sliver":
        label.zero_()
        label[:, 5:50, 20:23, 5:40] = 1
    return image, label


@pytest.mark.parametrize("even", [False, True])
def test_a_call_waits_a_few_times_and_once_a_tumour(monkeypatch, even):
    """Once more for each that is painted again, to be seen."""
    generator = tiny_generator(contrast=ContrastConfig() if even else None)
    for tumours in (1, 2):
        image, label = scan()
        synth = SynthesizeTumor(generator, count=tumours, size_mm=9.0)
        with pretended(monkeypatch, image, label) as gpu:
            synth(image, label, spacing=1.0, seed=0)
        assert sum(record["applied"] for record in synth.report) == tumours
        again = sum("raised_hu" in t for t in synth.params[0]["tumors"])
        assert gpu.count() <= CALL + TUMOUR * tumours + again, gpu.waits


def test_a_generator_that_names_its_tissue_waits_once_more_a_tumour(monkeypatch):
    generator, counts = tiny_generator(), []
    image, label = scan()
    for card in ({"name": "tiny"}, {"name": "tiny", "tissue_range": SOFT_TISSUE.to_card()}):
        generator.card = card
        synth = SynthesizeTumor(generator, count=2, size_mm=9.0)
        with pretended(monkeypatch, image, label) as gpu:
            synth(image, label, spacing=1.0, seed=0)
        assert sum(record["applied"] for record in synth.report) == 2
        counts.append(gpu.count())
    assert counts[1] <= counts[0] + 2


def test_skipped_samples_wait_least(monkeypatch):
    image, label = scan()
    synth = SynthesizeTumor(tiny_generator(), organ_labels=7)
    with pretended(monkeypatch, image, label) as gpu:
        synth(image, label, spacing=1.0, seed=0)
    assert gpu.count() == 1  # no organ
    with pretended(monkeypatch, image, label) as gpu:
        SynthesizeTumor(tiny_generator(), p=0.0)(image, label, spacing=1.0, seed=0)
    assert gpu.count() == 0


def test_blending_a_tumour_waits_once(monkeypatch):
    inner, counts = finish.blend_candidate, []
    image, label = scan()
    with pretended(monkeypatch, image, label) as gpu:

        def watched(*args):
            before = gpu.count()
            candidate = yield from inner(*args)
            counts.append(gpu.count() - before)
            return candidate

        monkeypatch.setattr(finish, "blend_candidate", watched)
        SynthesizeTumor(tiny_generator(), count=2, size_mm=9.0)(image, label, spacing=1.0, seed=0)
    assert len(counts) >= 2 and set(counts) == {1}  # a faint tumour is blended again


def test_the_pretended_gpu_counts_waits(monkeypatch):
    image, _ = scan()
    alone = torch.ones(3)
    with pretended(monkeypatch, image) as gpu:
        assert float(alone.sum()) == 3 and gpu.count() == 0
        made = alone * image[0, 0, 0, 0]
        assert float(made.sum()) and gpu.count() == 1
        assert image[image > 100].numel() and gpu.count() == 2
        assert made.tolist() and made.cpu().sum() > 0 and gpu.count() == 4


WAYS = {
    "plain": {"count": (1, 4), "size_mm": (6, 16)},
    "prior": {"count": 3, "size_mm": "liver"},
    "merge": {"count": 3, "size_mm": (8, 20), "merge": True},
    "push": {"count": 2, "size_mm": 12.0, "mass_effect": 0.5},
    "hu2023": {"count": 2, "size_mm": (5, 15), "gap_mm": 9.0, "generator": "hu2023"},
}


@pytest.mark.parametrize(
    "kind, name",
    [
        ("ball", "plain"),
        ("corner", "prior"),
        ("tumours", "plain"),
        ("tumours", "push"),
        ("not finite", "merge"),
        ("not finite", "hu2023"),
        ("sliver", "plain"),
    ],
)
def test_a_device_draws_the_same_tumours_from_a_part_of_the_label(monkeypatch, kind, name):
    synth = SynthesizeTumor(**{"generator": tiny_generator(), **WAYS[name]})
    found = []
    for there in (False, True):
        image, label = scan(kind, torch.int64 if name == "prior" else torch.uint8)
        with pretended(monkeypatch, image, label) if there else nullcontext():
            new = synth(image, label, spacing=(1.0, 1.0, 1.3), seed=1)
            params, report = synth.params, synth.report
            again = synth(image, label, spacing=(1.0, 1.0, 1.3), params=params) if there else new
        found.append((*new, *again, params, report))
    for here, far in zip(*found, strict=True):
        if isinstance(here, Tensor):  # NaN is not equal to itself
            assert torch.equal(here.nan_to_num(9e9), far.nan_to_num(9e9))
        else:
            assert repr(here) == repr(far)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int64, torch.float32, torch.float64]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_organs_box_is_the_smallest_around_its_voxels(monkeypatch, dtype, reverse):
    monkeypatch.setattr("tumorsynth.placement.organ.SLAB_VOXELS", 5000)
    label = torch.zeros(30, 40, 50)
    label[3:17, 5:9, 20:44], label[25, 30, 7] = 3, 5
    label[0, 0, 0], label[29, 39, 49] = 4, 99
    label = label.to(dtype)
    if reverse:  # the memory layout of a NIfTI file
        label = label.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for labels in ((3,), (3, 5), (99, 1000), (1000,)):
        at = torch.isin(label.double(), torch.tensor(labels, dtype=torch.float64)).nonzero()
        box = organ_box(label, labels)
        if len(at) == 0:
            assert box is None
        else:
            assert box is not None
            assert list(box.start) == at.amin(0).tolist()
            assert list(box.stop) == (at.amax(0) + 1).tolist()
