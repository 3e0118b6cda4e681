"""What the stages of `SynthesizeTumor` pass to each other, and what a call reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tumorsynth.appearance.background import EXTENSION_MM, BackgroundFill
from tumorsynth.appearance.noise import (
    MATCH_MARGIN_VOXELS,
    ScanNoise,
    feather_mm,
    grain_of_subvoxels,
)
from tumorsynth.crop_grid import CropGrid
from tumorsynth.geometry import Box, Floats3, Frame
from tumorsynth.pipeline.params_grid import ParamsGrid
from tumorsynth.pipeline.validation import plain
from tumorsynth.placement.types import LocalMask, SkipCode, TumorParams
from tumorsynth.subvoxels import refine_box


class Sample(NamedTuple):
    """One scan or patch of a batch.

    Args:
        number: its place in the batch.
        image: (X, Y, Z), in the user's intensity scale.
        label: (X, Y, Z), whole numbers.
        frame: how its axes lie in the patient.
        first_phase: image of the phase that the tumours were placed in, where it is another one.
    """

    number: int
    image: Tensor
    label: Tensor
    frame: Frame
    first_phase: Tensor | None = None

    def to(self, device: torch.device) -> Sample:
        """Return the sample with image and label on a device."""
        return self._replace(image=self.image.to(device), label=self.label.to(device))

    @property
    def for_placing(self) -> Sample:
        """The sample in which the tumours are placed: with the image of the first phase."""
        if self.first_phase is None:
            return self
        return self._replace(image=self.first_phase, first_phase=None)


def split_batch(
    image: Tensor, label: Tensor, frames: Sequence[Frame], first_phase: Tensor | None = None
) -> list[Sample]:
    """Return the samples of a batch as views of its memory, without a subclass's bookkeeping."""
    batches = [None if x is None else plain(x) for x in (image, label, first_phase)]
    if image.ndim == 4:
        batches = [None if x is None else x[None] for x in batches]
    images, labels, firsts = batches
    assert images is not None and labels is not None
    return [
        Sample(b, images[b, 0], labels[b, 0], frame, None if firsts is None else firsts[b, 0])
        for b, frame in enumerate(frames)
    ]


@dataclass(frozen=True)
class TumorId:
    """Which tumour of a call this is.

    Args:
        sample: number of its sample in the batch.
        report_index: its place among the sample's tumours and skips, the order of the report.
        params_index: its place among the tumours in the sample's params.
    """

    sample: int
    report_index: int
    params_index: int


@dataclass(frozen=True)
class PaintRequest:
    """One placed tumour, ready for a generator.

    Args:
        id: which tumour of the call this is.
        tumor: its voxels and params.
        grid: where the crop lies in the sample.
        crop: (side, side, side) in [0, 1], the generator's view of the healthy tissue.
        crop_mask: bool, same shape: the tumour as the generator sees it.
        crop_outline: bool, same shape: the tumour as it will be labelled.
        noise: of the healthy scan around the tumour's place.
        grain_mm: width of the noise's grain along the tensor's axes to which the tumour is matched;
            0 with blend="difftumor", which matches nothing.
        edge_mm: by which the tumour's edge is softer than the generator paints it.
        region: the part of the sample that the feather reaches.
        inside: bool, the labelled voxels in that region.
        fine_inside: bool, the tumour on the region's subvoxels; ``inside`` where voxels are fine.
        outside_share: share of the tumour beyond the organ.
        fill: even tissue painted under the tumour first; None where nothing needs covering.
        vessels_hu: what covers the vessels in that region; None where ``fill`` does, or for a
            generator that leaves them.
        unsuited: bool, voxels of the organ in that region that hold no tissue; None if the
            generator's card does not say what tissue is.
        rejected: whether the params of a replay skip the tumour: its crop is only there to form the
            batch that the call painted.
        mask_on_cpu: ``crop_mask`` in the CPU's memory, where it has been copied there.
    """

    id: TumorId
    tumor: LocalMask
    grid: CropGrid
    crop: Tensor
    crop_mask: Tensor
    crop_outline: Tensor
    noise: ScanNoise
    grain_mm: Floats3
    edge_mm: float
    region: Box
    inside: Tensor
    fine_inside: Tensor
    outside_share: float
    fill: BackgroundFill | None = None
    vessels_hu: Tensor | None = None
    unsuited: Tensor | None = None
    rejected: bool = False
    mask_on_cpu: Tensor | None = None

    @property
    def fine_grid(self) -> CropGrid:
        """Where the crop lies on the sample's subvoxels."""
        return self.grid.refined(self.tumor.factors)

    @property
    def fine_region(self) -> Box:
        """The subvoxels of ``region``."""
        return refine_box(self.region, self.tumor.factors)

    @property
    def fine_grain_mm(self) -> Floats3:
        """The grain that is left to apply on subvoxels, before they are averaged."""
        return grain_of_subvoxels(self.grain_mm, self.grid.frame.spacing, self.tumor.factors)

    @property
    def feather_mm(self) -> Floats3:
        """Width of the feather along the tensor's axes: with the averaging over subvoxels that
        follows, never sharper than the scan."""
        return feather_mm(self.tumor.params.sigma_mm, self.fine_grain_mm)

    @property
    def needed(self) -> Box:
        """The part of the crop that is read after painting.

        It holds what the feather reaches, and the voxels in which the change is matched to the
        scan.
        """
        margin = MATCH_MARGIN_VOXELS
        if self.fill is not None:
            margin += math.ceil(EXTENSION_MM) + 1
        grid = self.fine_grid
        feathered, matched = grid.near(self.fine_region), grid.near(self.tumor.fine_box)
        return Box.hull([feathered, matched.grown(margin)]).within(Box.whole(self.crop.shape))


