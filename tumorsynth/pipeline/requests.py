"""Turn placed tumours into requests for the generator, or into report entries of why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tumorsynth.appearance.contrast_priors import ContrastPrior
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.paint import request_painting, with_contrast
from tumorsynth.pipeline.place import PlacedSample
from tumorsynth.pipeline.records import (
    PaintRequest,
    Record,
    Sample,
    SampleParams,
    SkipRecord,
    TumorId,
)
from tumorsynth.placement.types import LocalMask, Skip, SkipCode


@dataclass(frozen=True)
class DisplacingTumor:
    """A placed tumour of a sample in which tissue is pushed aside.

    Args:
        id: which tumour of the call this is.
        tumor: as placed, before any displacement.
        later: the sample's tumours after it, whose voxels it may not take.
    """

    id: TumorId
    tumor: LocalMask
    later: list[LocalMask]


@dataclass(frozen=True)
class Requests:
    """What is to be done for the tumours of a batch.

    Args:
        paint: tumours that go to the generator as they are placed.
        displace: for each sample with mass effect, its tumours in order.
        records: report entries of what is skipped already.
    """

    paint: list[PaintRequest] = field(default_factory=list)
    displace: list[list[DisplacingTumor]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether any tumour is left to be made."""
        return bool(self.paint or self.displace)


def request_tumors(
    call: Call, samples: Sequence[Sample], placed: Sequence[PlacedSample]
) -> Requests:
    """Collect the requests of a batch.

    Args:
        call: settings and generator.
        samples: of the batch.
        placed: their placed tumours.
    """
    requests = Requests()
    for sample, one in zip(samples, placed, strict=True):
        _request_sample(call, sample, one, requests)
    return requests


def skip_records(placed: Sequence[PlacedSample], first: int = 0) -> list[Record]:
    """Return report entries of the samples that are skipped as a whole.

    Args:
        placed: samples in a row.
        first: number of the first of them in its batch.
    """
    return [
        SkipRecord(b, 0, one.params.code, one.params.reason)
        for b, one in enumerate(placed, first)
        if one.params.code is not None
    ]


def request_or_skip(
    call: Call, id: TumorId, sample: Sample, tumor: LocalMask | Skip, params: SampleParams | None
) -> PaintRequest | SkipRecord:
    """Return the request for one tumour, or the report entry of why there is none.

    Args:
        call: settings and generator.
        id: which tumour of the call this is.
        sample: the scan or patch.
        tumor: its voxels, or why it has none.
        params: the sample's params, in which a contrast drawn from a prior is recorded; None on a
            replay.
    """
    found: PaintRequest | Skip
    if isinstance(tumor, Skip):
        found = tumor
    else:
        found = request_painting(call.settings, call.generator, id, sample, tumor)
    if isinstance(found, Skip):
        return SkipRecord(id.sample, id.index, found.code, found.reason)
    if params is not None and isinstance(call.settings.contrast_hu, ContrastPrior):
        seed = found.tumor.params.seed
        found = with_contrast(call.settings, call.generator, found, seed)
        params.tumors[id.number] = found.tumor.params
    return found


def _request_sample(call: Call, sample: Sample, placed: PlacedSample, requests: Requests) -> None:
    """Add what is to be done for the tumours of one sample."""
    requests.records.extend(skip_records([placed], first=sample.number))
    rejected = dict(placed.params.rejected)
    tumors = [result for result in placed.results if isinstance(result, LocalMask)]
    has_mass_effect = any(tumor.params.displaced > 0 for tumor in tumors)
    displacing: list[DisplacingTumor] = []
    number = 0
    for index, result in enumerate(placed.results):
        id = TumorId(sample.number, index, number)
        if isinstance(result, LocalMask):
            number += 1
            if id.number in rejected:
                # skipped only here: it took room from the later ones while they were placed
                reason = rejected[id.number]
                requests.records.append(SkipRecord(id.sample, index, SkipCode.GATE, reason))
                continue
            if has_mass_effect:
                later = [] if call.settings.merge else tumors[number:]
                displacing.append(DisplacingTumor(id, result, later))
                continue
        found = request_or_skip(call, id, sample, result, placed.drawn)
        if isinstance(found, SkipRecord):
            requests.records.append(found)
        else:
            requests.paint.append(found)
    if has_mass_effect:
        requests.displace.append(displacing)
