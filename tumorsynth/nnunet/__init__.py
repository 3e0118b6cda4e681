"""An nnU-Net v2 trainer whose training patches get synthetic tumours.

The names load on first use, so that `tumorsynth nnunet` works without nnU-Net.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tumorsynth.nnunet.settings import read_settings
    from tumorsynth.nnunet.trainer import TumorSynthMixin, nnUNetTrainerTumorSynth

__all__ = ["TumorSynthMixin", "nnUNetTrainerTumorSynth", "read_settings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tumorsynth.nnunet import trainer

    return getattr(trainer, name)
