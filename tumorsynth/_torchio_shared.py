"""What the transforms for TorchIO 1 and 2 share. Nothing of TorchIO is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tumorsynth.adapter import Adapter
from tumorsynth.handcrafted import HandcraftedGenerator

AFFINE_TOLERANCE = 1e-3  # mm; files store float32 affines, and tools round them
# what they led to is in params
DRAWN = ("count", "size_mm", "sigma_mm", "contrast_hu", "mass_effect", "shapes")


def nameable(generator: Any, adapter: Adapter) -> Any:
    """The generator as the history may hold it: a name, or a hand-crafted one's few numbers."""
    source = adapter.synth.handle.source
    if source is None and not isinstance(generator, HandcraftedGenerator):
        raise ValueError(
            "generator must have a name or a folder, since TorchIO's history keeps it, but this "
            "one is in memory alone; save it with generator.save(folder) and pass the folder"
        )
    return generator if source is None else source


def check_names(transform: str, names: Sequence[str], there: Iterable[str]) -> None:
    """The subject has images of all these names, which differ."""
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"image, label and organ must be different names, got {list(names)}")
    there = list(there)
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(
            f"{transform} needs the image {', '.join(missing)}, but the subject has "
            f"{', '.join(there)}; pass image=..., label=... with the names it has"
        )


def spared(names: Iterable[str], include: Any, exclude: Any) -> bool:
    """Whether TorchIO's include or exclude leave one of the images out."""
    return any(
        (exclude is not None and name in exclude) or (include is not None and name not in include)
        for name in names
    )


def check_grid(names: Sequence[str], affines: Sequence[np.ndarray]) -> None:
    """The images of a subject have one affine."""
    if any(np.abs(other - affines[0]).max() > AFFINE_TOLERANCE for other in affines[1:]):
        raise ValueError(
            f"the images {', '.join(names)} must share one grid, but their affines "
            "differ; put tio.Resample or tio.ToReferenceSpace in front"
        )


def random_repr(transform: Any, p: float) -> str:
    """What a random transform was asked for."""
    names = f"image={transform.image!r}, label={transform.label!r}"
    names += "" if transform.organ is None else f", organ={transform.organ!r}"
    given = transform.adapter.described()
    return f"{type(transform).__name__}({names}, p={p:g}{', ' if given else ''}{given})"
