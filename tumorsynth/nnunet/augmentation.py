"""nnU-Net's augmentation in two parts: what only moves voxels, and what follows the synthesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# transforms that may run before the synthesis, in the workers
_SPATIAL = {
    "Convert3DTo2DTransform",
    "Convert2DTo3DTransform",
    "SpatialTransform",
    "MirrorTransform",
    "Rot90Transform",
    "TransposeAxesTransform",
}


class DeferredTransforms:
    """The transforms that follow the synthesis, on the training device where they run on it.

    Args:
        transforms: of batchgeneratorsv2, in order.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = transforms
        self._devices: list[torch.device] | None = None  # where each of them runs

    def __call__(
        self, image: Tensor, label: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Any]:
        """Return the augmented batch, transformed sample by sample as in nnU-Net's workers.

        Args:
            image: (B, 1, X, Y, Z).
            label: the same shape.
            rng: gives the seed of the transforms' draws.

        Returns:
            The image, and the label or a list of labels, one per level of deep supervision.
        """
        device = image.device
        on_gpu = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(on_gpu):
            if self._devices is None:
                fit = [runs_on(transform, device) for transform in self.transforms]
                self._devices = [device if fits else torch.device("cpu") for fits in fit]
            torch.manual_seed(int(rng.integers(2**63 - 1)))
            samples = []
            for one_image, one_label in zip(image, label, strict=True):
                sample = {"image": one_image, "segmentation": one_label}
                for transform, where in zip(self.transforms, self._devices, strict=True):
                    sample = transform(**_to(sample, where))
                samples.append(_to(sample, device))
        image = torch.stack([sample["image"] for sample in samples])
        labels: list[Any] = [sample["segmentation"] for sample in samples]
        if isinstance(labels[0], list):
            return image, [torch.stack(level) for level in zip(*labels, strict=True)]
        return image, torch.stack(labels)


def split_transforms(transforms: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the leading transforms that only move voxels, and the rest."""
    names = [type(getattr(t, "transform", t)).__name__ for t in transforms]
    cut = next((i for i, name in enumerate(names) if name not in _SPATIAL), len(names))
    if names[:cut].count("Convert3DTo2DTransform") > names[:cut].count("Convert2DTo3DTransform"):
        cut = names.index("Convert3DTo2DTransform")  # no 3-D patch in between
    return transforms[:cut], transforms[cut:]


def runs_on(transform: Any, device: torch.device) -> bool:
    """Return whether a transform of batchgeneratorsv2 takes samples on a device.

    Some build a kernel on the CPU or hand a tensor to numpy, and which ones changes with the
    release. So this tries it on a small sample, several times since most act at random.
    """
    if device.type == "cpu":
        return True
    state = np.random.get_state()
    try:
        for leaf in _leaves(transform):
            for _ in range(8):
                image = torch.ones((1, 16, 16, 16), device=device)
                leaf(image=image, segmentation=torch.zeros_like(image, dtype=torch.int16))
    except Exception:  # of any kind: on the CPU it will not occur
        return False
    finally:
        np.random.set_state(state)
    return True


def _leaves(transform: Any) -> list[Any]:
    """Return the transforms inside wrappers that apply them at random."""
    inner = getattr(transform, "transforms", None) or getattr(transform, "list_of_transforms", None)
    if inner is None and hasattr(transform, "transform"):
        inner = [transform.transform]
    return [leaf for one in inner for leaf in _leaves(one)] if inner else [transform]


def _to(value: Any, device: torch.device) -> Any:
    """Return a tensor, or nested dicts and lists of tensors, on a device."""
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    if isinstance(value, list):
        return [_to(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value
