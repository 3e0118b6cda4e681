"""A subject of TorchIO 1 or 2, whose images take their voxels in different ways."""

from __future__ import annotations

import inspect
from typing import Any

from tumorsynth.phantom import Phantom


def make_subject(scan: Phantom) -> Any:
    """Return a subject with the images "image" and "label"."""
    import torchio

    def make(kind: Any, voxels: Any) -> Any:
        if "source" in inspect.signature(kind).parameters:  # TorchIO 2
            return kind(voxels, affine=scan.affine)
        return kind(tensor=voxels, affine=scan.affine)

    return torchio.Subject(
        image=make(torchio.ScalarImage, scan.image), label=make(torchio.LabelMap, scan.label)
    )
