"""A small segmentation training with MONAI that makes its tumours on the fly.

    python examples/monai_pipeline.py

Needs the extra monai. Takes about a minute on a CPU. The scans are healthy phantoms: the network
learns tumours from synthetic ones only. At the end it sees a synthetic tumour in a new patient.
"""

from __future__ import annotations

import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, EnsureTyped, RandFlipd, ScaleIntensityRanged
from monai.utils import set_determinism

import tumorsynth as ts
from tumorsynth.monai import RandSynthesizeTumord

LIVER, TUMOR = 1, 2
KEYS = ["image", "label"]
set_determinism(0)


def healthy(seed: int) -> dict[str, MetaTensor]:
    """Return HU and a label map with their affine, as LoadImaged would."""
    ct = ts.make_phantom(spacing=(3.0, 3.0, 4.0), shape=(48, 48, 32), seed=seed)
    liver = (ct.label == ts.phantom.LABELS["liver"]).long()
    return {
        "image": MetaTensor(ct.image, affine=ct.affine),
        "label": MetaTensor(liver, affine=ct.affine),
    }


synthesis = RandSynthesizeTumord(
    "image", "label", organ_labels=LIVER, tumor_label=TUMOR, prob=0.9, count=1, size_mm=(16, 24)
)
scaling = ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True)
flip = RandFlipd(KEYS, prob=0.5, spatial_axis=0)
transforms = Compose([EnsureTyped(KEYS), synthesis, scaling, flip]).set_random_state(seed=0)

# the cache holds what comes before the synthesis; each epoch gets new tumours
loader = DataLoader(CacheDataset([healthy(i) for i in range(3)], transforms, progress=False))
network = BasicUNet(in_channels=1, out_channels=3, features=(8, 8, 16, 16, 16, 8))
loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
optimizer = torch.optim.Adam(network.parameters(), 1e-2)

for epoch in range(12):
    total = 0.0
    for batch in loader:
        loss = loss_of(network(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(loader):.3f}")

synthesis.prob = 1.0
test = Compose([synthesis, scaling]).set_random_state(seed=1)(healthy(100))  # a patient of its own
network.eval()
with torch.no_grad():
    score = network(test["image"][None]).softmax(1)[0, TUMOR]
tumor, liver = test["label"][0] == TUMOR, test["label"][0] == LIVER
inside, outside = float(score[tumor].mean()), float(score[liver].mean())
steps = 12 * len(loader)
print(f"mean predicted probability of tumour after {steps} steps:")
print(f"  in the synthetic tumour   {inside:.1%}")
print(f"  in the liver around it    {outside:.1%}")
print(
    f"That is {inside / outside:.1f} times as high in the tumour. Both values are low: tumours are"
)
print("rare, and the training is short. A real one takes thousands of steps.")
