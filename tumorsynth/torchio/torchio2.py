"""The TorchIO transforms for TorchIO 2, which take batches too; see `tumorsynth.torchio`.

Written for 2.0.0a2. There a transform draws its parameters with ``make_params`` and applies them
with ``apply_transform``; the history holds them under the transform's name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torchio import SubjectsBatch, Transform

from tumorsynth.adapter import SETTINGS, Adapter
from tumorsynth.arguments import check_keywords
from tumorsynth.pipeline.validation import check_grid
from tumorsynth.torchio.shared import (
    DRAWN,
    RESAMPLE,
    check_asked,
    check_names,
    check_record,
    nameable,
    random_repr,
    spared,
)


class _Synthesis(Transform):
    """What the random and the deterministic transform share."""

    def __init__(
        self,
        image: str = "image",
        label: str = "label",
        organ: str | None = None,
        healthy_only: bool = False,
        **kwargs: Any,
    ) -> None:
        check_keywords(self, kwargs, SETTINGS, Transform)
        check_asked(image, label, organ)
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        super().__init__(**kwargs)
        self.adapter = Adapter(organ is not None, healthy_only, **settings)
        settings["generator"] = nameable(
            settings.get("generator", SETTINGS["generator"]), self.adapter
        )
        self.settings = settings
        self.image, self.label, self.organ = image, label, organ

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last call in this process."""
        return self.adapter.report

    def _spares(self, batch: SubjectsBatch) -> bool:
        names = self._names()
        check_names(type(self).__name__, names, batch.images)
        return spared(names[:2], self.include, self.exclude)

    def _names(self) -> list[str]:
        return [name for name in (self.image, self.label, self.organ) if name is not None]

    def _synthesize(
        self, batch: SubjectsBatch, leave: Sequence[bool] | None = None, **call: Any
    ) -> None:
        """Change the batch's image and label, by replacing their tensors."""
        names = self._names()
        parts = [batch.images[name] for name in names]
        affines = [torch.stack([affine.data.cpu() for affine in part.affines]) for part in parts]
        check_grid(names, affines, RESAMPLE)
        image, label = parts[:2]
        organ = parts[2].data if self.organ is not None else None
        image.data, label.data = self.adapter(
            image.data, label.data, organ, leave, affine=affines[0], **call
        )


class RandomSynthesizeTumor(_Synthesis):
    """As :class:`tumorsynth.torchio.torchio1.RandomSynthesizeTumor`, for TorchIO 2.

    kwargs: TorchIO's own are p, copy, per_instance, include, exclude. Every sample of a batch draws
    its own tumours; with ``per_instance=False`` all get the same seed.

    The history keeps, as its params, the arguments of :class:`SynthesizeTumor`:
    ``SynthesizeTumor(**subject.applied_transforms[0].params)(scan)`` makes the same tumours.
    """

    def __repr__(self) -> str:
        return random_repr(self, self.p)

    @property
    def supports_per_instance_params(self) -> bool:
        return True

    @property
    def supports_per_instance_p(self) -> bool:
        return True

    def make_params(self, batch: SubjectsBatch) -> dict[str, Any]:
        """The seeds, and which samples to leave alone."""
        n = self._resolve_n(batch)
        keep = self._keep_mask(batch, n)
        seeds = torch.randint(2**63 - 1, (n or 1,)).tolist() * (1 if n else batch.batch_size)
        params: dict[str, Any] = {"params": None, "seed": seeds}
        if batch.batch_size > 1:  # also where they share a seed, each has its own tumours
            self._tag_batched(params, batch, batch.batch_size, keep, ["params"])
        if self._spares(batch):
            params["_keep"] = [False] * batch.batch_size  # a no-op, which enters no history
        return params

    def apply_transform(self, batch: SubjectsBatch, params: dict[str, Any]) -> SubjectsBatch:
        """Synthesise, and put into ``params`` what does it again."""
        if self._spares(batch):
            return batch
        keep = params.get("_keep")
        leave = None if keep is None else [not kept for kept in keep]
        self._synthesize(batch, leave, seed=params.pop("seed"))
        made = self.adapter.synth.params
        params["params"] = made if batch.batch_size > 1 else made[0]
        params.update(image=self.image, label=self.label, organ=self.organ)
        params.update({k: v for k, v in self.settings.items() if k not in DRAWN})
        return batch


class SynthesizeTumor(_Synthesis):
    """As :class:`tumorsynth.torchio.torchio1.SynthesizeTumor`, for TorchIO 2.

    params: one record of ``tumorsynth.SynthesizeTumor.params``, or one for each sample of a batch.
    """

    def __init__(self, params: dict[str, Any] | Sequence[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        batch = isinstance(params, list | tuple) and len(params) > 1
        records = [check_record(one) for one in (params if batch else [params])]
        self.params = copy.deepcopy(records if batch else records[0])

    def __repr__(self) -> str:
        given = self.adapter.described()
        return f"{type(self).__name__}(params={self.params!r}{', ' if given else ''}{given})"

    def make_params(self, batch: SubjectsBatch) -> dict[str, Any]:
        params: dict[str, Any] = {"params": copy.deepcopy(self.params)}
        params.update(image=self.image, label=self.label, organ=self.organ, **self.settings)
        if batch.batch_size > 1:
            self._tag_batched(params, batch, batch.batch_size, None, ["params"])
        if self._spares(batch):
            params["_keep"] = [False] * batch.batch_size
        return params

    def apply_transform(self, batch: SubjectsBatch, params: dict[str, Any]) -> SubjectsBatch:
        if not self._spares(batch):
            records = params["params"]
            self._synthesize(batch, params=[records] if isinstance(records, dict) else records)
        return batch
