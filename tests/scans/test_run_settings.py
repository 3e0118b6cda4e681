"""What a run remembers of itself: every setting, in the JSON that earlier reports have."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch

import tumorsynth as ts
from tumorsynth.appearance.gate import Gate
from tumorsynth.scans.replay import SAMPLING_ONLY, synthesizer_options
from tumorsynth.scans.run_settings import ALWAYS_RECORDED, explain_mismatch, run_settings

# another value for every parameter of the transform
OTHER = {
    "generator": "liver-early",
    "organ_labels": (1, 3),
    "tumor_label": 9,
    "p": 0.5,
    "count": 2,
    "size_mm": "kidney",
    "intensity": ts.Scaled(-175, 250, 0, 1),
    "blend": "difftumor",
    "contrast_hu": "liver-portal",
    "sigma_mm": 1.0,
    "gap_mm": 3.0,
    "merge": True,
    "gate": Gate(scorer=np.mean, least=0.5),
    "mass_effect": 0.3,
    "shapes": [(torch.ones(6, 6, 6), (1.0, 1.0, 1.0))],
    "bulge": 0.2,
    "any_tissue": True,
}


def settings(**changes):
    synth = ts.SynthesizeTumor(**{"generator": "hu2023", **changes})
    return run_settings(synth, ct="a_ct.nii", label="a_label.nii", seed=0)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in inspect.signature(ts.SynthesizeTumor).parameters
        if name not in ("device", "label_map")  # names come to organ_labels, see below
    ],
)
def test_no_setting_is_forgotten(tmp_path, name):
    """Of any parameter, also of one that is added later: it needs a value above."""
    report = tmp_path / "a_report.json"
    report.write_text(json.dumps(settings()))
    assert explain_mismatch(report, settings()) is None
    changed = settings(**{name: OTHER[name]})
    assert name in explain_mismatch(report, changed)
    report.write_text(json.dumps(changed))
    assert explain_mismatch(report, settings(**{name: OTHER[name]})) is None
    assert name in explain_mismatch(report, settings())


def test_names_of_organs_are_recorded_as_their_values(tmp_path):
    report = tmp_path / "a_report.json"
    by_name = {"organ_labels": ("liver", "kidney"), "label_map": "flare22", "tumor_label": 20}
    report.write_text(json.dumps(settings(**by_name)))
    assert explain_mismatch(report, settings(organ_labels=(1, 2, 13), tumor_label=20)) is None
    other = settings(**{**by_name, "label_map": "amos"})
    assert "organ_labels" in explain_mismatch(report, other)


def test_defaults_are_recorded_as_in_earlier_reports():
    assert list(settings()["options"]) == list(ALWAYS_RECORDED)
    assert settings()["options"] == {
        "organ_labels": [1],
        "tumor_label": 2,
        "p": 1.0,
        "count": [1, 3],
        "size_mm": [5, 20],
        "blend": "change",
        "contrast_hu": None,
        "sigma_mm": [0.5, 1.5],
        "gap_mm": 2.0,
        "merge": False,
        "mass_effect": {"share": 0.0, "capsule": "free"},
        "bulge": False,
        "intensity": {"kind": "HU"},
    }


def test_the_device_and_the_threads_count():
    assert settings()["device"] == "cpu" and settings()["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", [name for name in OTHER if name != "generator"])
def test_a_replay_takes_every_setting_from_the_report(name):
    """Those aside that decide what is sampled, which the report's params hold."""
    report = settings(**{name: OTHER[name]})
    again = settings(**synthesizer_options(report))
    for sampling in SAMPLING_ONLY:
        report["options"].pop(sampling, None)
    assert again == report
