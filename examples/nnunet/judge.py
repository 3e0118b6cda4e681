"""Keep the synthetic tumours that a trained nnU-Net finds.

    python examples/nnunet/judge.py MODEL_FOLDER CT.nii.gz LABEL.nii.gz [--least 0.5] [-o FOLDER]

Needs nnunetv2. MODEL_FOLDER is that of nnUNetv2_train, such as
nnUNet_results/Dataset900_Toy/nnUNetTrainer__nnUNetPlans__3d_fullres; examples/nnunet/recipe.py
makes one on phantoms. The label map holds the organ as 1 and gets the tumours as 2.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import tumorsynth as ts
from tumorsynth.nnunet import segmenter_scorer, shim

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", type=Path)
parser.add_argument("ct", type=Path)
parser.add_argument("label", type=Path)
parser.add_argument("--least", type=float, default=0.5)
parser.add_argument("--checkpoint", default="checkpoint_final.pth")
parser.add_argument("-o", type=Path, default=Path("judged"), metavar="FOLDER")
given = parser.parse_args()

os.environ.setdefault("nnUNet_extTrainer", str(shim.folder()))  # where nnU-Net 2.8 finds trainers
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(str(given.model), (0,), given.checkpoint)
scorer = segmenter_scorer(predictor)
gate = ts.Gate(scorer=scorer, least=given.least, tries=3)
synth = ts.SynthesizeTumor(
    "hu2023", organ_labels=1, tumor_label=2, count=3, size_mm=(14, 22), gate=gate
)

scan, organ = nib.load(given.ct), nib.load(given.label)
hu = torch.from_numpy(scan.get_fdata(dtype=np.float32))[None]
label = torch.from_numpy(np.asarray(organ.dataobj).astype(np.int16))[None]
image, new = synth(hu, label, affine=scan.affine, seed=0)

given.o.mkdir(parents=True, exist_ok=True)
nib.save(nib.Nifti1Image(image[0].round().short().numpy(), scan.affine), given.o / "ct.nii.gz")
nib.save(nib.Nifti1Image(new[0].byte().numpy(), scan.affine), given.o / "label.nii.gz")
print(scorer)
for record in synth.report:
    found = record.get("scores", {}).get("scorer")
    share = "not judged" if found is None else f"{found:.0%} found"
    print(f"{'kept' if record['applied'] else 'skipped'}: {share}; {record.get('reason', '')}")
