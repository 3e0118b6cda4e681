"""Tumour synthesis as a Lightning callback: on each training batch, on its device.

    trainer = L.Trainer(callbacks=[TumorSynthCallback(organ_labels=1, tumor_label=2, p=0.5)])

The module and its data need no change. ``training_step`` gets batches with tumours; validation,
test and prediction see the scans without them. The generator belongs to the callback, so that no
weight of it enters a checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, MutableMapping, MutableSequence
from typing import Any

import torch

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # the same under its older name
    except ImportError as error:
        raise ImportError(
            'tumorsynth.lightning needs Lightning: pip install "tumorsynth[lightning]"'
        ) from error

from tumorsynth.adapter import MAX_SEED, Adapter
from tumorsynth.arguments import check_probability, keywords_of
from tumorsynth.random_streams import per_sample_seeds

__all__ = ["TumorSynthCallback"]


@keywords_of(Adapter, without=["separate_organ"])
class TumorSynthCallback(Callback):
    """Adds synthetic tumours to each training batch, on the device that it is on.

    The callback replaces entries of the batch and changes no tensor. It refuses a tuple, whose
    entries cannot be replaced. ``callback.report`` describes the last batch.

    Args:
        image: where the CT (B, 1, X, Y, Z) is in the batch: a key of a dictionary, or a position
            in a list. The default is "image", or 0.
        label: likewise where the label is. The default is "label", or 1.
        organ: likewise where a separate organ map is, of which ``organ_labels`` are then values.
        p: probability that a sample gets tumours.
        spacing: mm per voxel along X, Y, Z, for all samples; or where in the batch it is, (B, 3).
            The default is a MetaTensor's affine. Without one, or where it is the identity, which
            may stand for an affine that was lost, voxels count as 1 mm and the callback warns once.
        seed: decides every draw, together with the epoch, the batch's index and the rank. The
            default is drawn from torch's global generator when training starts
            (``L.seed_everything`` reproduces it). The checkpoint keeps it, so that a resumed run
            continues as it would have.
        **settings: ``healthy_only=True`` to skip samples whose label holds a tumour already, and
            the arguments of `tumorsynth.SynthesizeTumor`.

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for a value of the wrong type, or an unknown argument.

    Examples:
        >>> callback = TumorSynthCallback(organ_labels=1, tumor_label=2, p=0.5)
        >>> trainer = L.Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        image: Hashable | None = None,
        label: Hashable | None = None,
        *,
        organ: Hashable | None = None,
        p: float = 1.0,
        spacing: Any = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if seed is not None:
            (seed,) = per_sample_seeds(seed, 1)
        self.adapter = Adapter(organ is not None, **settings)
        self.adapter.synth.p = check_probability("p", p)
        self.image, self.label, self.organ = image, label, organ
        self.spacing = spacing
        self.seed = self._own_seed = seed

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last training batch."""
        return self.adapter.report

    def __repr__(self) -> str:
        given = self.adapter.described()
        p = f"p={self.adapter.synth.p:g}"
        return f"{type(self).__name__}({p}{', ' if given else ''}{given})"

    # -- Lightning's hooks -------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the seed if there is none, the same on all ranks: a checkpoint keeps one."""
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(int(torch.randint(MAX_SEED, ())))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Replace the batch's image and label."""
        image_key, label_key = self._find_keys(batch)
        image = self._entry(batch, image_key, "image")
        label = self._entry(batch, label_key, "label")
        organ = None if self.organ is None else self._entry(batch, self.organ, "organ")
        step = (self.seed or 0, trainer.current_epoch, batch_idx, trainer.global_rank)
        batch[image_key], batch[label_key] = self.adapter(
            image,
            label,
            organ,
            names=(image_key, label_key, self.organ),
            spacing=self._find_spacing(batch),
            seed=_sample_seeds(step, len(image)),
        )

    @property
    def state_key(self) -> str:
        """Identify this callback among several in a checkpoint, by all of its arguments."""
        places = (self.image, self.label, self.organ, self.spacing, self._own_seed)
        key = f"{type(self).__qualname__}{places}: {self!r}"
        return re.sub(r" at 0x[0-9a-f]+", "", key)  # addresses change with the process

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the seed of a checkpoint."""
        self.seed = state_dict["seed"]

    # -- the batch ---------------------------------------------------------------------------------

    def _find_keys(self, batch: Any) -> tuple[Any, Any]:
        """Return where image and label are in the batch."""
        if isinstance(batch, MutableMapping):
            default: tuple[Any, Any] = ("image", "label")
        elif isinstance(batch, MutableSequence):
            default = (0, 1)
        else:
            raise TypeError(
                "a batch must be a dictionary or a list, whose entries can be replaced, got "
                f"{type(batch).__name__}; let collate_fn or the dataset return one of these, or "
                "call ts.SynthesizeTumor in training_step"
            )
        image = default[0] if self.image is None else self.image
        label = default[1] if self.label is None else self.label
        return image, label

    def _entry(self, batch: Any, key: Any, argument: str) -> Any:
        """Return an entry of the batch whose place is this argument of the constructor."""
        try:
            return batch[key]
        except (KeyError, IndexError, TypeError) as error:
            held = list(batch) if isinstance(batch, MutableMapping) else f"{len(batch)} entries"
            raise ValueError(
                f"the batch has no {key!r}, it has {held}; say where it is with {argument}=... "
                "of TumorSynthCallback"
            ) from error

    def _find_spacing(self, batch: Any) -> Any:
        in_batch = isinstance(self.spacing, str) or (
            isinstance(self.spacing, int) and isinstance(batch, MutableSequence)
        )
        return self._entry(batch, self.spacing, "spacing") if in_batch else self.spacing


def _sample_seeds(step: tuple[int, ...], batch_size: int) -> list[int]:
    """Return one seed per sample, different for each step and each order of its numbers."""
    digest = hashlib.sha256(repr(tuple(int(number) for number in step)).encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randint(MAX_SEED, (batch_size,), generator=rng, device="cpu").tolist()
