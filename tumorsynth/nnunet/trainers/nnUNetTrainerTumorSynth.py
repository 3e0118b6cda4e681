"""What nnU-Net finds when it looks for the trainer by name; the trainer is tumorsynth.nnunet's."""

from tumorsynth.nnunet import nnUNetTrainerTumorSynth

__all__ = ["nnUNetTrainerTumorSynth"]