@dataclass(frozen=True)
class Candidate:
    """A tumour blended into its region, before it is accepted and written.

    Args:
        after: the region's image with the tumour.
        peak_weight: largest blend weight in the tumour.
        hu_change: mean change in the labelled voxels, in HU; with mass effect against the tissue
            that was pushed aside, not the input.
        from_tissue_hu: the same against the tissue with its vessels covered; None where other
            tissue was covered, which says nothing about the generator.
        true_contrast_hu: mean of what the generator changed in the tumour itself.
        visible_contrast_hu: the same after averaging over voxels, in the labelled ones.
        contrast_hu: mean of the tumour minus the level of the organ around; None where too little
            organ is around.
        visibility: of the tumour over the scan's noise; None where that cannot be measured. 0 for
            one that must be darker and is not.
        has_change: whether at least half of the tumour's voxels change.
        excess_hu: by how much the tumour is brighter than the tissue around, or than what it
            replaced, whichever is more; negative for darker than both.
        is_too_bright: whether it must be darker than both, and is brighter beyond doubt.
    """

    after: Tensor
    peak_weight: float
    hu_change: float
    from_tissue_hu: float | None
    true_contrast_hu: float
    visible_contrast_hu: float
    contrast_hu: float | None
    visibility: float | None
    has_change: bool
    excess_hu: float | None
    is_too_bright: bool

    @property
    def is_brighter(self) -> bool:
        """Whether the tumour is brighter than the tissue around it, and than what it replaced.

        Either alone may be the noise of a faint tumour's place.
        """
        replaced = self.from_tissue_hu is None or self.from_tissue_hu > 0
        return replaced and self.contrast_hu is not None and self.contrast_hu > 0


