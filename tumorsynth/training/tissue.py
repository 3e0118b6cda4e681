"""The tissue that a denoiser learned: the ``tissue_range`` of its card."""

from __future__ import annotations

import numpy as np

from tumorsynth.appearance.surroundings import level_around
from tumorsynth.appearance.tissue import TissueRange
from tumorsynth.training.config import DenoiserTraining
from tumorsynth.training.crops import crop_around, even_tissue_levels
from tumorsynth.training.data import Case, Tumor

LEVEL_MARGIN_HU = 60.0  # beyond the levels seen: other phases and scanners
UNEVEN_HU = 80.0  # beyond --evenness: vessels and the organ's surface
NO_TISSUE_HU = 250.0  # beyond uneven tissue: padding, gas, metal


def learned_tissue(
    cases: list[Case], tumors: list[Tumor], tumor_label: int, config: DenoiserTraining
) -> TissueRange:
    """Measure the tissue around the tumours that a denoiser learns from, with margins.

    With ``transplant`` this includes the even tissue that tumours are put into.
    """
    tissue = (config.tissue_low, config.tissue_high)
    levels = [
        float(level_around(*crop_around(cases, tumor, tumor_label), tissue)) for tumor in tumors
    ]
    if config.transplant > 0:
        for case in cases:
            even = even_tissue_levels(case, config)
            if len(even):
                levels += np.percentile(even, [5, 95]).tolist()
    level = round(min(levels) - LEVEL_MARGIN_HU), round(max(levels) + LEVEL_MARGIN_HU)
    uneven = config.evenness + UNEVEN_HU
    local = level[0] - uneven, level[1] + uneven
    return TissueRange(level, local, (local[0] - NO_TISSUE_HU, local[1] + NO_TISSUE_HU))
