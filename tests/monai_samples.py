"""Samples for the tests of the MONAI transforms: an ellipsoid of organ 1 in tissue."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor

from tumorsynth.monai import RandSynthesizeTumord

SETTINGS = {"generator": "hu2023", "count": 1, "size_mm": (8, 10)}


LPS = np.diag([-0.8, -0.8, 2.5, 1.0])  # the array's x and y run to the left and to the back


def volume(shape=(48, 48, 48), seed=0):
    """(image float32 HU, label int16), numpy (1, X, Y, Z): an ellipsoid of organ 1 in tissue."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    label = (sum(g**2 for g in grid) < 0.7).astype(np.int16)[None]
    image = (60 + 40 * label + rng.normal(0, 10, label.shape)).astype(np.float32)
    return image, label


def sample(kind="numpy", affine=None, **kwargs):
    image, label = volume(**kwargs)
    if kind == "numpy":
        return {"image": image, "label": label, "name": "a"}
    image, label = torch.from_numpy(image), torch.from_numpy(label)
    if kind == "meta":
        affine = np.eye(4) if affine is None else affine
        meta = {"filename_or_obj": "ct.nii.gz"}
        image, label = (MetaTensor(x, affine=affine, meta=dict(meta)) for x in (image, label))
    return {"image": image, "label": label, "name": "a"}


def transform(**kwargs):
    return RandSynthesizeTumord("image", label_key="label", **{**SETTINGS, **kwargs})


def tumor(data, value=2):
    return np.asarray(data["label"]) == value


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def equal(a, b):
    return all(same(a[key], b[key]) for key in ("image", "label"))
