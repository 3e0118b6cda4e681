"""Run nnU-Net with synthetic tumours from dataset to prediction, on phantoms.

    python examples/nnunet/recipe.py [FOLDER]

Needs nnunetv2 (2.5 or later) in the same environment. Makes the dataset, plans and preprocesses it,
trains a few steps on the CPU with ``-tr nnUNetTrainerTumorSynth``, and predicts a scan, with the
commands of a real dataset. Takes a few minutes on one core. Everything goes into FOLDER (default:
nnunet-toy).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

import tumorsynth as ts
from tumorsynth.nnunet import shim

CASES = 5
LABELS = {"background": 0, "liver": 1, "tumor": 2}


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def make_dataset(raw: Path) -> Path:
    """Dataset900_Toy: healthy livers, and in some a tumour that plays the annotated one."""
    folder = raw / "Dataset900_Toy"
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    annotated = ts.SynthesizeTumor("hu2023", organ_labels=1, tumor_label=2, count=1, size_mm=20)
    for i in range(CASES + 1):
        ct = ts.make_phantom(spacing=(4, 4, 5), shape=(40, 36, 24), seed=i)
        label = (ct.label == ts.phantom.LABELS["liver"]).to(ct.label.dtype)
        image = ct.image
        if i % 2:
            image, label = annotated(image, label, affine=ct.affine, seed=i)
        where = "imagesTr" if i < CASES else "imagesTs"
        hu = image[0].round().short().numpy()
        save(hu, ct.affine, folder / where / f"toy_{i}_0000.nii.gz")
        if i < CASES:
            save(label[0].byte().numpy(), ct.affine, folder / "labelsTr" / f"toy_{i}.nii.gz")
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": CASES,
        "file_ending": ".nii.gz",
        "tumorsynth": {"organ_labels": ["liver"], "tumor_label": "tumor", "p": 0.5, "count": 1},
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))
    return folder


def main() -> None:
    base = Path(sys.argv[1] if len(sys.argv) > 1 else "nnunet-toy").resolve()
    shutil.rmtree(base / "nnUNet_raw", ignore_errors=True)
    environment = {
        **os.environ,
        **{name: str(base / name) for name in ("nnUNet_raw", "nnUNet_preprocessed")},
        "nnUNet_results": str(base / "nnUNet_results"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "nnUNet_extTrainer": str(shim.folder()),  # nnU-Net 2.8 and later
        # one epoch of few steps; a real training leaves "trainer" out
        "TUMORSYNTH_NNUNET": os.environ.get(
            "TUMORSYNTH_NNUNET",
            json.dumps(
                {
                    "p": 1.0,
                    "trainer": {
                        "num_epochs": 1,
                        "num_iterations_per_epoch": 4,
                        "num_val_iterations_per_epoch": 2,
                    },
                }
            ),
        ),
    }
    dataset = make_dataset(base / "nnUNet_raw")

    def run(command: str, *arguments: str) -> None:
        print("$", command, *arguments, flush=True)
        program = Path(sys.executable).with_name(command)  # of the environment that runs this
        found = str(program) if program.is_file() else shutil.which(command)
        if found is None:
            sys.exit(f"{command} cannot be found: install nnunetv2 in this environment")
        subprocess.run([found, *arguments], env=environment, check=True)

    tr = ("-tr", "nnUNetTrainerTumorSynth")
    few = ("-np", "1")
    run("nnUNetv2_plan_and_preprocess", "-d", "900", "-c", "3d_fullres", "-npfp", "1", *few)
    run("nnUNetv2_train", "900", "3d_fullres", "0", "-device", "cpu", *tr)
    predicted = base / "predicted"
    run(
        *("nnUNetv2_predict", "-d", "900", "-c", "3d_fullres", "-f", "0", "-device", "cpu"),
        *("-i", str(dataset / "imagesTs"), "-o", str(predicted), *tr),
        *("-npp", "1", "-nps", "1", "--disable_tta"),
    )
    (result,) = predicted.glob("*.nii.gz")
    values = np.unique(np.asarray(nib.load(result).dataobj)).tolist()
    print(f"predicted {result.name}, labels {values}")


if __name__ == "__main__":  # nnU-Net starts processes that import this file
    main()
