"""The TorchIO transforms for TorchIO 2, which take batches too; see `tumorsynth.torchio`.

Written for 2.0.0a2, where a transform draws its parameters in ``make_params`` and applies them in
``apply_transform``. The history holds them under the transform's name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torchio import SubjectsBatch, Transform

from tumorsynth.adapter import MAX_SEED, SETTINGS, Adapter
from tumorsynth.arguments import keywords_of
from tumorsynth.pipeline.frames import Carried, check_grid
from tumorsynth.pipeline.lost_affines import lost_affines
from tumorsynth.torchio.shared import (
    GEOMETRY,
    RESAMPLE,
    check_names,
    check_record,
    check_subject,
    generator_for_history,
    is_left_out,
    random_repr,
    settings_for_history,
)
from tumorsynth.tracing import untraced


@keywords_of(Adapter, Transform, without=["separate_organ"])
class _Synthesis(Transform):
    """What the random and the replaying transform share."""

    def __init__(
        self,
        image: str = "image",
        label: str = "label",
        organ: str | None = None,
        healthy_only: bool = False,
        **kwargs: Any,
    ) -> None:
        check_names(image, label, organ)
        names = (*SETTINGS, *GEOMETRY)
        settings = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().__init__(**kwargs)
        self.adapter = Adapter(organ is not None, healthy_only, **settings)
        settings["generator"] = generator_for_history(
            settings.get("generator", SETTINGS["generator"]), self.adapter
        )
        self.settings = settings
        self.image, self.label, self.organ = image, label, organ

    @untraced
    def forward(self, data: Any) -> Any:
        """Return the transformed subject, or the batch."""
        return super().forward(data)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last call in this process."""
        return self.adapter.report

    def _leaves_out(self, batch: SubjectsBatch) -> bool:
        """Return whether include or exclude leave out the image or the label."""
        check_subject(type(self).__name__, self._names(), batch.images)
        return is_left_out((self.image, self.label), self.include, self.exclude)

    def _names(self) -> list[str]:
        return [name for name in (self.image, self.label, self.organ) if name is not None]

    def _synthesize(
        self, batch: SubjectsBatch, excluded: Sequence[bool] | None = None, **call: Any
    ) -> None:
        """Replace the tensors of the batch's image and label."""
        names = self._names()
        parts = [batch.images[name] for name in names]
        affines = [torch.stack([affine.data.cpu() for affine in part.affines]) for part in parts]
        image, label = parts[:2]
        shape = image.data.shape[-3:]
        carried = [
            Carried(name, affine, partial(lost_affines, affine, shape))
            for name, affine in zip(names, affines, strict=True)
        ]
        if self.adapter.spacing is None:
            check_grid(carried, shape, RESAMPLE)
        organ = parts[2].data if self.organ is not None else None
        image.data, label.data = self.adapter(
            image.data, label.data, organ, excluded, names=names, carried=carried, **call
        )


@keywords_of(Adapter, Transform)
class RandomSynthesizeTumor(_Synthesis):
    """Adds synthetic tumours to the CT and the label map of a subject or a batch.

    Every sample of a batch draws its own tumours; with ``per_instance=False`` all get one seed. The
    history holds the arguments of `SynthesizeTumor` as params:
    ``SynthesizeTumor(**subject.applied_transforms[0].params)(scan)`` makes the same tumours.

    Integer images and labels keep their dtype; values are rounded. The generator must be a name, a
    folder or a hand-crafted one: the history keeps it, so that it can be replayed elsewhere.

    Args:
        image: name of the subject's CT.
        label: name of the label map that gets the tumour.
        organ: name of a separate organ map, of which ``organ_labels`` are then values. By default
            the label marks the organ.
        healthy_only: whether to skip subjects whose label holds a tumour already.
        **kwargs: the arguments of `tumorsynth.SynthesizeTumor`, without p, and of TorchIO's
            own transforms (p, copy, per_instance, include, exclude).

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for a value of the wrong type, or an unknown argument.

    Examples:
        >>> transform = RandomSynthesizeTumor(image="ct", label="organs", organ_labels=1, p=0.5)
        >>> subject = transform(subject)
        >>> subject.applied_transforms[0].params
    """

    def __repr__(self) -> str:
        return random_repr(self, self.p)

    @property
    def supports_per_instance_params(self) -> bool:
        """Tell TorchIO that the samples of a batch have their own params."""
        return True

    @property
    def supports_per_instance_p(self) -> bool:
        """Tell TorchIO that ``p`` holds for each sample of a batch."""
        return True

    def make_params(self, batch: SubjectsBatch) -> dict[str, Any]:
        """Draw the seeds, and which samples to leave out."""
        n = self._resolve_n(batch)
        keep = self._keep_mask(batch, n)
        seeds = torch.randint(MAX_SEED, (n or 1,)).tolist() * (1 if n else batch.batch_size)
        params: dict[str, Any] = {"params": None, "seed": seeds}
        if batch.batch_size > 1:  # samples that share a seed still have their own tumours
            self._tag_batched(params, batch, batch.batch_size, keep, ["params"])
        if self._leaves_out(batch):
            params["_keep"] = [False] * batch.batch_size  # TorchIO then records nothing
        return params

    def apply_transform(self, batch: SubjectsBatch, params: dict[str, Any]) -> SubjectsBatch:
        """Add tumours, and complete ``params`` to arguments that repeat them."""
        if self._leaves_out(batch):
            return batch
        keep = params.get("_keep")
        excluded = None if keep is None else [not kept for kept in keep]
        self._synthesize(batch, excluded, seed=params.pop("seed"))
        records = self.adapter.synth.params
        params["params"] = records if batch.batch_size > 1 else records[0]
        params.update(image=self.image, label=self.label, organ=self.organ)
        params.update(settings_for_history(self.settings))
        return batch


@keywords_of(RandomSynthesizeTumor)
class SynthesizeTumor(_Synthesis):
    """Adds the tumours that ``params`` describe: a replay of the history, bit by bit.

    Args:
        params: one entry of ``tumorsynth.SynthesizeTumor.params``, or one for each sample of a
            batch.
        **kwargs: as for `RandomSynthesizeTumor`. Those that decide what is drawn (count,
            size_mm, sigma_mm, contrast_hu, mass_effect, shapes, bulge, healthy_only) have no
            effect.

    Raises:
        ValueError: for params that are no such entry.
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
        """Return the arguments of this transform."""
        params: dict[str, Any] = {"params": copy.deepcopy(self.params)}
        params.update(image=self.image, label=self.label, organ=self.organ, **self.settings)
        if batch.batch_size > 1:
            self._tag_batched(params, batch, batch.batch_size, None, ["params"])
        if self._leaves_out(batch):
            params["_keep"] = [False] * batch.batch_size
        return params

    def apply_transform(self, batch: SubjectsBatch, params: dict[str, Any]) -> SubjectsBatch:
        """Add the tumours."""
        if not self._leaves_out(batch):
            records = params["params"]
            self._synthesize(batch, params=[records] if isinstance(records, dict) else records)
        return batch
