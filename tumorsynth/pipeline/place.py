"""Placing, the first stage of `SynthesizeTumor`: which tumours a sample gets, and their voxels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tumorsynth.appearance.contrast_priors import ContrastPrior
from tumorsynth.geometry import Box, Frame
from tumorsynth.pipeline.records import Settings
from tumorsynth.placement.allowed import dilate
from tumorsynth.placement.exophytic import ExophyticRegion, check_bulge
from tumorsynth.placement.organ import OrganRegion, is_organ, organ_box
from tumorsynth.placement.place import place, place_from_params
from tumorsynth.placement.settings import PlacementSettings
from tumorsynth.placement.types import LocalMask, Skip, SkipCode, TumorParams

NOT_FINITE = "{:.0%} of the organ's voxels in the image are NaN or infinite; export the scan again"


class Placing(Settings):
    """From a sample's seed, or its params, to the voxels of its tumours."""

    def _masks(
        self,
        image: Tensor,
        label: Tensor,
        frame: Frame,
        seed: int,
        replay: dict[str, Any] | None,
        device: torch.device,
    ) -> tuple[dict[str, Any], list[LocalMask | Skip]]:
        """Which tumours one sample (X, Y, Z) gets: drawn from the seed, or again from params."""
        image, label = image.to(device), label.to(device)
        if replay is not None:
            return dict(replay), self._redraw(image, label, frame, replay)
        rng = torch.Generator().manual_seed(seed)
        record: dict[str, Any] = {"seed": seed, "applied": True, "tumors": []}
        if float(torch.rand((), generator=rng, dtype=torch.float64)) >= self.p:
            record.update(applied=False, reason=f"left alone (p = {self.p:g})")
            return record, []
        box = organ_box(label, self.organ_labels)
        if box is None:
            record.update(
                applied=False, reason=f"no organ: no voxel has a label of {self.organ_labels}"
            )
            return record, []
        settings = PlacementSettings(
            size_mm=self.size_mm,
            count=self.count,
            sigma_mm=self.sigma_mm,
            contrast_hu=None if isinstance(self.contrast_hu, ContrastPrior) else self.contrast_hu,
            gap_mm=self.gap_mm,
            merge=self.merge,
            outlines=self.outlines,
            bulge=check_bulge(self.bulge, self.size_mm),
        )
        region = self._region(image, label, frame, box)
        growth = None if settings.bulge is None else self._growth(image, label, frame)
        results = place(region, frame.spacing, settings, rng, growth)
        if results and all(isinstance(r, Skip) for r in results):
            share = self._not_finite(image, label)
            if share > 0.5:
                results = [Skip(SkipCode.NOT_FINITE, NOT_FINITE.format(share))] * len(results)
        results = [r if isinstance(r, Skip) else self._with_room(r) for r in results]
        record["tumors"] = [r.params.to_dict() for r in results if isinstance(r, LocalMask)]
        return record, results

    def _not_finite(self, image: Tensor, label: Tensor) -> float:
        """The share of the organ (X, Y, Z) in which the image is NaN or infinite."""
        organ = is_organ(label, self.organ_labels)
        return float((organ & ~image.isfinite()).sum()) / max(1, int(organ.sum()))

    def _with_room(self, tumor: LocalMask) -> LocalMask:
        """The tumour, with how much tissue it pushes aside in its params."""
        share = self.mass_effect.share_at(tumor.params.diameter_mm)
        if share == 0:
            return tumor
        fixed = self.mass_effect.capsule == "fixed"
        return replace(tumor, params=replace(tumor.params, displaced=share, fixed_capsule=fixed))

    def _redraw(
        self, image: Tensor, label: Tensor, frame: Frame, replay: dict[str, Any]
    ) -> list[LocalMask | Skip]:
        results: list[LocalMask | Skip] = []
        if not replay["tumors"]:
            return results
        region = self._region(image, label, frame)
        bulging = any(values.get("bulge", 0) for values in replay["tumors"])
        growth = self._growth(image, label, frame) if bulging else None
        for values in replay["tumors"]:
            earlier = [] if self.merge else [r for r in results if isinstance(r, LocalMask)]
            results.append(
                place_from_params(
                    TumorParams.from_dict(values),
                    region,
                    frame.spacing,
                    earlier=earlier,
                    gap_mm=self.gap_mm,
                    growth=growth,
                )
            )
        return results

    def _growth(self, image: Tensor, label: Tensor, frame: Frame) -> ExophyticRegion:
        """Return where tumours of a sample (X, Y, Z) may grow beyond the organ, on the CPU."""
        return ExophyticRegion(
            image.cpu(), label.cpu(), self.organ_labels, frame.spacing, self.intensity
        )

    def _region(
        self, image: Tensor, label: Tensor, frame: Frame, box: Box | None = None
    ) -> OrganRegion:
        """Return the organ of a sample (X, Y, Z), on the CPU.

        Forbids voxels that are not finite, and the tumours that are there already with their gap.
        Placement makes many small decisions; on a GPU each would need a synchronisation.

        Args:
            box: the organ's, if known.
        """
        box = box or organ_box(label, self.organ_labels)
        whole = Box.whole(label.shape)
        present = None if self.merge else organ_box(label, self.tumor_label)
        finite = bool(image.sum(dtype=torch.float32).isfinite())
        parts = []
        if box is not None:  # tumours take voxels beyond the organ
            parts.append(box.grown_mm(0.0 if self.merge else self.gap_mm, frame.spacing))
        if present is not None:
            present = present.grown_mm(self.gap_mm, frame.spacing).within(whole)
            parts.append(present)
        if not finite or self.bulge:
            parts.append(whole)
        # without an organ any part will do, as long as it has a voxel
        part = Box.hull(parts or [Box((0, 0, 0), (1, 1, 1))]).within(whole)
        forbidden = None if finite else ~image[part.slices].isfinite()
        if present is not None:
            if forbidden is None:
                forbidden = torch.zeros_like(label[part.slices], dtype=torch.bool)
            tumors = label[present.slices] == self.tumor_label
            near = dilate(tumors, self.gap_mm, frame.spacing)
            forbidden[present.relative_to(part).slices] |= near
        region = OrganRegion(
            label[part.slices], self.organ_labels, box, forbidden, part, whole.shape
        )
        return region.to_cpu()
