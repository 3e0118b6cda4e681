"""Tumours inside a MONAI pipeline: one line among the transforms.

    python examples/monai_pipeline.py

Needs the extra monai. Takes a few seconds on a CPU.
"""

from __future__ import annotations

from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, RandSpatialCropd, ScaleIntensityRanged

import tumorsynth as ts
from tumorsynth.monai import RandSynthesizeTumord

ct = ts.make_phantom(spacing=(2.0, 2.0, 2.0), seed=0)  # stands for LoadImaged and its neighbours
case = {
    "image": MetaTensor(ct.image, affine=ct.affine),
    "label": MetaTensor(ct.label, affine=ct.affine),
}

transforms = Compose(
    [
        # in Hounsfield units, before the intensity scaling
        RandSynthesizeTumord("image", "label", organ_labels=1, tumor_label=20, prob=0.5),
        RandSpatialCropd(["image", "label"], roi_size=(64, 64, 64), random_size=False),
        ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
    ]
).set_random_state(seed=0)

for batch in DataLoader(Dataset([case] * 4, transforms), batch_size=2):
    tumor_voxels = (batch["label"] == 20).flatten(1).sum(1).tolist()
    print(f"image {tuple(batch['image'].shape)}, tumour voxels {tumor_voxels}")
