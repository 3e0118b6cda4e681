"""A value of tumor_label that the label holds: real tumours pass, another organ is warned of."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from phantoms import shared_phantom

import tumorsynth as ts
from tumorsynth.adapter import Adapter
from tumorsynth.phantom import LABELS
from tumorsynth.pipeline.taken_label import free_value, measure

SPACING = (3.0, 3.0, 3.0)


@pytest.fixture(scope="module")
def ct():
    return shared_phantom(SPACING, (64, 60, 40))


def said(work):
    """The warnings about a taken value that a function gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught if "tumor_label" in str(w.message)]


def make(**settings):
    return ts.SynthesizeTumor("hu2023", count=1, size_mm=10, **{"organ_labels": 1, **settings})


def lits(ct, centre=None, radius=3):
    """A label of liver 1 and a tumour 2 in it, by default well inside."""
    label = (ct.label == 1).to(torch.uint8)
    inside = torch.nn.functional.avg_pool3d(label[None].float(), 7, 1, 3)[0]
    centre = (inside == inside.max()).nonzero()[0, 1:] if centre is None else centre
    grid = torch.stack(torch.meshgrid(*map(torch.arange, label.shape[1:]), indexing="ij"))
    ball = ((grid - torch.as_tensor(centre).view(3, 1, 1, 1)) ** 2).sum(0) < radius**2
    label[0][ball] = 2
    return label


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.uint16])
@pytest.mark.parametrize("organ", ["pancreas", "left_kidney", "spleen", "stomach", "spine"])
def test_an_organ_of_the_value_is_said_once_by_value_and_count(ct, organ, dtype):
    value = LABELS[organ]
    label = ct.label.to(dtype)
    synth = make(tumor_label=value)
    (words,) = said(lambda: [synth(ct.image, label, SPACING, seed=k) for k in range(3)])
    assert f"label holds {int((label == value).sum())} voxels of {value} = tumor_label" in words
    assert f"pass tumor_label={int(ct.label.max()) + 1}," in words


