"""Realistic synthetic tumours, image and label, for 3-D CT.

Public names load on first use (PEP 562): `import tumorsynth` reads no weights, does not access the
network and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tumorsynth.appearance.contrast_priors import ContrastPrior
    from tumorsynth.appearance.gate import Gate
    from tumorsynth.appearance.mass_effect import MassEffect
    from tumorsynth.appearance.segmenter import SegmenterScorer
    from tumorsynth.generators.copy_paste import CopyPaste
    from tumorsynth.generators.diffusion import Generator
    from tumorsynth.generators.handcrafted import HandcraftedGenerator
    from tumorsynth.generators.protocol import TumorGenerator
    from tumorsynth.generators.store import load_generator
    from tumorsynth.intensity import HU, Scaled, ZScore
    from tumorsynth.phantom import Phantom, make_phantom
    from tumorsynth.synthesizer import SynthesizeTumor

    __version__: str

__all__ = [
    "HU",
    "ContrastPrior",
    "CopyPaste",
    "Gate",
    "Generator",
    "HandcraftedGenerator",
    "MassEffect",
    "Phantom",
    "Scaled",
    "SegmenterScorer",
    "SynthesizeTumor",
    "TumorGenerator",
    "ZScore",
    "__version__",
    "load_generator",
    "make_phantom",
]

_MODULE_OF = {
    "HU": "intensity",
    "ContrastPrior": "appearance.contrast_priors",
    "CopyPaste": "generators.copy_paste",
    "Gate": "appearance.gate",
    "Generator": "generators.diffusion",
    "HandcraftedGenerator": "generators.handcrafted",
    "MassEffect": "appearance.mass_effect",
    "Phantom": "phantom",
    "Scaled": "intensity",
    "SegmenterScorer": "appearance.segmenter",
    "SynthesizeTumor": "synthesizer",
    "TumorGenerator": "generators.protocol",
    "ZScore": "intensity",
    "load_generator": "generators.store",
    "make_phantom": "phantom",
}


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        value = _version()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # later look-ups skip this function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tumorsynth")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"
