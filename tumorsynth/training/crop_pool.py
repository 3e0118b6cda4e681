"""The pool of tumour crops of stage 2: which crop each slot of the batch uses at each step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tumorsynth.training.config import DenoiserTraining
from tumorsynth.training.crops import even_tissue_centres, sample_crop
from tumorsynth.training.data import Case, Tumor
from tumorsynth.training.engine import random_stream

CROP_STREAM, CHOICE_STREAM, PICTURE_STREAM = 10, 11, 12  # purposes of random streams of stage 2
CropKey = tuple[int, int]  # the slot of the batch that uses a crop, and a running number


class TumorCrops:
    """Which crop each slot of the batch uses at each step, and the crops themselves.

    Every slot has a window over crops of its own, numbered from 0. The window fills in the first
    steps; after that a new crop replaces the oldest every ``reuse`` steps. The step alone decides
    which crops are there, so that a resumed run and any number of processes see the same.
    """

    def __init__(
        self,
        cases: list[Case],
        tumors: list[Tumor],
        tumor_label: int,
        config: DenoiserTraining,
        window: tuple[float, float],
    ):
        self.cases, self.tumors, self.tumor_label = cases, tumors, tumor_label
        self.config, self.window_hu = config, window
        self.tissue_centres = [even_tissue_centres(case, config) for case in cases]
        self.per_slot = max(1, config.pool // config.batch_size)

    def window(self, step: int, slot: int) -> tuple[int, int]:
        """Return the crops that a slot chooses from at a step: first, last + 1."""
        filling_steps = 2 * (self.per_slot - 1)
        if step < filling_steps:
            return 0, 1 + step // 2
        reuse = max(1, self.config.reuse)
        stop = self.per_slot + (step - filling_steps + slot % reuse) // reuse
        return stop - self.per_slot, stop

    def key(self, step: int, slot: int) -> CropKey:
        """Return the crop that a slot uses at a step."""
        rng = random_stream(self.config.seed, CHOICE_STREAM, step, slot)
        return slot, int(rng.integers(*self.window(step, slot)))

    def sample(self, keys: list[CropKey]) -> dict[CropKey, tuple[Tensor, Tensor]]:
        """Return HU and tumour mask of each of these crops."""
        return {key: self.crop(random_stream(self.config.seed, CROP_STREAM, *key)) for key in keys}

    def crop(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Sample a crop around a random tumour: HU and mask, (1, side, side, side) each."""
        tumor = self.tumors[int(rng.integers(len(self.tumors)))]
        return sample_crop(
            self.cases,
            tumor,
            self.tumor_label,
            rng,
            self.tissue_centres,
            self.config,
            self.window_hu,
        )