@pytest.mark.parametrize("radius", [1.5, 3, 5])
def test_real_tumours_of_the_value_are_no_reason_to_warn(ct, radius):
    assert not said(lambda: make()(ct.image, lits(ct, radius=radius), SPACING, seed=0))
    surface = ((ct.label[0] == 1) & (torch.roll(ct.label[0], 1, 0) != 1)).nonzero()
    bulging = lits(ct, surface[len(surface) // 2], radius)
    assert not said(lambda: make()(ct.image, bulging, SPACING, seed=0))
    with_cyst = bulging.clone()
    with_cyst[0, :2, :2, :2] = 3
    assert not said(lambda: make()(ct.image, with_cyst, SPACING, seed=0))


def test_real_tumours_in_a_map_of_all_organs(ct):
    label = ct.label + 1
    label[ct.label == 0] = 0
    label[lits(ct) == 2] = 1  # organs from 2 on, tumours 1
    synth = make(organ_labels=2, tumor_label=1)
    assert not said(lambda: synth(ct.image, label, SPACING, seed=0))


def test_a_label_of_two_organs_is_told_from_tumours_by_volume(ct):
    two = (LABELS["liver"], LABELS["left_kidney"])
    label = (ct.label == two[0]) + 2 * (ct.label == two[1]).to(torch.uint8)
    assert len(said(lambda: make()(ct.image, label, SPACING, seed=0))) == 1
    nodes = (ct.label == LABELS["liver"]).to(torch.uint8)
    nodes[0, :4, :4, :4] = 2  # apart from the organ, and small
    assert not said(lambda: make()(ct.image, nodes, SPACING, seed=0))


def test_a_free_value_and_a_replay_say_nothing(ct):
    synth = make(tumor_label=20)
    assert not said(lambda: synth(ct.image, ct.label, SPACING, seed=0))
    synth = make(tumor_label=LABELS["spleen"])
    quiet = make(tumor_label=LABELS["spleen"])
    assert said(lambda: synth(ct.image, ct.label, SPACING, seed=0))
    replay = {"params": synth.params}
    assert not said(lambda: quiet(ct.image, ct.label, SPACING, **replay))


def test_patches_without_the_value_are_no_evidence(ct):
    synth = make(tumor_label=LABELS["spleen"])
    healthy = torch.where(ct.label == LABELS["spleen"], 0, ct.label)
    assert not said(lambda: [synth(ct.image, healthy, SPACING, seed=k) for k in range(10)])
    assert len(said(lambda: synth(ct.image, ct.label, SPACING, seed=0))) == 1


def test_only_so_many_samples_are_judged(ct, monkeypatch):
    judged = []
    monkeypatch.setattr(
        "tumorsynth.pipeline.taken_label.measure",
        lambda *args: judged.append(1) or measure(*args),
    )
    synth, label = make(), lits(ct)
    for k in range(12):
        synth(ct.image, label, SPACING, seed=k)
    assert len(judged) == 8


def test_each_transform_says_it_also_as_a_copy(ct):
    synth = make(tumor_label=LABELS["spleen"])
    copies = [copy.deepcopy(synth), pickle.loads(pickle.dumps(synth)), synth]
    for one in copies:
        assert len(said(lambda one=one: one(ct.image, ct.label, SPACING, seed=0))) == 1
    again = pickle.loads(pickle.dumps(synth))
    assert not said(lambda: again(ct.image, ct.label, SPACING, seed=0))


def test_merge_does_not_hide_it(ct):
    synth = make(tumor_label=LABELS["spleen"], merge=True)
    assert len(said(lambda: synth(ct.image, ct.label, SPACING, seed=0))) == 1


def test_healthy_only_names_what_it_spares_and_warns(ct):
    value = LABELS["spleen"]
    adapter = Adapter(healthy_only=True, generator="hu2023", organ_labels=1, tumor_label=value)
    work = lambda: [adapter(ct.image, ct.label, spacing=SPACING, seed=k) for k in range(3)]  # noqa: E731
    assert len(said(work)) == 1
    count = int((ct.label == value).sum())
    reason = f"left alone (holds a tumour already: {count} voxels of {value} = tumor_label)"
    assert [record["reason"] for record in adapter.report] == [reason]
    healthy = Adapter(healthy_only=True, generator="hu2023", organ_labels=1, tumor_label=2)
    assert not said(lambda: healthy(ct.image, lits(ct), spacing=SPACING, seed=0))
    assert healthy.report[0]["code"] == "has_tumor"


def test_a_separate_organ_map_is_judged_with_the_label(ct):
    def adapter(value):
        return Adapter(True, generator="hu2023", organ_labels=1, tumor_label=value, count=1)

    organ = (ct.label == 1).to(torch.uint8)
    spleen = adapter(LABELS["spleen"])
    (words,) = said(lambda: spleen(ct.image, ct.label, organ, spacing=SPACING, seed=0))
    assert f"voxels of {LABELS['spleen']} = tumor_label" in words
    assert "pass tumor_label=17," in words
    tumors = (lits(ct) == 2).to(torch.uint8)  # 1, the organ's value in its own map
    assert not said(lambda: adapter(1)(ct.image, tumors, organ, spacing=SPACING, seed=0))


def test_a_free_value_fits_the_dtype():
    assert free_value(torch.tensor([0, 1, 7], dtype=torch.uint8)) == 8
    assert free_value(np.array([0, 1, 255], np.uint8)) == 2
    assert free_value(torch.tensor([-1.0, 0.0])) == 1


def test_real_tumours_of_real_scans_pass_and_organs_do_not(shared):
    nib = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    for name in ("lits000", "crlm_1100_lowres", "lung1_003", "radcttace_0697_eqp"):
        file = nib.load(shared / f"data/ct/{name}_label.nii.gz")
        label = np.asarray(file.dataobj).astype(np.uint8)
        voxel_mm3 = float(np.prod(file.header.get_zooms()[:3]))
        where = np.argwhere(label == 2)
        parts = [label]
        for _ in range(40):
            side = rng.integers(24, 128, 3)
            start = where[rng.integers(len(where))] - rng.integers(0, side)
            start = np.clip(start, 0, np.maximum(0, np.array(label.shape) - side))
            parts.append(label[tuple(slice(a, a + n) for a, n in zip(start, side, strict=True))])
        for part in parts:
            found = measure(torch.from_numpy(part.copy()), 2, (1,))
            assert found is None or not found.looks_like_an_organ(voxel_mm3), (name, found)
    label = np.asarray(nib.load(shared / "data/ct/totalseg_example_label.nii.gz").dataobj)
    for value in range(2, 12):
        found = measure(torch.from_numpy(label.astype(np.uint8)), value, (1,))
        assert found.looks_like_an_organ(27.0), (value, found)
