"""Train with MONAI on the tumours that the network misses, judged by the network itself.

    python examples/monai_segmenter_gate.py

Needs the extra monai. Takes about a minute on a CPU. Tumours are made on the batch. The first
epochs take any tumour; then the gate keeps those of which the network in training finds less than
half.
"""

from __future__ import annotations

import torch
from monai.data import DataLoader, MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from monai.transforms import ScaleIntensityRanged
from monai.utils import set_determinism

import tumorsynth as ts
from tumorsynth.monai import BatchSynthesizeTumord

LIVER, TUMOR = 1, 2
SHAPE = (48, 48, 32)
WARM_UP, EPOCHS = 3, 6
set_determinism(0)


def healthy(seed: int) -> dict[str, MetaTensor]:
    """Return HU and a label map with their affine, as LoadImaged would."""
    ct = ts.make_phantom(spacing=(3.0, 3.0, 4.0), shape=SHAPE, seed=seed)
    liver = (ct.label == ts.phantom.LABELS["liver"]).long()
    return {
        "image": MetaTensor(ct.image, affine=ct.affine),
        "label": MetaTensor(liver, affine=ct.affine),
    }


network = BasicUNet(in_channels=1, out_channels=3, features=(8, 8, 16, 16, 16, 8))
scaling = ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True)
scorer = ts.SegmenterScorer(network, TUMOR, SHAPE, preprocess=ts.Scaled(-175, 250, 0, 1))
tumors = {
    "organ_labels": LIVER,
    "tumor_label": TUMOR,
    "contrast_hu": (-80, -20),
    "count": 1,
    "size_mm": (16, 24),
}
any_tumor = BatchSynthesizeTumord(
    "image", "label", gate=ts.Gate(scorer=scorer, least=0.0), **tumors
)
missed = ts.Gate(scorer=scorer, least=0.0, most=0.5, tries=2)
hard_tumor = BatchSynthesizeTumord("image", "label", gate=missed, **tumors)
for transform in (any_tumor, hard_tumor):
    transform.set_random_state(0)

loader = DataLoader([healthy(i) for i in range(4)], batch_size=2)
loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
optimizer = torch.optim.Adam(network.parameters(), 1e-2)

for epoch in range(EPOCHS):
    synthesize = any_tumor if epoch < WARM_UP else hard_tumor
    total, shares, kept = 0.0, [], 0
    for batch in loader:
        batch = scaling(synthesize(batch))
        kept += sum(record["applied"] for record in synthesize.report)
        shares += [r["scores"]["scorer"] for r in synthesize.report if "scores" in r]
        loss = loss_of(network(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    found = sum(shares) / max(len(shares), 1)
    kind = "any" if epoch < WARM_UP else "missed"
    print(f"epoch {epoch}, {kind} tumours: loss {total / len(loader):.3f}, {kept} kept,", end=" ")
    print(f"the network finds {found:.0%} of those judged")
print(
    "A network this young finds little, so that every tumour counts as missed; in a real training"
)
print("the gate turns away more and more of them.")
assert network.training, "the scorer leaves the network's mode as it was"
