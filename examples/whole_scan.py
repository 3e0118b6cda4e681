"""Synthesise tumours in a NIfTI scan, with counts and sizes of real liver tumours.

    python examples/whole_scan.py [CT.nii.gz LABEL.nii.gz ORGAN_LABEL]

Without a scan of your own it makes a phantom first. Writes the folder whole_scan: the new CT and
label, the params that repeat the call, and a picture. Needs the extras io and viz. Takes about
half a minute on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import tumorsynth as ts
from tumorsynth.scans.preview import save_preview

TUMOR = 20
folder = Path("whole_scan")
folder.mkdir(exist_ok=True)

if len(sys.argv) == 4:
    ct_path, label_path, organ = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
else:
    ct_path, label_path, organ = folder / "ct.nii.gz", folder / "label.nii.gz", 1
    made = ts.make_phantom(spacing=(1.5, 1.5, 2.5), seed=3)
    nib.save(nib.Nifti1Image(made.image[0].short().numpy(), made.affine), ct_path)
    nib.save(nib.Nifti1Image(made.label[0].numpy(), made.affine), label_path)

ct, labels = nib.load(ct_path), nib.load(label_path)
hu = ct.get_fdata(dtype=np.float32)  # the header's slope and intercept applied
organs = np.asarray(labels.dataobj).astype(np.int16)

# count=None: as many as real cases have; the gate repaints poor tumours or skips them
synth = ts.SynthesizeTumor(
    organ_labels=organ, tumor_label=TUMOR, count=None, size_mm="liver", gate=True
)
image, label = synth(
    torch.from_numpy(hu)[None], torch.from_numpy(organs)[None], affine=ct.affine, seed=11
)
new_hu, new_label = image[0].numpy(), label[0].numpy()

whole = np.issubdtype(ct.get_data_dtype(), np.integer)  # keep integer scans integer
new_ct = nib.Nifti1Image(
    np.rint(new_hu).astype(np.int16) if whole else new_hu, ct.affine, ct.header
)
new_ct.set_data_dtype(np.int16 if whole else np.float32)
nib.save(new_ct, folder / "new_ct.nii.gz")
nib.save(nib.Nifti1Image(new_label, labels.affine), folder / "new_label.nii.gz")
(folder / "params.json").write_text(json.dumps(synth.params))
save_preview(
    folder / "preview.png", hu, new_hu, new_label == TUMOR, ct.affine, synth.report, max_tumors=4
)

for record in synth.report:
    if record["applied"]:
        at = ", ".join(str(round(c)) for c in record["centre_voxel"])
        print(f"{record['diameter_mm']:5.1f} mm at voxel {at}: {record['hu_change']:+.0f} HU")
    else:
        print("none:", record["reason"])
share = (new_hu != hu).mean()
print(f"{share:.2%} of the voxels changed; all others keep their bits")
print("written to", folder)
