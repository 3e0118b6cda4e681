"""An nnU-Net v2 trainer whose training patches get synthetic tumours.

The names load on first use, so that `tumorsynth nnunet` works without nnU-Net.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tumorsynth.nnunet.segmenter import segmenter_scorer
    from tumorsynth.nnunet.settings import read_settings
    from tumorsynth.nnunet.trainer import TumorSynthMixin, nnUNetTrainerTumorSynth

__all__ = ["TumorSynthMixin", "nnUNetTrainerTumorSynth", "read_settings", "segmenter_scorer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "segmenter_scorer":  # also for predictors that are made without nnU-Net's trainers
        from tumorsynth.nnunet.segmenter import segmenter_scorer

        return segmenter_scorer
    from tumorsynth.nnunet import trainer

    return getattr(trainer, name)
