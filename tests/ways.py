"""The ways to the synthesis for tests of voxel sizes: the core and every framework's transform."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import tumorsynth as ts

SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": (12, 12.1)}
TWO_MM = np.diag([-2.0, -2.0, 2.0, 1.0])  # LPS
SHAPE = (1, 40, 40, 40)


def scan(kind="plain", image_affine=None, label_affine=None):
    """Image and label (1, X, Y, Z), plain tensors or MetaTensors."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE[1:]), indexing="ij")
    label = (sum(a**2 for a in axes) < 0.8)[None].to(torch.int16)
    image = 100 + 10 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    if kind == "plain":
        return image, label
    data = pytest.importorskip("monai.data", reason="needs MONAI's MetaTensor")
    image_affine = np.eye(4) if image_affine is None else image_affine
    label_affine = image_affine if label_affine is None else label_affine
    meta = data.MetaTensor(image, affine=image_affine), data.MetaTensor(label, affine=label_affine)
    return meta


class Core:
    def __init__(self, spacing=None, override_affine=False):
        self.synth = ts.SynthesizeTumor(**SETTINGS)
        self.call = {"spacing": spacing, "override_affine": override_affine}

    def __call__(self, image, label):
        return self.synth(image, label, seed=0, **self.call)[1]


class MonaiArray:
    def __init__(self, **given):
        monai = pytest.importorskip("tumorsynth.monai", reason="needs MONAI")
        self.transform = monai.RandSynthesizeTumor(**SETTINGS, **given)

    def __call__(self, image, label):
        return self.transform.set_random_state(0)(image, label)[1]


class MonaiDict(MonaiArray):
    kind = "RandSynthesizeTumord"

    def __init__(self, **given):
        monai = pytest.importorskip("tumorsynth.monai", reason="needs MONAI")
        self.transform = getattr(monai, self.kind)("image", "label", **SETTINGS, **given)

    def __call__(self, image, label):
        data = {"image": image, "label": label}
        return self.transform.set_random_state(0)(data)["label"]


class MonaiBatch(MonaiDict):
    kind = "BatchSynthesizeTumord"

    def __call__(self, image, label):
        data = pytest.importorskip("monai.data")
        batch = data.list_data_collate([{"image": image, "label": label}] * 2)
        return self.transform.set_random_state(0)(batch)["label"]


class Lightning:
    class Trainer:
        current_epoch = global_rank = 0

    def __init__(self, **given):
        module = pytest.importorskip("tumorsynth.lightning", reason="needs Lightning")
        self.callback = module.TumorSynthCallback(seed=0, **SETTINGS, **given)

    def __call__(self, image, label):
        batch = {"image": image[None], "label": label[None]}
        self.callback.on_train_batch_start(self.Trainer(), None, batch, 0)
        return batch["label"]


class TorchIO:
    def __init__(self, **given):
        module = pytest.importorskip("tumorsynth.torchio", reason="needs TorchIO")
        self.transform = module.RandomSynthesizeTumor(**SETTINGS, **given)

    def __call__(self, image, label):
        tio = pytest.importorskip("torchio")

        def part(kind, x):
            affine = getattr(x, "affine", None)
            tensor = x.as_subclass(torch.Tensor)
            return kind(tensor=tensor, affine=affine)

        subject = tio.Subject(image=part(tio.ScalarImage, image), label=part(tio.LabelMap, label))
        torch.manual_seed(0)
        return self.transform(subject)["label"].data


WAYS = [Core, MonaiArray, MonaiDict, MonaiBatch, Lightning, TorchIO]


def warnings_of(work):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        work()
    return [str(one.message) for one in said if "so that voxels are taken as" in str(one.message)]


def diameter(label, voxel_mm3):
    first = torch.as_tensor(np.asarray(label)).reshape(-1, *SHAPE)[0]
    return (6 / np.pi * float((first == 2).sum()) * voxel_mm3) ** (1 / 3)
