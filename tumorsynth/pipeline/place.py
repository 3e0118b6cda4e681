"""Placing, the first stage of `SynthesizeTumor`: which tumours a sample gets, and their voxels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tumorsynth.appearance.contrast_priors import ContrastPrior
from tumorsynth.devices import on_cpu
from tumorsynth.geometry import Frame
from tumorsynth.pipeline.records import Settings, hull
from tumorsynth.placement import place as masks
from tumorsynth.placement.allowed import Ground
from tumorsynth.placement.exophytic import Surroundings, check_bulge
from tumorsynth.placement.place import Box, LocalMask, Skip, TumorParams

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
        box = masks.organ_box(label, self.organ_labels)
        if box is None:
            record.update(
                applied=False, reason=f"no organ: no voxel has a label of {self.organ_labels}"
            )
            return record, []
        bulge = check_bulge(self.bulge, self.size_mm)
        results = masks.place(
            self._ground(image, label, frame, box),
            self.organ_labels,
            box,
            frame.spacing,
            size_mm=self.size_mm,
            count=self.count,
            rng=rng,
            sigma_mm=self.sigma_mm,
            contrast_hu=None if isinstance(self.contrast_hu, ContrastPrior) else self.contrast_hu,
            gap_mm=self.gap_mm,
            merge=self.merge,
            outlines=self.outlines,
            bulge=bulge,
            around=None if bulge is None else self._around(image, label, frame),
        )
        if results and all(isinstance(r, Skip) for r in results):
            share = self._not_finite(image, label)
            if share > 0.5:
                results = [Skip(NOT_FINITE.format(share))] * len(results)
        results = [r if isinstance(r, Skip) else self._with_room(r) for r in results]
        record["tumors"] = [r.params.to_dict() for r in results if isinstance(r, LocalMask)]
        return record, results

    def _not_finite(self, image: Tensor, label: Tensor) -> float:
        """The share of the organ (X, Y, Z) in which the image is NaN or infinite."""
        organ = masks.is_organ(label, self.organ_labels)
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
        ground = self._ground(image, label, frame)
        bulging = any(values.get("bulge", 0) for values in replay["tumors"])
        around = self._around(image, label, frame) if bulging else None
        for values in replay["tumors"]:
            earlier = [] if self.merge else [r for r in results if isinstance(r, LocalMask)]
            results.append(
                masks.draw(
                    TumorParams.from_dict(values),
                    ground,
                    self.organ_labels,
                    frame.spacing,
                    others=earlier,
                    gap_mm=self.gap_mm,
                    around=around,
                )
            )
        return results

    def _around(self, image: Tensor, label: Tensor, frame: Frame) -> Surroundings:
        """Where the tumours of a sample (X, Y, Z) may bulge to; on the CPU, as the ground."""
        return Surroundings(
            image.cpu(), label.cpu(), self.organ_labels, frame.spacing, self.intensity
        )

    def _ground(self, image: Tensor, label: Tensor, frame: Frame, box: Box | None = None) -> Ground:
        """What tumours are placed on in a sample (X, Y, Z): the organ, and the voxels that no
        tumour may take, as they are not finite or next to a tumour that is there already.

        Always on the CPU: placing is many small decisions, each of which a GPU would be waited for.
        box: the organ's, if known.
        """
        box = box or masks.organ_box(label, self.organ_labels)
        present = None if self.merge else masks.organ_box(label, self.tumor_label)
        finite = bool(image.sum(dtype=torch.float32).isfinite())
        gap_mm = 0.0 if self.merge else self.gap_mm  # tumours take voxels beyond the organ
        parts: list[tuple[slice, ...]] = [] if box is None else [box.grown(gap_mm, frame.spacing)]
        around = None if present is None else present.grown(self.gap_mm, frame.spacing)
        parts += [] if around is None else [around]
        parts += [] if finite and not self.bulge else [tuple(slice(0, n) for n in label.shape)]
        part = hull(parts or [(slice(0, 1),) * 3], label.shape)  # of no use, but a box, around none
        forbid = None if finite else ~image[part].isfinite()
        if around is not None:
            if forbid is None:
                forbid = torch.zeros_like(label[part], dtype=torch.bool)
            near = masks.dilate(label[around] == self.tumor_label, self.gap_mm, frame.spacing)
            there = [
                slice(a.start - p.start, a.stop - p.start)
                for a, p in zip(around, part, strict=True)
            ]
            forbid[tuple(there)] |= near
        x, y, z = part
        start, shape = (x.start, y.start, z.start), (label.shape[0], label.shape[1], label.shape[2])
        ground = Ground(label[part], self.organ_labels, forbid, start, shape)
        return ground if on_cpu(label) else ground.on_cpu()
