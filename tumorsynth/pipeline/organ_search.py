"""Look for what placement needs to know of a sample first: its organ, its tumours, its NaNs."""

from __future__ import annotations

from functools import cached_property

import torch

from tumorsynth.devices import on_cpu
from tumorsynth.fetching import Task
from tumorsynth.geometry import Box
from tumorsynth.pipeline.records import Sample
from tumorsynth.pipeline.settings import Settings
from tumorsynth.placement.organ import boxes_of_lines, lines_with, organ_box


class OrganSearch:
    """Finds the organ, earlier tumours, and whether the image is finite.

    On a CPU each is searched for when it is asked for. On a GPU all are found at once, by
    `OrganSearch.of`.

    Args:
        settings: of the transform.
        sample: the scan or patch.
    """

    def __init__(self, settings: Settings, sample: Sample) -> None:
        self._settings, self._sample = settings, sample

    @classmethod
    def of(cls, settings: Settings, sample: Sample) -> Task[OrganSearch]:
        """Return the search of a sample."""
        search = cls(settings, sample)
        if not on_cpu(sample.label):
            yield from search._search_at_once()
        return search

    @cached_property
    def organ_box(self) -> Box | None:
        """Tight box around the organ; None if it has no voxel."""
        return organ_box(self._sample.label, self._settings.organ_labels)

    @cached_property
    def tumor_box(self) -> Box | None:
        """Tight box around earlier tumours; None if there are none, or if they do not matter."""
        if self._settings.placement.merge:
            return None
        return organ_box(self._sample.label, self._settings.tumor_label)

    @cached_property
    def is_finite(self) -> bool:
        """Whether the image has neither NaN nor infinities."""
        return bool(self._finite())

    def _finite(self) -> torch.Tensor:
        return self._sample.image.sum(dtype=torch.float32).isfinite()

    def _search_at_once(self) -> Task[None]:
        values = [self._settings.organ_labels]
        if not self._settings.placement.merge:
            values.append((self._settings.tumor_label,))
        label = self._sample.label
        finite, *lines = yield [self._finite(), *lines_with(label, values)]
        self.is_finite = bool(finite)
        self.organ_box, self.tumor_box = (*boxes_of_lines(label, lines), None)[:2]
