"""The shim: nnU-Net finds the trainer of tumorsynth.nnunet by the name of this file."""

from tumorsynth.nnunet import nnUNetTrainerTumorSynth

__all__ = ["nnUNetTrainerTumorSynth"]
