"""Train a small segmentation network with Lightning; one callback adds the tumours.

    python examples/lightning_module.py

Needs Lightning. Takes about half a minute on a CPU.
"""

from __future__ import annotations

import logging

import lightning as L
import torch
from torch.nn import functional as F

import tumorsynth as ts
from tumorsynth.lightning import TumorSynthCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
L.seed_everything(0)


def healthy_scans(seeds: range) -> list[dict[str, torch.Tensor]]:
    """Return healthy livers (label 1) without any tumour."""
    scans = []
    for seed in seeds:
        ct = ts.make_phantom(spacing=(3.0, 3.0, 3.0), shape=(48, 48, 32), seed=seed)
        liver = (ct.label == ts.phantom.LABELS["liver"]).long()
        scans.append({"image": ct.image, "label": liver})
    return scans


class Segmenter(L.LightningModule):
    """Predict background, liver or tumour for every voxel, unaware of the synthesis."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv3d(1, 12, 5, padding=2),
            torch.nn.InstanceNorm3d(12, affine=True),
            torch.nn.ReLU(),
            torch.nn.Conv3d(12, 12, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv3d(12, 3, 1),
        )
        self.tumor_voxels = 0

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.tumor_voxels += int((batch["label"] == 2).sum())
        image = (batch["image"].clamp(-175, 250) + 175) / 425  # scaled here, after the synthesis
        return F.cross_entropy(self.net(image), batch["label"][:, 0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


tumors = TumorSynthCallback(
    organ_labels=1, tumor_label=2, p=0.9, count=1, size_mm=(15, 25), spacing=(3.0, 3.0, 3.0)
)
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=2,
    callbacks=[tumors],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = Segmenter()
loader = torch.utils.data.DataLoader(healthy_scans(range(4)), batch_size=2, shuffle=True)
trainer.fit(model, loader)

print(f"trained on {model.tumor_voxels} tumour voxels; the scans had none")
for record in tumors.report:
    print({key: record[key] for key in ("sample", "diameter_mm", "hu_change") if key in record})
print("in the checkpoint:", sorted({name.split(".")[0] for name in model.state_dict()}))
