"""Tumour synthesis as MONAI transforms.

    Compose([
        LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"]),
        Orientationd(["image", "label"], "RAS"), Spacingd(["image", "label"], (1, 1, 1), ...),
        RandSynthesizeTumord("image", label_key="label", prob=0.5),     # on HU, so before ...
        ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),      # ... the scaling,
        ...                                                 # or after it with intensity=Scaled()
    ])

Everything is drawn from ``self.R``, never from the global generators: ``set_random_state``
reproduces. In worker processes each worker draws from a stream of its own, in each epoch anew, that
depends on the loader's seed as well: with MONAI's DataLoader ``torch.manual_seed`` (or
``set_determinism``) reproduces, with torch's the two together. In a distributed training each rank
makes its own tumours, also where all of them set one seed.
Nothing enters ``applied_operations``: a later ``inverse`` works as without the synthesis.
"""

from __future__ import annotations

import os
import warnings
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

from tumorsynth.adapter import SETTINGS, Adapter
from tumorsynth.arguments import check_keywords, check_probability

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

_SEEDS = 2**63 - 1


class RandSynthesizeTumor(RandomizableTransform):
    """Adds synthetic tumours to a CT (1, X, Y, Z) and its label; the inputs are left as they are.

    Called as ``transform(img, label)``; numpy arrays, tensors and MetaTensors come back as the same
    type, dtype, device, affine and metadata. Integer images get rounded values.

    prob: probability of changing a sample.
    spacing: mm per voxel along X, Y, Z; by default from the affine of the MetaTensor (which gives
        the orientation as well) that image or label is, and 1 mm, with a warning, where neither
        is one.
    separate_organ: ``transform(img, label, organ)``; ``organ_labels`` are then values of organ.
    settings: keyword arguments of :class:`tumorsynth.SynthesizeTumor`: generator, organ_labels,
        tumor_label, count, size_mm, contrast_hu, intensity, blend, sigma_mm, gap_mm, merge, device,
        gate, mass_effect, shapes, bulge; and healthy_only=True, which spares samples whose
        label holds a tumour already.

    ``transform.report`` says what the last call in this process did.
    """

    backend = [TransformBackends.TORCH, TransformBackends.NUMPY]

    def __init__(
        self,
        prob: float = 1.0,
        *,
        spacing: Any = None,
        separate_organ: bool = False,
        **settings: Any,
    ) -> None:
        RandomizableTransform.__init__(self, check_probability("prob", prob))
        check_keywords(self, settings, SETTINGS)
        self.adapter = Adapter(separate_organ, **settings)
        self.spacing = spacing
        self._stream: int | None = None  # the worker whose own random state R is
        self._warned = False  # of voxels whose size nothing tells

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last call."""
        return self.adapter.report

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandSynthesizeTumor:
        super().set_random_state(seed, state)
        worker = get_worker_info()
        self._stream = None if worker is None else worker.seed
        return self

    def randomize(self, data: Any = None) -> None:
        """Whether to act, and the one seed that decides how."""
        self._decide()

    def _decide(self) -> tuple[bool, int]:
        """Draw both; a call goes by what it got itself, since threads may share the transform."""
        self._leave_shared_stream()
        act = bool(self.R.rand() < self.prob)
        (seed,) = self._draw(1)
        self._do_transform = act  # where MONAI's users look
        self.adapter.synth.report = []  # what an earlier call did is no report of this one
        return act, seed

    def _draw(self, n: int) -> list[int]:
        """n seeds from R, of which each rank of a distributed training makes its own."""
        seeds = self.R.randint(_SEEDS, size=n, dtype=np.int64)
        rank = _rank()
        if rank:
            own = np.random.RandomState([*seeds.view(np.uint32), rank])
            seeds = own.randint(_SEEDS, size=n, dtype=np.int64)
        return seeds.tolist()

    def _leave_shared_stream(self) -> None:
        """Give each worker process its own draws, in each epoch anew.

        torch's workers start as copies, R included. MONAI's DataLoader gives each one another
        state; torch's does not, so it is done here from the seed that torch gave the worker.
        """
        worker = get_worker_info()
        if worker is not None and self._stream != worker.seed:
            own = [*self.R.randint(2**32, size=4, dtype=np.uint32), worker.seed % 2**32]
            self.set_random_state(state=np.random.RandomState(own))

    def __call__(self, img: Any, label: Any, organ: Any = None) -> tuple[Any, Any]:
        act, seed = self._decide()
        if not act:
            return img, label
        return self._apply(img, label, organ, seed, names=("img", "label", "organ"))

    def __repr__(self) -> str:
        return _called(self, f"prob={self.prob:g}", self.adapter.described())

    def _apply(
        self,
        img: Any,
        label: Any,
        organ: Any,
        seed: int | list[int],
        leave: Sequence[bool] | None = None,
        names: Sequence[Hashable] = (),
    ) -> tuple[Any, Any]:
        image, old_label = _tensor(img), _tensor(label)
        # an image without geometry of its own lies on the label's grid, as it must
        apart = self.spacing is None and not hasattr(image, "affine")
        affine = getattr(old_label, "affine", None) if apart else None
        if apart and affine is None:
            self._warn_of_1_mm(names)
        new_image, new_label = self.adapter(
            image,
            old_label,
            _tensor(organ),
            leave,
            names,
            spacing=self.spacing,
            affine=affine,
            seed=seed,
        )
        return (
            img if new_image is image else _like(img, new_image),
            label if new_label is old_label else _like(label, new_label),
        )

    def _warn_of_1_mm(self, names: Sequence[Hashable]) -> None:
        """Once: a cache, or track_meta=False, may have dropped the affine without a word."""
        worker = get_worker_info()
        if self._warned or (worker is not None and worker.id):  # of several workers one says it
            return
        self._warned = True
        shown = " and ".join(repr(name) for name in names[:2])
        warnings.warn(
            f"{shown} have no affine, so that their voxels are taken as 1 mm; pass "
            f"spacing=(dx, dy, dz) to {type(self).__name__} (spacing=1 where it is 1 mm), or keep "
            "MetaTensors: a PersistentDataset drops their affine unless it has track_meta=True, "
            "weights_only=False",
            stacklevel=2,
        )


class RandSynthesizeTumord(RandSynthesizeTumor, MapTransform):
    """:class:`RandSynthesizeTumor` for a dictionary.

    keys: the key of the CT (1, X, Y, Z), one.
    label_key: the key of the label that gets the tumour.
    organ_key: the key of a separate map of organs, of which ``organ_labels`` are then values;
        by default the label marks the organ.
    prob, spacing, settings: as for :class:`RandSynthesizeTumor`.
    allow_missing_keys: a dictionary that lacks one of the keys is left as it is, instead of a
        KeyError.
    when: a function of the dictionary that says whether the sample may be changed, for example
        ``lambda data: data["healthy"]``; a named function where the transform is pickled.
    """

    def __init__(
        self,
        keys: Hashable,
        label_key: Hashable = "label",
        organ_key: Hashable | None = None,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
        *,
        spacing: Any = None,
        when: Callable[[Mapping[Hashable, Any]], Any] | None = None,
        **settings: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(
                f"keys must be the key of one image, got {self.keys}; "
                "name the label with label_key=..."
            )
        super().__init__(prob, spacing=spacing, separate_organ=organ_key is not None, **settings)
        for name, key in (("label_key", label_key), ("organ_key", organ_key)):
            if isinstance(key, list | tuple | set) or key == self.keys[0]:
                raise ValueError(f"{name} must be one key, another than the image's, got {key!r}")
        if organ_key is not None and organ_key == label_key:
            raise ValueError(
                f"organ_key must be another key than label_key, got {organ_key!r} for both; leave "
                "organ_key out where the label itself marks the organ"
            )
        self.label_key = label_key
        self.organ_key = organ_key
        self.when = when

    def __repr__(self) -> str:
        return _called(
            self,
            f"{self.keys[0]!r}, {self.label_key!r}",
            "" if self.organ_key is None else f"organ_key={self.organ_key!r}",
            f"prob={self.prob:g}",
            "" if self.when is None else f"when={self.when!r}",
            self.adapter.described(),
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:  # type: ignore[override]
        out = _entries(data)
        act, seed = self._decide()
        if act:
            self._update(out, seed)
        return out

    def _update(self, out: dict[Hashable, Any], seed: int | list[int]) -> None:
        wanted = [self.keys[0], self.label_key]
        wanted += [] if self.organ_key is None else [self.organ_key]
        missing = [key for key in wanted if key not in out]
        if missing and not self.allow_missing_keys:
            raise KeyError(
                f"{type(self).__name__} misses {missing} in the data, which has {list(out)}; "
                "name the keys it has, or pass allow_missing_keys=True"
            )
        if not missing:
            image, label, *organ = (out[key] for key in wanted)
            leave = None if self.when is None else self._leave(out, image)
            made = self._apply(image, label, organ[0] if organ else None, seed, leave, wanted)
            out[self.keys[0]], out[self.label_key] = made

    def _leave(self, data: Mapping[Hashable, Any], image: Any) -> list[bool]:
        assert self.when is not None
        return [not bool(self.when(data))]


class BatchSynthesizeTumord(RandSynthesizeTumord):
    """:class:`RandSynthesizeTumord` for a collated batch (B, 1, X, Y, Z), on the batch's device.

    prob holds for each sample of the batch, and ``when`` answers for each: with B bools, or one
    for all. To be called on what a DataLoader yields::

        for batch in loader:
            batch = synthesize({k: v.to(device) for k, v in batch.items()})
    """

    def __init__(self, keys: Hashable, *args: Any, **kwargs: Any) -> None:
        super().__init__(keys, *args, **kwargs)
        self.adapter.synth.p = float(self.prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:  # type: ignore[override]
        out = _entries(data)
        image = out.get(self.keys[0])
        batch = len(image) if isinstance(image, torch.Tensor | np.ndarray) else 1
        self._leave_shared_stream()
        self._update(out, self._draw(batch))
        return out

    def _leave(self, data: Mapping[Hashable, Any], image: Any) -> list[bool]:
        assert self.when is not None
        answers = np.asarray(torch.as_tensor(self.when(data)).cpu(), dtype=bool)
        if answers.ndim == 0:
            return [not bool(answers)] * len(image)
        return (~answers.ravel()).tolist()


class PrepareBatchTumorSynth(PrepareBatch):
    """The ``prepare_batch`` of a MONAI trainer, with tumours on the batch on the trainer's device::

        SupervisedTrainer(..., prepare_batch=PrepareBatchTumorSynth("image", "label", prob=0.5))

    The arguments are those of :class:`BatchSynthesizeTumord`. The evaluator keeps its own
    ``prepare_batch`` and sees the scans as they are.

    prepare_batch: what makes the engine's input of the batch with tumours; by default
        ``(image, label)`` of the keys.
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
        self.prepare_batch = prepare_batch

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last batch."""
        return self.synthesize.report

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> PrepareBatchTumorSynth:
        self.synthesize.set_random_state(seed, state)
        return self

    def __call__(
        self,
        batchdata: dict[Any, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> Any:
        there = {
            key: value.to(device=device, non_blocking=non_blocking, **kwargs)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in batchdata.items()
        }
        batch = self.synthesize(there)
        if self.prepare_batch is not None:
            return self.prepare_batch(batch, device, non_blocking, **kwargs)
        return batch[self.synthesize.keys[0]], batch[self.synthesize.label_key]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.synthesize!r})"


RandSynthesizeTumorD = RandSynthesizeTumorDict = RandSynthesizeTumord
BatchSynthesizeTumorD = BatchSynthesizeTumorDict = BatchSynthesizeTumord


def _rank() -> int:
    """This process's rank in a distributed training, 0 where there is none.

    A worker process knows it when forked from one that has joined the group, or from torchrun.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))


def _entries(data: Any) -> dict[Hashable, Any]:
    """A new dictionary of the same entries."""
    if not isinstance(data, Mapping):
        raise TypeError(
            f"data must be a dictionary, got {type(data).__name__}; RandSynthesizeTumor, without "
            "the d, is called with image and label, and Compose takes a list apart"
        )
    return dict(data)


def _called(transform: Any, *arguments: str) -> str:
    return f"{type(transform).__name__}({', '.join(part for part in arguments if part)})"


def _tensor(x: Any) -> Any:
    """A numpy array as a tensor of the same values; anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    native = x.astype(x.dtype.newbyteorder("="), copy=False)
    # torch takes neither negative strides, which numpy lets pass along axes of one voxel, nor
    # memory that must not be written
    if min(native.strides, default=0) < 0:
        native = native.copy()
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def _like(old: Any, new: torch.Tensor) -> Any:
    return new.numpy().astype(old.dtype, copy=False) if isinstance(old, np.ndarray) else new
