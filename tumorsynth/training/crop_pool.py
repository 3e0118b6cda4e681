"""The pool of tumour crops of stage 2: which ones each place of the batch uses at each step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tumorsynth.training.config import DenoiserTraining
from tumorsynth.training.crops import even_tissue, sample_crop
from tumorsynth.training.data import Case, Tumor
from tumorsynth.training.engine import random_of

CROPS, CHOICE, PICTURE = 10, 11, 12  # purposes of random streams of stage 2
Key = tuple[int, int]  # of a crop: the place in the batch that uses it, and a running number


class TumorCrops:
    """Which crop each place of the batch uses at each step, and the crops themselves.

    Every place has a window over crops of its own, numbered from 0: it fills in the first steps,
    and then the oldest leaves and a new one comes in every ``reuse`` steps. Which crops are there
    depends on the step alone, so that a resumed run and any number of processes see the same.
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
        self.places = [even_tissue(case, config) for case in cases]
        self.held = max(1, config.pool // config.batch_size)

    def window(self, step: int, place: int) -> tuple[int, int]:
        """The crops of a place from which it draws at a step: from, to (exclusive)."""
        filling = 2 * (self.held - 1)
        if step < filling:
            return 0, 1 + step // 2
        reuse = max(1, self.config.reuse)
        made = self.held + (step - filling + place % reuse) // reuse
        return made - self.held, made

    def key(self, step: int, place: int) -> Key:
        rng = random_of(self.config.seed, CHOICE, step, place)
        return place, int(rng.integers(*self.window(step, place)))

    def draw(self, keys: list[Key]) -> dict[Key, tuple[Tensor, Tensor]]:
        return {key: self.crop(random_of(self.config.seed, CROPS, *key)) for key in keys}

    def crop(self, rng: Any) -> tuple[Tensor, Tensor]:
        tumor = self.tumors[int(rng.integers(len(self.tumors)))]
        return sample_crop(
            self.cases, tumor, self.tumor_label, rng, self.places, self.config, self.window_hu
        )
