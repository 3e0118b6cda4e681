"""Tumour synthesis as MONAI transforms.

    Compose([
        LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"]),
        Orientationd(["image", "label"], "RAS"), Spacingd(["image", "label"], (1, 1, 1), ...),
        # on HU, before the scaling; after it with intensity=ts.Scaled(-175, 250, 0, 1)
        RandSynthesizeTumord("image", label_key="label", prob=0.5),
        ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
    ])

All draws come from ``self.R`` and none from the global generators, so that ``set_random_state``
reproduces. Each worker process draws from its own stream, a new one in each epoch, which depends on
the loader's seed: with MONAI's DataLoader ``torch.manual_seed`` or ``set_determinism`` reproduces,
with torch's both together. In distributed training each rank makes its own tumours, even if all
ranks set one seed. ``applied_operations`` stays as it is: a later ``inverse`` works as without the
synthesis.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

try:
    from monai.engines.utils import PrepareBatch
    from monai.transforms import MapTransform, RandomizableTransform
    from monai.utils import TransformBackends
except ImportError as error:
    raise ImportError('tumorsynth.monai needs MONAI: pip install "tumorsynth[monai]"') from error

from tumorsynth.adapter import MAX_SEED, Adapter
from tumorsynth.arguments import (
    check_callable,
    check_flag,
    check_probability,
    keywords_of,
    known_keywords,
)
from tumorsynth.array_types import to_tensor, to_type_of
from tumorsynth.batch_entries import describe, find_entry, map_tensors, replace_entry
from tumorsynth.random_streams import distributed_rank
from tumorsynth.tracing import untraced

__all__ = [
    "BatchSynthesizeTumorD",
    "BatchSynthesizeTumorDict",
    "BatchSynthesizeTumord",
    "PrepareBatchTumorSynth",
    "RandSynthesizeTumor",
    "RandSynthesizeTumorD",
    "RandSynthesizeTumorDict",
    "RandSynthesizeTumord",
]


@keywords_of(Adapter)
class RandSynthesizeTumor(RandomizableTransform):
    """Adds synthetic tumours to a CT (1, X, Y, Z) and its label; the inputs stay as they are.

    Numpy arrays, tensors and MetaTensors come back as the same type, dtype, device, affine and
    metadata. Integer images get rounded values.

    Args:
        prob: probability of changing a sample.
        separate_organ: whether calls bring a separate organ map, of which ``organ_labels`` are
            then values.
        **settings: ``healthy_only=True`` to skip samples whose label holds a tumour already, and
            the arguments of `tumorsynth.SynthesizeTumor`, without p.

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for a value of the wrong type, or an unknown argument.

    Examples:
        >>> transform = RandSynthesizeTumor(prob=0.5, organ_labels=1, tumor_label=2)
        >>> image, label = transform(image, label)
        >>> transform.report
    """

    backend = [TransformBackends.TORCH, TransformBackends.NUMPY]

    def __init__(
        self,
        prob: float = 1.0,
        *,
        separate_organ: bool = False,
        **settings: Any,
    ) -> None:
        RandomizableTransform.__init__(self, check_probability("prob", prob))
        self.adapter = Adapter(separate_organ, **settings)
        self._stream: int | None = None  # seed of the worker that R was made for

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last call in this process."""
        return self.adapter.report

    @property
    def params(self) -> list[dict[str, Any]]:
        """What repeats the last call in this process, for `replay`."""
        return self.adapter.synth.params

    def grow(self, params: Sequence[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
        """Return params of the same tumours at another size (`SynthesizeTumor.grow`)."""
        return self.adapter.synth.grow(params, factor)

    def replay(
        self,
        img: Any,
        label: Any,
        organ: Any = None,
        *,
        params: Sequence[dict[str, Any]],
        contrast_hu: Any = None,
        first_phase: Any = None,
    ) -> tuple[Any, Any]:
        """Return (img, label) with the tumours of ``params``, whatever ``prob`` is.

        Args:
            img: as for a call, like ``label`` and ``organ``.
            label: without the tumours.
            organ: the separate organ map.
            params: of an earlier call, or from `grow`.
            contrast_hu: the contrast of another phase (`tumorsynth.SynthesizeTumor`).
            first_phase: the image that ``params`` were drawn in, where ``img`` is another phase.
        """
        return self._apply(
            img,
            label,
            organ,
            names=("img", "label", "organ"),
            params=params,
            contrast_hu=contrast_hu,
            first_phase=to_tensor(first_phase),
        )

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandSynthesizeTumor:
        """Set the state that all draws come from; return the transform."""
        super().set_random_state(seed, state)
        worker = get_worker_info()
        self._stream = None if worker is None else worker.seed
        return self

    def randomize(self, data: Any = None) -> None:
        """Draw whether to change the sample, and the seed of its tumours."""
        self._draw_seed()

    def _draw_seed(self) -> int | None:
        """Return the seed of a sample's tumours, None to leave the sample alone.

        The call keeps the result to itself, since threads may share the transform.
        """
        self._leave_shared_stream()
        act = bool(self.R.rand() < self.prob)
        (seed,) = self._draw_seeds(1)
        self._do_transform = act  # MONAI's flag, for users who read it
        self.adapter.synth.report = []
        return seed if act else None

    def _draw_seeds(self, n: int) -> list[int]:
        """Return n seeds from R, different on each rank of a distributed training."""
        seeds = self.R.randint(MAX_SEED, size=n, dtype=np.int64)
        rank = distributed_rank()
        if rank:
            own = np.random.RandomState([*seeds.view(np.uint32), rank])
            seeds = own.randint(MAX_SEED, size=n, dtype=np.int64)
        return seeds.tolist()

    def _leave_shared_stream(self) -> None:
        """Give each worker process its own stream, a new one in each epoch.

        Workers start as copies, R included. MONAI's DataLoader then gives each one its own state.
        Under torch's DataLoader this mixes in the seed that torch gave the worker.
        """
        worker = get_worker_info()
        if worker is not None and self._stream != worker.seed:
            own = [*self.R.randint(2**32, size=4, dtype=np.uint32), worker.seed % 2**32]
            self.set_random_state(state=np.random.RandomState(own))

    @untraced
    @known_keywords
    def __call__(self, img: Any, label: Any, organ: Any = None) -> tuple[Any, Any]:
        """Return a new (img, label); the arguments themselves where nothing changes.

        Args:
            img: the CT, (1, X, Y, Z).
            label: the same shape.
            organ: the separate organ map, the same shape, with ``separate_organ=True``.
        """
        seed = self._draw_seed()
        if seed is None:
            return img, label
        return self._apply(img, label, organ, seed=seed, names=("img", "label", "organ"))

    def __repr__(self) -> str:
        return _format_call(self, f"prob={self.prob:g}", self.adapter.described())

    def _apply(
        self, img: Any, label: Any, organ: Any, *, names: Sequence[Hashable], **call: Any
    ) -> tuple[Any, Any]:
        """Call the adapter with tensors; return (img, label) in the types that came in."""
        image, label_map = to_tensor(img), to_tensor(label)
        new_image, new_label = self.adapter(image, label_map, to_tensor(organ), names=names, **call)
        return (
            img if new_image is image else to_type_of(img, new_image),
            label if new_label is label_map else to_type_of(label, new_label),
        )


@keywords_of(RandSynthesizeTumor, without=["separate_organ"])
class RandSynthesizeTumord(RandSynthesizeTumor, MapTransform):
    """`RandSynthesizeTumor` for a dictionary.

    Args:
        keys: the key of the CT (1, X, Y, Z), one. Keys of a nested dictionary have dots:
            "image.data".
        label_key: the key of the label that gets the tumour.
        organ_key: the key of a separate organ map, of which ``organ_labels`` are then values. By
            default the label marks the organ.
        prob: probability of changing a sample.
        allow_missing_keys: whether to leave a dictionary that lacks one of the keys as it is,
            instead of raising a KeyError.
        when: a function of the dictionary that returns whether the sample may change, for example
            ``lambda data: data["healthy"]``. To pickle the transform, use a named function.
        **settings: ``healthy_only=True`` to skip samples whose label holds a tumour already, and
            the arguments of `tumorsynth.SynthesizeTumor`, without p.

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for a value of the wrong type, or an unknown argument.

    Examples:
        >>> transform = RandSynthesizeTumord("image", "label", prob=0.5, organ_labels=1)
        >>> data = transform({"image": image, "label": label})
    """

    def __init__(
        self,
        keys: Hashable,
        label_key: Hashable = "label",
        organ_key: Hashable | None = None,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
        *,
        when: Callable[[Mapping[Hashable, Any]], Any] | None = None,
        **settings: Any,
    ) -> None:
        MapTransform.__init__(self, keys, check_flag("allow_missing_keys", allow_missing_keys))
        if len(self.keys) != 1:
            raise ValueError(
                f"keys must be the key of one image, got {self.keys}; "
                "name the label with label_key=..."
            )
        super().__init__(prob, separate_organ=organ_key is not None, **settings)
        for name, key in (("label_key", label_key), ("organ_key", organ_key)):
            if not isinstance(key, Hashable) or isinstance(key, tuple) or key == self.keys[0]:
                raise ValueError(f"{name} must be one key, another than the image's, got {key!r}")
        if organ_key is not None and organ_key == label_key:
            raise ValueError(
                f"organ_key must be another key than label_key, got {organ_key!r} for both; leave "
                "organ_key out where the label itself marks the organ"
            )
        self.label_key = label_key
        self.organ_key = organ_key
        self.when = check_callable("when", when)

    def __repr__(self) -> str:
        return _format_call(
            self,
            f"{self.keys[0]!r}, {self.label_key!r}",
            "" if self.organ_key is None else f"organ_key={self.organ_key!r}",
            f"prob={self.prob:g}",
            "" if self.when is None else f"when={self.when!r}",
            self.adapter.described(),
        )

    @untraced
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:  # type: ignore[override]
        """Return a new dictionary, with new image and label where they change.

        Raises:
            KeyError: for a dictionary that lacks a key, without ``allow_missing_keys``.
        """
        out = _copy_entries(data)
        seed = self._draw_seed()
        if seed is not None:
            self._update(out, seed=seed)
        return out

    def replay(  # type: ignore[override]
        self,
        data: Mapping[Hashable, Any],
        *,
        params: Sequence[dict[str, Any]],
        contrast_hu: Any = None,
        first_phase: Any = None,
    ) -> dict[Hashable, Any]:
        """Return a new dictionary with the tumours of ``params``, whatever ``prob`` and ``when``.

        Args:
            data: as for a call, without the tumours.
            params: of an earlier call, or from `grow`.
            contrast_hu: the contrast of another phase (`tumorsynth.SynthesizeTumor`).
            first_phase: the image that ``params`` were drawn in, where the dictionary's is of
                another phase.
        """
        out = _copy_entries(data)
        phase = {"contrast_hu": contrast_hu, "first_phase": to_tensor(first_phase)}
        self._update(out, params=params, **phase)
        return out

    def _update(self, out: dict[Hashable, Any], **call: Any) -> None:
        """Put new image and label into a dictionary."""
        names = [self.keys[0], self.label_key]
        names += [] if self.organ_key is None else [self.organ_key]
        entries = [find_entry(out, key) for key in names]
        missing = [key for key, entry in zip(names, entries, strict=True) if entry is None]
        if missing and not self.allow_missing_keys:
            raise KeyError(
                f"{type(self).__name__} misses {missing} in the data, which has {describe(out)}; "
                "name the keys it has, with dots where it is nested ('image.data'), or pass "
                "allow_missing_keys=True"
            )
        found = [entry for entry in entries if entry is not None]
        if not missing:
            before = [entry.with_affine() for entry in found]
            excluded = None
            if self.when is not None and "params" not in call:
                excluded = self._excluded(self.when(out), before[0])
            organ = before[2] if len(before) > 2 else None
            after = self._apply(before[0], before[1], organ, names=names, excluded=excluded, **call)
            for entry, old, new in zip(found, before, after, strict=False):
                if new is not old:
                    first, *rest = entry.path
                    out[first] = replace_entry(out[first], tuple(rest), new)

    def _excluded(self, answer: Any, image: Any) -> list[bool]:
        """Return which samples the answer of ``when`` excludes."""
        return [not bool(answer)]


@keywords_of(RandSynthesizeTumord)
class BatchSynthesizeTumord(RandSynthesizeTumord):
    """`RandSynthesizeTumord` for a collated batch (B, 1, X, Y, Z), on the batch's device.

    Call it on what a DataLoader yields. ``prob`` holds for each sample of the batch. ``when``
    answers for each sample with B bools, or for all with one.

    Args:
        keys: the key of the CT (B, 1, X, Y, Z), one.
        **kwargs: the other arguments of `RandSynthesizeTumord`.

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for a value of the wrong type, or an unknown argument.

    Examples:
        >>> synthesize = BatchSynthesizeTumord("image", "label", prob=0.5, organ_labels=1)
        >>> for batch in loader:
        ...     batch = synthesize({key: value.to("cuda") for key, value in batch.items()})
    """

    def __init__(self, keys: Hashable, *args: Any, **kwargs: Any) -> None:
        super().__init__(keys, *args, **kwargs)
        self.adapter.synth.p = float(self.prob)

    @untraced
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:  # type: ignore[override]
        """Return a new dictionary, with new image and label where samples change."""
        out = _copy_entries(data)
        entry = find_entry(out, self.keys[0])
        image = None if entry is None else entry.value
        batch = len(image) if isinstance(image, torch.Tensor | np.ndarray) else 1
        self._leave_shared_stream()
        self._update(out, seed=self._draw_seeds(batch))
        return out

    def _excluded(self, answer: Any, image: Any) -> list[bool]:
        answers = np.asarray(torch.as_tensor(answer).cpu(), dtype=bool)
        if answers.ndim == 0:
            return [not bool(answers)] * len(image)
        return (~answers.ravel()).tolist()


@keywords_of(BatchSynthesizeTumord)
class PrepareBatchTumorSynth(PrepareBatch):
    """The ``prepare_batch`` of a MONAI trainer, which adds tumours on the trainer's device.

    The evaluator keeps its own ``prepare_batch`` and sees the scans without synthetic tumours.

    Args:
        keys: the key of the CT (B, 1, X, Y, Z), one.
        label_key: the key of the label that gets the tumour.
        prepare_batch: makes the engine's input of the batch with tumours. The default returns
            (image, label) of the keys.
        **kwargs: the other arguments of `BatchSynthesizeTumord`.

    Examples:
        >>> prepare = PrepareBatchTumorSynth("image", "label", prob=0.5, organ_labels=1)
        >>> SupervisedTrainer(..., prepare_batch=prepare)
    """

    def __init__(
        self,
        keys: Hashable = "image",
        label_key: Hashable = "label",
        *args: Any,
        prepare_batch: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.synthesize = BatchSynthesizeTumord(keys, label_key, *args, **kwargs)
        self.prepare_batch = check_callable("prepare_batch", prepare_batch)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last batch."""
        return self.synthesize.report

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> PrepareBatchTumorSynth:
        """Set the state that all draws come from; return this object."""
        self.synthesize.set_random_state(seed, state)
        return self

    @untraced
    def __call__(
        self,
        batchdata: dict[Any, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the engine's input: the batch on the device, with tumours."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, non_blocking=non_blocking, **kwargs)

        batch = self.synthesize(map_tensors(batchdata, move))
        if self.prepare_batch is not None:
            return self.prepare_batch(batch, device, non_blocking, **kwargs)
        places = (self.synthesize.keys[0], self.synthesize.label_key)
        entries = [find_entry(batch, place) for place in places]
        # with allow_missing_keys an entry may be absent, as for a dictionary's own error
        return tuple(
            batch[p] if e is None else e.value for p, e in zip(places, entries, strict=True)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.synthesize!r})"


RandSynthesizeTumorD = RandSynthesizeTumorDict = RandSynthesizeTumord
BatchSynthesizeTumorD = BatchSynthesizeTumorDict = BatchSynthesizeTumord


def _copy_entries(data: Any) -> dict[Hashable, Any]:
    """Return a new dictionary of the same entries."""
    if not isinstance(data, Mapping):
        raise TypeError(
            f"data must be a dictionary, got {type(data).__name__}; for image and label as "
            "arguments use RandSynthesizeTumor, without the d; for a list of samples use Compose"
        )
    return dict(data)


def _format_call(transform: Any, *arguments: str) -> str:
    return f"{type(transform).__name__}({', '.join(part for part in arguments if part)})"
