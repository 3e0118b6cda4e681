"""nnU-Net plans and preprocesses the folder that `synthesize` makes of a raw dataset, unchanged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_nnunet import with_timm  # noqa: F401 (a fixture)

import tumorsynth as ts
from tumorsynth.commands.main import main

pytest.importorskip("nnunetv2", reason="needs nnU-Net: pip install nnunetv2")
nib = pytest.importorskip("nibabel")

CASES = 3


@pytest.fixture
def raw(tmp_path):
    """Dataset001_Liver of phantoms, without tumours."""
    folder = tmp_path / "nnUNet_raw" / "Dataset001_Liver"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for k in range(CASES):
        ct = ts.make_phantom(spacing=(4, 4, 5), shape=(40, 36, 24), seed=k)
        label = (ct.label == ts.phantom.LABELS["liver"]).byte()
        for array, name in (
            (ct.image.round().short(), f"imagesTr/l_{k}_0000.nii.gz"),
            (label, f"labelsTr/l_{k}.nii.gz"),
        ):
            nib.save(nib.Nifti1Image(array[0].numpy(), ct.affine), folder / name)
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


@pytest.mark.slow  # nnU-Net imports every trainer it has
@pytest.mark.timeout(1800)
def test_nnunet_plans_on_a_synthesised_folder(raw, with_timm, tmp_path):  # noqa: F811
    made = raw.with_name("Dataset002_Synthetic")
    words = ["synthesize", raw, "-o", made, "--organ", "liver", "--generator", "hu2023"]
    words += ["--count", 1, "--size-mm", 15, 20]
    (raw / "labelsTr/l_1.nii.gz").unlink()  # one that fails must not count
    assert main([str(word) for word in words]) == 1
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    folders = {name: str(tmp_path / name) for name in names}
    beside = Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")
    command = str(beside) if beside.is_file() else shutil.which(beside.name)
    words = ["-d", "2", "-c", "3d_fullres", "-npfp", "1", "-np", "1", "--verify_dataset_integrity"]
    done = subprocess.run(
        [command, *words], env={**with_timm, **folders}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    preprocessed = tmp_path / "nnUNet_preprocessed" / made.name
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    assert "3d_fullres" in plans["configurations"]
    arrays = {p.name.split(".")[0] for p in (preprocessed / "nnUNetPlans_3d_fullres").iterdir()}
    assert {"l_0", "l_2"} <= arrays and "l_1" not in arrays
    described = json.loads((preprocessed / "dataset.json").read_text())
    assert described["labels"]["tumor"] == 2
