"""What is the same for all tumours of one call, and what the call gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from tumorsynth.generators.protocol import TumorGenerator
from tumorsynth.pipeline.paint import Painter
from tumorsynth.pipeline.place_batch import PlacedSample
from tumorsynth.pipeline.records import Record
from tumorsynth.pipeline.settings import Settings
from tumorsynth.pipeline.tissue_check import TissueCheck


@dataclass(frozen=True)
class Call:
    """What the stages share.

    Args:
        settings: of the transform.
        generator: on the device of this call.
        painter: runs the generator.
        new_contrast: whether a replay draws the contrasts anew, as for another phase.
    """

    settings: Settings
    generator: TumorGenerator
    painter: Painter
    new_contrast: bool = False

    @cached_property
    def tissue(self) -> TissueCheck | None:
        """Where the generator may paint; None if its card does not say so."""
        return TissueCheck.of(self.settings, self.generator)


class Synthesis(NamedTuple):
    """The result of one call.

    Args:
        image: with tumours; the input itself if no sample got any.
        label: likewise.
        report: one dict per tumour, or per reason for none.
        params: one dict per sample, which repeats the call.
    """

    image: Tensor
    label: Tensor
    report: list[dict[str, Any]]
    params: list[dict[str, Any]]

    @classmethod
    def of(
        cls, image: Tensor, label: Tensor, records: Iterable[Record], placed: Sequence[PlacedSample]
    ) -> Synthesis:
        """Return the result with the records in the order of the samples and their tumours."""
        ordered = sorted(records, key=lambda record: (record.sample, record.index))
        report = [record.to_dict() for record in ordered]
        return cls(image, label, report, [sample.to_params() for sample in placed])
