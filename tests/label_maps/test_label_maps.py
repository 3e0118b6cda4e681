"""Names of organs: the maps of public sets, the user's own, and what does not fit them."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import tumorsynth as ts
from tumorsynth.label_maps import PUBLISHED, organ_values, read_label_map

# Excerpts, value by value, of the lists that published.py cites.
EXCERPTS = json.loads((Path(__file__).parent / "published.json").read_text())
ORGANS = {"liver": 1, "kidney_left": 5, "kidney_right": 4}


def values(name, label_map):
    return organ_values(name, read_label_map(label_map))


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_those_that_the_set_publishes(name):
    excerpt = EXCERPTS[name]
    for value, structure in excerpt["labels"].items():
        assert PUBLISHED[name][structure] == (int(value),)
    assert len(PUBLISHED[name]) == excerpt["count"]
    assert sorted(PUBLISHED[name].values()) == [(k + 1,) for k in range(excerpt["count"])]


@pytest.mark.parametrize(
    ("label_map", "name", "expected"),
    [
        ("totalsegmentator", "kidney", (2, 3)),
        ("totalsegmentator", "Kidneys", (2, 3)),
        ("totalsegmentator", "left kidney", (3,)),
        ("totalsegmentator", "lung", (10, 11, 12, 13, 14)),
        ("totalsegmentator", "left lung", (10, 11)),
        ("totalsegmentator", "kidney_cyst", (23, 24)),
        ("totalsegmentator", "gall bladder", (4,)),
        ("totalsegmentator-v1", "pancreas", (10,)),
        ("AMOS", "kidney", (2, 3)),
        ("amos", "inferior vena cava", (9,)),
        ("amos", "aorta", (8,)),
        ("btcv", "adrenal gland", (12, 13)),
        ("flare22", "kidney", (2, 13)),
        ("abdomenatlas", "lungs", (21, 22)),
        ("abdomenatlas", "gallbladder", (2,)),
        ("kits", "tumour", (2,)),
        ("msd_pancreas", "pancreas", (1,)),
        ({"liver": 6}, "liver", (6,)),
        ({6: "liver", 7: "stomach"}, "liver", (6,)),
        ({"0": "background", "6": "liver"}, "liver", (6,)),
        ({"whole liver": [1, 2]}, "whole_liver", (1, 2)),
        ({"left_kidney": np.int64(3), "right_kidney": 2.0}, "kidney", (2, 3)),
    ],
)
def test_names_groups_and_synonyms(label_map, name, expected):
    assert values(name, label_map) == expected


SPELLINGS = [
    ("Left-Kidney", "kidney.r"),
    ("LeftKidney", "RightKidney"),
    ("kidney-L", "kidney-R"),
    ("l_kidney", "r_kidney"),
    ("Kidney (left)", "Kidney (right)"),
    ("kidney_l", "kidney_r"),
    ("renal left", "renal right"),
    ("KIDNEY LEFT", "KIDNEY_RIGHT"),
    ("KidneyL", "RKidney"),
    ("Lt Kidney", "Kidney_Rt"),
    ("kidneys left", "Kidney, right"),
    ("left  kidney", "renal.R"),
]


@pytest.mark.parametrize(("left", "right"), SPELLINGS)
def test_a_group_has_both_sides_however_they_are_spelt(tmp_path, left, right):
    label_map = {"liver": 1, right: 4, left: 5, "kidney_tumor": 6, "KidneyCystL": 7, "L1": 8}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, **label_map}}))
    for given in (label_map, {v: k for k, v in label_map.items()}, path):
        for name in ("kidney", "Kidneys", "renal"):
            assert values(name, given) == (4, 5), name
        for spelt in SPELLINGS:
            assert (values(spelt[0], given), values(spelt[1], given)) == ((5,), (4,))
    assert values("LIVER", label_map) == (1,) and values("l1", label_map) == (8,)


@pytest.mark.parametrize(
    ("label_map", "name", "says"),
    [
        ({"kidney_left": 1, "kidneyrechts": 2}, "kidney", "perhaps others.*'kidneyrechts'"),
        ({"kidney_r": 1, "kidney 2": 2}, "kidney", "perhaps others.*'kidney 2'"),
        ({"Left-Kidney": 1, "left kidney": 2}, "left_kidney", "differ by more than spelling"),
        ({"liver": 1, "LIVER": 2}, "liver", "differ by more than spelling"),
        ({"postcava": 1, "inferior vena cava": 2}, "IVC", "differ by more than spelling"),
        ({"Niere L": 1}, "kidney", "it has Niere L"),
        ({"KIDNEY_LEFT": 1}, "kidny", "did you mean KIDNEY_LEFT"),
        ({"Left": 1, "Lobe": 2}, "left lobe", "it has Left, Lobe"),
        ({"liver": 1}, " ", "it has liver"),
    ],
)
def test_what_may_mean_several_structures_is_not_guessed(label_map, name, says):
    with pytest.raises(ValueError, match=says):
        values(name, label_map)


def test_one_side_alone_is_the_group_where_there_is_no_other():
    assert values("kidney", {"kidney_left": 1, "kidney_cyst": 2, "kidney_left_tumor": 3}) == (1,)
    assert values("liver", {"liver": 1, "liver_left": 2, "liver vessel": 3}) == (1,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_name_stands_for_its_own_value(name):
    for structure, value in PUBLISHED[name].items():
        for spelt in (structure, structure.upper(), structure.replace("_", " ").title()):
            assert values(spelt, name) == value


def test_several_names_and_values_together():
    assert values(["liver", "pancreas"], "btcv") == (6, 11)
    assert values(("kidney", "kidney_left", 40), "totalsegmentator") == (2, 3, 40)


@pytest.mark.parametrize("labels", [{"liver": 1}, {"0": "background", "1": "liver"}])
def test_a_dataset_json_or_its_folder_is_a_map(tmp_path, labels):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": labels}))
    for given in (path, str(path), tmp_path):
        assert values("liver", given) == (1,)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"organ_labels": "livr", "label_map": "amos"}, ValueError, "did you mean liver.*spleen,"),
        ({"organ_labels": "vertebra", "label_map": "totalsegmentator"}, ValueError, "vertebrae_"),
        ({"organ_labels": "spleen", "label_map": "kits"}, ValueError, "kidney, tumor, cyst"),
        ({"organ_labels": "liver"}, ValueError, "need a label_map"),
        ({"label_map": "amos"}, ValueError, "organ_labels hold none"),
        ({"organ_labels": 6, "label_map": "amos"}, ValueError, "organ_labels hold none"),
        ({"organ_labels": "liver", "label_map": "amoss"}, ValueError, "did you mean amos"),
        ({"organ_labels": "liver", "label_map": 3}, TypeError, "one of totalsegmentator"),
        ({"organ_labels": "liver", "label_map": {}}, ValueError, "at least one value"),
        ({"organ_labels": "liver", "label_map": {"liver": "a"}}, ValueError, "whole numbers"),
        ({"organ_labels": "liver", "label_map": {"liver": True}}, ValueError, "whole numbers"),
        ({"organ_labels": "liver", "label_map": "no.json"}, FileNotFoundError, "no.json"),
        ({"organ_labels": "background", "label_map": {"background": 0}}, ValueError, "not hold 0"),
        ({"organ_labels": "liver", "label_map": {"liver": 2}}, ValueError, "tumor_label"),
        (
            {"organ_labels": "liver", "label_map": {"Liver": 6, "liver": 7}},
            ValueError,
            "than spelling",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        ts.SynthesizeTumor("hu2023", **arguments)


def test_a_malformed_dataset_json_is_named(tmp_path):
    path = tmp_path / "dataset.json"
    for text, says in [("{", "must be JSON"), ("[]", "labels"), ('{"labels": [1]}', "labels")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_label_map(path)


@pytest.fixture(scope="module")
def ct():
    return ts.make_phantom(spacing=(3.0, 3.0, 3.0), shape=(48, 48, 40))


def synth(**arguments):
    arguments = {"count": 1, "size_mm": 12, "tumor_label": 40, **arguments}
    return ts.SynthesizeTumor("hu2023", **arguments)


def test_a_name_does_what_its_value_does(ct):
    made = [
        synth(organ_labels=organ, label_map=label_map)(ct.image, ct.label, ct.spacing, seed=3)
        for organ, label_map in ((1, None), ("liver", ORGANS))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    assert (made[0][1] == 40).any()


def test_a_label_of_another_set_is_refused_with_its_values(ct):
    with pytest.raises(ValueError, match="'lits' must be that of the label.*holds 3, 4, .*of 0, 1"):
        synth(organ_labels="liver", label_map="lits")(ct.image, ct.label, ct.spacing, seed=0)
    own = synth(organ_labels="liver", label_map={"liver": 1})  # need not name everything
    own(ct.image, ct.label, ct.spacing, seed=0)
    assert own.report[0]["applied"]


@pytest.mark.parametrize("value", [20, 255])
def test_the_tumours_own_value_is_no_contradiction(ct, value):
    label = torch.where(ct.label > 2, 0, ct.label)
    label[0, 0, 0, 0] = value
    synth(organ_labels="liver", label_map="lits", tumor_label=value)(ct.image, label, ct.spacing)


def test_an_absent_organ_is_skipped_with_the_values_that_are_there(ct):
    one = synth(organ_labels="sternum", label_map="totalsegmentator")
    image, _ = one(ct.image, ct.label, ct.spacing, seed=0)
    reason = one.report[0]["reason"]
    assert image is ct.image and one.report[0]["code"] == "no_organ"
    assert (
        reason.startswith("no organ") and "116 (sternum)" in reason and "4 (gallbladder)" in reason
    )


def test_a_tumour_label_that_the_map_gives_to_an_organ_warns_once():
    with pytest.warns(UserWarning, match="2 is kidney_right.*tumor_label=118") as said:
        made = ts.SynthesizeTumor("hu2023", "liver", label_map="totalsegmentator")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(pickle.dumps(made))
        ts.SynthesizeTumor("hu2023", "liver", label_map="lits")  # 2 is the tumour there


def test_every_adapter_takes_names(ct):
    from tumorsynth.adapter import Adapter

    settings = {"generator": "hu2023", "organ_labels": "liver", "label_map": ORGANS}
    settings |= {"tumor_label": 40, "count": 1, "size_mm": 12}
    _, expected = synth(organ_labels=1)(ct.image, ct.label, ct.spacing, seed=3)
    made = Adapter(**settings, spacing=ct.spacing)(ct.image, ct.label, seed=3)[1]
    assert torch.equal(made, expected)
    apart = Adapter(separate_organ=True, **settings, spacing=ct.spacing)
    assert (apart(ct.image, torch.zeros_like(ct.label), ct.label, seed=3)[1] == 40).any()
    with pytest.raises(ValueError, match="'lits' must be that of the label"):
        wrong = {**settings, "label_map": "lits"}
        Adapter(separate_organ=True, **wrong, spacing=ct.spacing)(
            ct.image, torch.zeros_like(ct.label), ct.label, seed=3
        )


def test_monai_and_lightning_take_names(ct):
    pytest.importorskip("monai", reason="needs the extra monai")
    from tumorsynth.monai import RandSynthesizeTumord

    settings = {"generator": "hu2023", "organ_labels": "kidney", "label_map": ORGANS}
    transform = RandSynthesizeTumord("image", "label", prob=1.0, tumor_label=40, **settings)
    assert transform.adapter.synth.organ_labels == (4, 5)
    assert "label_map=" in repr(transform.adapter)


def test_torchio_takes_names_also_in_its_history(ct):
    tio = pytest.importorskip("torchio", reason="needs the extra torchio")
    from tumorsynth.torchio import RandomSynthesizeTumor

    subject = tio.Subject(
        image=tio.ScalarImage(tensor=ct.image, affine=ct.affine),
        label=tio.LabelMap(tensor=ct.label, affine=ct.affine),
    )
    settings = {"generator": "hu2023", "organ_labels": "liver", "label_map": ORGANS}
    settings |= {"tumor_label": 40, "count": 1, "size_mm": 12}
    made = RandomSynthesizeTumor(image="image", label="label", p=1, **settings)(subject)
    assert (made.label.data == 40).any()
    again = made.history[-1](subject)
    assert torch.equal(again.label.data, made.label.data)


@pytest.mark.parametrize(
    ("organ_labels", "label_map", "says"),
    [
        (["liver", ["spleen"]], {"liver": 1, "spleen": 3}, "must be names or whole numbers"),
        (("liver", {"spleen"}), {"liver": 1, "spleen": 3}, "must be names or whole numbers"),
        ("liver", {"liver": -1}, "whole numbers from 0"),
        ("liver", {"liver": 2**63}, "whole numbers from 0"),
        ("tumour", {"whole": [1, 2], "tumour": 2}, "must differ from organ_labels"),
    ],
)
def test_names_that_cannot_be_values_are_named(organ_labels, label_map, says):
    with pytest.raises(ValueError, match=says):
        synth(organ_labels=organ_labels, label_map=label_map, tumor_label=2)


def test_a_region_stands_for_the_organ_without_the_tumours():
    regions = {"whole": [1, 2], "lesion": 2}
    assert synth(organ_labels="whole", label_map=regions, tumor_label=2).organ_labels == (1,)
    assert synth(organ_labels="whole", label_map=regions, tumor_label=3).organ_labels == (1, 2)
