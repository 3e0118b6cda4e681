"""Check whether an image can be in Hounsfield units, or in the scale that the user names."""

from tumorsynth.intensity_check.check import check_intensity, checking_intensity
from tumorsynth.intensity_check.rules import MIN_VALUES, find_fault
from tumorsynth.intensity_check.shares import (
    MAX_SAMPLED,
    describe,
    sample_organ,
    sample_voxels,
)

__all__ = [
    "MAX_SAMPLED",
    "MIN_VALUES",
    "check_intensity",
    "checking_intensity",
    "describe",
    "find_fault",
    "sample_voxels",
    "sample_organ",
]