@dataclass(frozen=True)
class SkipRecord:
    """Report entry of a tumour, or a whole sample, that was left out.

    Args:
        sample: number of the sample in the batch.
        index: number among the sample's tumours and skips.
        code: why, for programs.
        reason: why, for people.
        scores: the gate's scores, where the gate rejected the tumour.
    """

    sample: int
    index: int
    code: SkipCode
    reason: str
    scores: dict[str, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``report``."""
        entry: dict[str, Any] = {
            "sample": self.sample,
            "index": self.index,
            "applied": False,
            "code": self.code.value,
            "reason": self.reason,
        }
        return entry if self.scores is None else {**entry, "scores": self.scores}


@dataclass(frozen=True)
class Growth:
    """How a tumour's size compares with that of the first phase.

    Args:
        first_diameter_mm: equivalent diameter of the labelled voxels in the first phase.
        requested_first_diameter_mm: sampled diameter in the first phase.
        reached_factor: diameter of the labelled voxels over that in the first phase. A label of
            few or of coarse voxels cannot follow the requested factor closely.
        requested_factor: diameter that was asked for over that of the first phase.
        has_room: whether there was room for what was asked for.
    """

    first_diameter_mm: float
    requested_first_diameter_mm: float
    reached_factor: float
    requested_factor: float
    has_room: bool

    @classmethod
    def of(cls, tumor: LocalMask) -> Growth | None:
        """Return the growth of a tumour; None of one in its first phase."""
        if tumor.first is None:
            return None
        requested_factor = tumor.params.growth_factor
        return cls(
            first_diameter_mm=tumor.first.diameter_mm,
            requested_first_diameter_mm=tumor.params.drawn_mm / requested_factor,
            reached_factor=tumor.reached_factor,
            requested_factor=requested_factor,
            has_room=tumor.has_room,
        )


@dataclass(frozen=True, kw_only=True)
class TumorRecord:
    """Report entry of a synthetic tumour.

    Args:
        sample: number of the sample in the batch.
        index: number among the sample's tumours and skips.
        centre_voxel: the tumour's voxel nearest to its centroid.
        centre_mm: the same in patient coordinates (RAS); voxel x spacing without an affine.
        diameter_mm: equivalent diameter of the labelled voxels.
        requested_diameter_mm: sampled diameter, before placement made the tumour smaller to fit.
        volume_mm3: volume of the labelled voxels.
        label_voxels: how many voxels became ``tumor_label``.
        true_diameter_mm: equivalent diameter of the tumour itself. Where voxels are coarse, the
            label differs: it holds the voxels of which the tumour fills half; of one thinner than a
            voxel, the outline of what is visible.
        true_volume_mm3: volume of the tumour itself.
        hu_change: mean change in the labelled voxels, in HU; with mass effect against the tissue
            that was pushed aside, not the input.
        true_contrast_hu: mean of what the generator changed in the tumour itself.
        visible_contrast_hu: mean of the same in the labelled voxels, after averaging over voxels
            that the tumour fills in part.
        peak_weight: largest blend weight in the tumour.
        sigma_mm: widest feather along an axis.
        grain_mm: width of the scan's noise grain along the tensor's axes.
        contrast_hu: requested contrast; None left it to the generator.
        visibility: contrast over the scan's noise for the tumour's size (`appearance.visibility`);
            None where it cannot be measured.
        displaced_mm: largest displacement of the tissue around it.
        outside_share: share of the tumour beyond the organ.
        generator: name of the generator.
        seed: seed of the generator's noise.
        scores: the gate's scores, where there is a gate.
        growth: of a tumour that has grown or shrunk, its size against the first phase (`Growth`).
    """

    sample: int
    index: int
    centre_voxel: list[int]
    centre_mm: list[float]
    diameter_mm: float
    requested_diameter_mm: float
    volume_mm3: float
    label_voxels: int
    true_diameter_mm: float
    true_volume_mm3: float
    hu_change: float
    true_contrast_hu: float
    visible_contrast_hu: float
    peak_weight: float
    sigma_mm: float
    grain_mm: list[float]
    contrast_hu: float | None
    visibility: float | None
    displaced_mm: float = 0.0
    outside_share: float
    generator: str
    seed: int
    scores: dict[str, float | None] | None = None
    growth: Growth | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``report``."""
        entry = {"sample": self.sample, "index": self.index, "applied": True, **asdict(self)}
        for name in ("scores", "growth"):
            if entry[name] is None:
                del entry[name]
        return entry


Record = SkipRecord | TumorRecord


class Rejection(NamedTuple):
    """A placed tumour that was not made, and is not made by a replay either.

    Args:
        number: its place among the tumours in the sample's params.
        reason: why, for people.
        code: the same for programs.
    """

    number: int
    reason: str
    code: SkipCode


@dataclass
class SampleParams:
    """What is random about one sample; `to_dict` is an entry of ``synth.params``.

    Args:
        seed: the sample's seed; None where nothing was drawn.
        code: why the sample was skipped; None if it was not.
        reason: the same for people.
        tumors: params of its tumours.
        rejected: the tumours that were placed and then rejected.
        grid: of the sample.
    """

    seed: int | None
    code: SkipCode | None = None
    reason: str = ""
    tumors: list[TumorParams] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    grid: ParamsGrid | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``params``."""
        entry: dict[str, Any] = {
            "seed": self.seed,
            "applied": self.code is None,
            "tumors": [tumor.to_dict() for tumor in self.tumors],
        }
        if self.code is not None:
            entry |= {"code": self.code.value, "reason": self.reason}
        if self.tumors and self.grid is not None:
            entry["grid"] = self.grid.to_dict()
        if self.rejected:
            entry["rejected"] = [
                [one.number, one.reason, *([] if one.code is SkipCode.GATE else [one.code.value])]
                for one in self.rejected
            ]
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> SampleParams:
        """Return the params of an entry that `check_params` accepts, of any earlier version."""
        code = None if entry["applied"] else SkipCode(entry.get("code") or SkipCode.REPLAYED)
        return cls(
            entry.get("seed"),
            code,
            "" if code is None else entry.get("reason", "left alone"),
            [TumorParams.from_dict(values) for values in entry["tumors"]],
            [
                Rejection(int(number), reason, SkipCode(*code or [SkipCode.GATE]))
                for number, reason, *code in entry.get("rejected", ())
            ],
            ParamsGrid.of_record(entry),
        )
