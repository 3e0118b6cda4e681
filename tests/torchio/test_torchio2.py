"""The transforms under TorchIO 2 (alpha): subjects, batches, history, seeds, loaders."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch

tio = pytest.importorskip("torchio")
if int(tio.__version__.split(".")[0]) < 2:
    pytest.skip("needs TorchIO 2: make matrix has it", allow_module_level=True)

from tumorsynth.torchio import RandomSynthesizeTumor, SynthesizeTumor  # noqa: E402

SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": (8, 10)}
OBLIQUE = np.array(
    [[-0.8, 0, 0, 90.0], [0, -0.26, -1.4772, -40.0], [0, 1.4772, -0.26, 1200.5], [0, 0, 0, 1]]
)


def subject(affine=None, seed=0, image_dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, 40),) * 3, indexing="ij")
    label = (sum(a**2 for a in axes) < 0.7)[None].to(torch.int16)
    image = 60 + 40 * label.float() + 10 * torch.randn(label.shape, generator=generator)
    affine = np.eye(4) if affine is None else affine
    return tio.Subject(
        image=tio.ScalarImage(image.to(image_dtype), affine=affine),
        label=tio.LabelMap(label, affine=affine),
        name="a",
    )


def transform(**kwargs):
    return RandomSynthesizeTumor(**{**SETTINGS, **kwargs})


def equal(a, b):
    return all(torch.equal(a[name].data, b[name].data) for name in ("image", "label"))


def tumor(x):
    return x["label"].data == 2


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.int16])
def test_subject_comes_back_as_it_was_with_a_tumor(image_dtype):
    given = subject(OBLIQUE, image_dtype=image_dtype)
    before = copy.deepcopy(given)
    torch.manual_seed(0)
    synthesis = transform()
    out = synthesis(given)
    assert equal(given, before) and not given.applied_transforms
    assert out["image"].data.dtype == image_dtype and out["label"].data.dtype == torch.int16
    assert type(out["label"]) is tio.LabelMap and out.name == "a"
    np.testing.assert_array_equal(out["image"].affine.numpy(), OBLIQUE)
    record = synthesis.report[0]
    assert int(tumor(out).sum()) == record["label_voxels"]
    centre = (OBLIQUE @ [*record["centre_voxel"], 1])[:3]
    np.testing.assert_allclose(record["centre_mm"], centre, atol=1e-9)
    change = (out["image"].data.float() - before["image"].data.float())[tumor(out)]
    assert change.mean() < -8


def test_history_is_small_and_replays_bit_by_bit():
    torch.manual_seed(1)
    chain = tio.Compose([transform(contrast_hu=(-60, -20)), tio.Flip(axes=(0,))])
    out = chain(subject())
    trace, flip = out.applied_transforms
    assert (trace.name, flip.name) == ("RandomSynthesizeTumor", "Flip")
    assert len(json.dumps(trace.params)) < 3000
    torch.manual_seed(99)  # a replay draws nothing
    made = SynthesizeTumor(**pickle.loads(pickle.dumps(trace.params)))(subject())
    assert equal(tio.Flip(axes=(0,))(made), out)
    twice = SynthesizeTumor(**made.applied_transforms[0].params)(subject())
    assert equal(twice, made)
    with pytest.warns(UserWarning, match="not invertible"):
        back = out.apply_inverse_transform()
    assert equal(back, made)


def test_each_sample_of_a_batch_has_its_own_tumors_and_history():
    batch = tio.SubjectsBatch.from_subjects([subject(seed=s) for s in range(6)])
    torch.manual_seed(0)
    out = transform(p=0.5)(batch)
    made = [bool((label == 2).any()) for label in out["label"].data]
    assert any(made) and not all(made)
    for one, changed, seed in zip(out.unbatch(), made, range(6), strict=True):
        assert len(one.applied_transforms) == changed
        if changed:
            assert equal(
                SynthesizeTumor(**one.applied_transforms[0].params)(subject(seed=seed)), one
            )
    labels = [label for label, changed in zip(out["label"].data, made, strict=True) if changed]
    assert len({label.numpy().tobytes() for label in labels}) == len(labels) > 1

    torch.manual_seed(0)
    alike = transform(per_instance=False)(batch)
    centres = {label.numpy().tobytes() for label in alike["label"].data}
    assert len(centres) == 1  # one seed, one organ
    whole = SynthesizeTumor(alike.applied_transforms[0].params["params"], generator="hu2023")(batch)
    assert equal(whole, alike)


def test_manual_seed_reproduces_and_p_holds():
    torch.manual_seed(0)
    first, second = transform()(subject()), transform()(subject())
    torch.manual_seed(0)
    assert equal(first, transform()(subject())) and not equal(first, second)
    never = transform(p=0)(subject())
    assert equal(never, subject()) and not never.applied_transforms


def test_include_exclude_healthy_only_and_a_separate_organ():
    for which in ({"exclude": ["image"]}, {"include": ["image"]}):
        out = transform(**which)(subject())
        assert equal(out, subject()) and not out.applied_transforms
    ill = transform()(subject())
    again = transform(healthy_only=True)(ill)
    assert equal(again, ill)
    given = subject()
    lesions = tio.LabelMap(torch.zeros_like(given["label"].data))
    apart = tio.Subject(image=given["image"], organ=given["label"], label=lesions)
    out = transform(organ="organ", tumor_label=1)(apart)
    assert (out["label"].data == 1).any()
    made = SynthesizeTumor(**out.applied_transforms[0].params)(apart)
    assert equal(made, out)


def test_one_of_loader_with_workers_and_pickles():
    choice = tio.Compose([tio.OneOf([transform(), transform(size_mm=6)])])
    assert len(pickle.dumps(choice)) < 20_000
    loader = tio.SubjectsLoader(Listed([subject()] * 4, choice), batch_size=2, num_workers=2)
    labels = [label for batch in loader for label in batch["label"].data]
    assert all((label == 2).any() for label in labels)
    assert len({label.numpy().tobytes() for label in labels}) == 4


class Listed(torch.utils.data.Dataset):
    def __init__(self, subjects, transform):
        self.subjects, self.transform = subjects, transform

    def __len__(self):
        return len(self.subjects)

    def __getitem__(self, index):
        return self.transform(self.subjects[index])


def test_errors_and_repr():
    with pytest.raises(ValueError, match="needs the image seg, but the subject has image, label"):
        transform(label="seg")(subject())
    with pytest.raises(TypeError, match="got one image alone; pass a subject: tio.Subject"):
        transform()(subject()["image"].data)
    with pytest.raises(TypeError, match="argument sise_mm of RandomSynthesizeTumor; did .*size_mm"):
        transform(sise_mm=3)
    with pytest.raises(ValueError, match="the record of one sample, .*, got 'a.json'; pass"):
        SynthesizeTumor(params="a.json")
    given = subject()
    moved = tio.LabelMap(given["label"].data, affine=OBLIQUE)
    with pytest.raises(ValueError, match="must share one grid"):
        transform()(tio.Subject(image=given["image"], label=moved))
    assert repr(transform(p=0.5)).endswith("p=0.5, generator='hu2023', count=1, size_mm=(8, 10))")


def test_history_replays_on_the_grid_of_its_subject_alone():
    torch.manual_seed(0)
    out = transform()(subject(OBLIQUE))
    replay = SynthesizeTumor(**json.loads(json.dumps(out.applied_transforms[0].params)))
    assert equal(replay(subject(OBLIQUE)), out)
    for other, says in [
        (subject(OBLIQUE @ np.diag([2, 1, 1, 1])), "got one of 1.6 x 1.49991 x 1.49991 mm"),
        (subject(OBLIQUE @ np.diag([-1, 1, 1, 1])), "with axes L.., got one with axes R.."),
    ]:
        with pytest.raises(ValueError, match=f"params must be replayed on the grid .*{says}"):
            replay(other)
