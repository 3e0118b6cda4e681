"""Synthesise tumours in a TorchIO pipeline, and replay them from the subject's history.

    python examples/torchio_pipeline.py

Needs the extra torchio. Takes a few seconds on a CPU.
"""

from __future__ import annotations

import torch
import torchio as tio

import tumorsynth as ts
from tumorsynth.torchio import RandomSynthesizeTumor

ct = ts.make_phantom(spacing=(2.0, 2.0, 2.0), seed=0)
subject = tio.Subject(
    image=tio.ScalarImage(tensor=ct.image, affine=ct.affine),
    label=tio.LabelMap(tensor=ct.label, affine=ct.affine),
)
transform = tio.Compose(
    [
        RandomSynthesizeTumor(organ_labels=1, tumor_label=20, count=2, size_mm=(10, 20)),
        tio.RandomFlip(axes=("LR",)),
    ]
)

torch.manual_seed(0)
transformed = transform(subject)
print("tumour voxels:", int((transformed.label.data == 20).sum()))

again = transformed.get_composed_history()(subject)
assert torch.equal(again.image.data, transformed.image.data)
print("the history repeats it exactly")
