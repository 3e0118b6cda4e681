"""`TissueCheck`: where in a sample's organ a generator may paint, by the range on its card."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tumorsynth.appearance.background import measure_tissue
from tumorsynth.appearance.tissue import (
    AIR_HU,
    SAMPLE_MM,
    SHELL_MM,
    TissueRange,
    holds_air,
    measure_averages,
)
from tumorsynth.fetching import Task
from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.geometry import Box
from tumorsynth.pipeline.records import Sample
from tumorsynth.pipeline.settings import Settings
from tumorsynth.placement import skip_reasons
from tumorsynth.placement.organ import is_organ, is_outside
from tumorsynth.placement.types import LocalMask, Skip, SkipCode

MAX_UNSUITED_SHARE = 0.5  # of the organ's voxels; beyond it, the reason for no room
ORGAN_SAMPLES = 32  # along each axis, of an organ whose voxels are counted


@dataclass(frozen=True)
class TissueCheck:
    """Where a generator may paint.

    Args:
        settings: of the transform.
        range: of the generator's card.
        name: of the generator.
        window: HU that the generator sees.
        image_range: the voxels that may hold a tumour, in the image's scale.
        any_place: whether tumours may lie in any tissue, as the caller gives their contrast or
            says so.
    """

    settings: Settings
    range: TissueRange
    name: str
    window: tuple[float, float]
    image_range: tuple[float, float]
    any_place: bool

    @classmethod
    def of(cls, settings: Settings, generator: TumorGenerator) -> TissueCheck | None:
        """Return the check of a generator; None if its card names no tissue.

        Raises:
            ValueError: if the card's range is none.
        """
        found = TissueRange.of_card(generator.card)
        if found is None:
            return None
        any_place = settings.any_tissue or settings.contrast_hu is not None
        limits = found.voxel_range(settings.intensity)
        return cls(settings, found, generator.name, generator.window, limits, any_place)

    def objection(self, sample: Sample, tumor: LocalMask) -> Task[Skip | None]:
        """Return why a placed tumour must not lie where it is; None if it may."""
        if self.any_place:
            return None
        spacing = sample.frame.spacing
        box = tumor.box.grown([math.ceil(SHELL_MM / s) for s in spacing])
        box = box.within(Box.whole(sample.image.shape))
        steps = [max(1, int(SAMPLE_MM / s)) for s in spacing]
        sampled = tuple(
            slice(a, b, step) for a, b, step in zip(box.start, box.stop, steps, strict=True)
        )
        organ = is_organ(sample.label[sampled], self.settings.organ_labels)
        (hu,) = yield [torch.where(organ, self._hu(sample.image[sampled]), torch.nan)]
        reason = None
        if not self.range.holds_all(hu):  # most organs need no averages
            tissue = measure_averages(hu, [s * n for s, n in zip(spacing, steps, strict=True)])
            reason = None if tissue is None else self.range.objection(tissue, self.name)
        if reason is None and self.range.voxel_hu[0] < AIR_HU:
            inside = torch.zeros(box.shape, dtype=torch.bool)
            inside[tumor.box.relative_to(box).slices] = tumor.mask.cpu()
            (hu,) = yield [self._hu(sample.image[box.slices])]
            reason = skip_reasons.AIR if holds_air(hu, inside) else None
        if reason is None:
            return None
        return Skip(SkipCode.TISSUE, reason, tumor.params.drawn_mm)

    def _hu(self, image: Tensor) -> Tensor:
        return self.settings.intensity.to_hu(image.float())

    def organ_objection(self, sample: Sample, box: Box) -> Task[Skip | None]:
        """Return why no place in a sample's organ suits the generator; None if some may.

        Args:
            sample: the scan or patch.
            box: around its organ.
        """
        every = tuple(
            slice(a, b, max(1, (b - a) // ORGAN_SAMPLES))
            for a, b in zip(box.start, box.stop, strict=True)
        )
        image, label = sample.image[every], sample.label[every]
        organ = is_organ(label, self.settings.organ_labels)
        unsuited = organ & is_outside(image, self.image_range)
        voxels, organ_voxels = yield [unsuited.sum(), organ.sum()]
        share = float(voxels) / max(1, int(organ_voxels))
        if share <= MAX_UNSUITED_SHARE:
            return None
        hu = self._hu(image)
        whole = yield from measure_tissue(hu, label, self.settings.organ_labels, organ, self.window)
        reason = whole.outside_window(self.window)
        if reason is not None:
            return Skip(SkipCode.OUTSIDE_WINDOW, reason)
        reason = skip_reasons.unsuited_voxels(share, self.name, self.range.voxel_hu)
        return Skip(SkipCode.TISSUE, reason)
