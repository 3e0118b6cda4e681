"""Tumour synthesis as a Lightning callback: on the batch, on its device, in training alone.

    trainer = L.Trainer(callbacks=[TumorSynthCallback(organ_labels=1, tumor_label=2, p=0.5)])

The module and its data stay as they are. Every batch that ``training_step`` gets has been through
:class:`tumorsynth.SynthesizeTumor`; validation, test and prediction see the scans as they are. The
generator belongs to the callback, not to the module: no weight of it enters a checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, MutableMapping, MutableSequence, Sequence
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

from tumorsynth.adapter import SETTINGS, Adapter
from tumorsynth.arguments import check_keywords, check_probability
from tumorsynth.random_streams import per_sample_seeds

__all__ = ["TumorSynthCallback"]

_SEEDS = 2**63 - 1


class TumorSynthCallback(Callback):
    """Adds synthetic tumours to each training batch, on the device that it is on.

    image, label: where they are in the batch: keys of a dictionary (say "image", "label"), or
        positions in a list; by default those keys, or 0 and 1. Shapes (B, 1, X, Y, Z).
    organ: where a separate map of organs is, of which ``organ_labels`` are then values.
    p: probability per sample.
    spacing: mm per voxel along X, Y, Z, for all samples; or where in the batch it is, (B, 3). By
        default a MetaTensor's affine is taken, else 1 mm.
    seed: decides, with the epoch, the batch's index and the rank, every draw. By default drawn from
        torch's global generator when training starts (``L.seed_everything`` reproduces), and kept
        in the checkpoint: a resumed run goes on as it would have.
    settings: keyword arguments of :class:`tumorsynth.SynthesizeTumor` (generator, organ_labels,
        tumor_label, count, size_mm, contrast_hu, intensity, blend, sigma_mm, gap_mm, merge,
        device, gate, mass_effect, shapes, bulge); and healthy_only=True, which spares samples that
        hold a tumour already.

    The batch is changed by replacing its entries, never its tensors; a tuple, which cannot be
    changed, is refused. ``callback.report`` says what was done to the last batch.
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
        check_keywords(self, settings, SETTINGS)
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
        if self.seed is None:  # one for all ranks, since the checkpoint keeps one
            self.seed = trainer.strategy.broadcast(int(torch.randint(_SEEDS, ())))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        image_at, label_at = self._where(batch)
        image, label = batch[image_at], batch[label_at]
        organ = None if self.organ is None else self._entry(batch, self.organ, "organ")
        seeds = _seeds(
            [self.seed or 0, trainer.current_epoch, batch_idx, trainer.global_rank], len(image)
        )
        batch[image_at], batch[label_at] = self.adapter(
            image,
            label,
            organ,
            names=(image_at, label_at, self.organ),
            spacing=self._spacing_of(batch),
            seed=seeds,
        )

    @property
    def state_key(self) -> str:
        """Tells several callbacks of one trainer apart in the checkpoint, by all that was given."""
        places = (self.image, self.label, self.organ, self.spacing, self._own_seed)
        key = f"{type(self).__qualname__}{places}: {self!r}"
        return re.sub(r" at 0x[0-9a-f]+", "", key)  # of objects, elsewhere in the next process

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]

    # -- the batch ---------------------------------------------------------------------------------

    def _where(self, batch: Any) -> tuple[Any, Any]:
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
        self._entry(batch, image, "image"), self._entry(batch, label, "label")
        return image, label

    def _entry(self, batch: Any, where: Any, argument: str) -> Any:
        try:
            return batch[where]
        except (KeyError, IndexError, TypeError) as error:
            there = list(batch) if isinstance(batch, MutableMapping) else f"{len(batch)} entries"
            raise ValueError(
                f"the batch has no {where!r}, it has {there}; say where it is with {argument}=... "
                "of TumorSynthCallback"
            ) from error

    def _spacing_of(self, batch: Any) -> Any:
        by_place = isinstance(self.spacing, str) or (
            isinstance(self.spacing, int) and isinstance(batch, MutableSequence)
        )
        return self._entry(batch, self.spacing, "spacing") if by_place else self.spacing


def _seeds(parts: Sequence[int], batch: int) -> list[int]:
    """One seed per sample, from what tells this step from all others."""
    rng = torch.Generator()
    rng.manual_seed(_mixed(parts))
    return torch.randint(_SEEDS, (batch,), generator=rng, device="cpu").tolist()


def _mixed(parts: Sequence[int]) -> int:
    """Whole numbers as one of 63 bits that depends on each of them and on their order."""
    digest = hashlib.sha256(repr(tuple(int(p) for p in parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
