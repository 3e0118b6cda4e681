"""Tumour synthesis as a Lightning callback: on each training batch, on its device.

    trainer = L.Trainer(callbacks=[TumorSynthCallback(organ_labels=1, tumor_label=2, p=0.5)])

The module and its data need no change. ``training_step`` gets batches with tumours; validation,
test and prediction see the scans without them. The generator belongs to the callback, so that no
weight of it enters a checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable
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
from tumorsynth.arguments import check_probability, is_bool, keywords_of
from tumorsynth.batch_entries import (
    Path,
    can_replace,
    entries_of,
    find_path,
    replace_entry,
    value_at,
)
from tumorsynth.batch_parts import NAMES, find_parts, is_list, missing_entry
from tumorsynth.pipeline.frames import check_spacing
from tumorsynth.random_streams import per_sample_seeds

__all__ = ["TumorSynthCallback"]


@keywords_of(Adapter, without=["separate_organ"])
class TumorSynthCallback(Callback):
    """Adds synthetic tumours to each training batch, on the device that it is on.

    The callback replaces entries of the batch and changes no tensor. It refuses a batch that is a
    tuple, whose entries cannot be replaced. ``callback.report`` describes the last batch.

    A batch may be nested: a dictionary or list of the batches of several loaders, or of the images
    of TorchIO's ``SubjectsLoader``. Without ``loader``, every part of it that has an image and a
    label gets tumours; the entries of the report then say under "loader" which part it was.

    Args:
        image: where the CT (B, 1, X, Y, Z) is in the batch: a key of a dictionary, a position in a
            list, a field of a dataclass, or a path of these: "image.data", ("labeled", 0). The
            default is "image", or 0.
        label: likewise where the label is. The default is "label", or 1.
        organ: likewise where a separate organ map is, of which ``organ_labels`` are then values.
        loader: the name or position of the loader whose batches get tumours, where the trainer has
            several; ``image`` and ``label`` are then places in its batches.
        p: probability that a sample gets tumours.
        spacing: mm per voxel along X, Y, Z, for all samples; or where in the batch it is: (B, 3),
            as torch's ``default_collate`` makes of arrays and tensors, or three tensors (B,), as
            it makes of tuples, but in a batch of three, where these could be one a sample, too.
            The default is the affine of a MetaTensor or of TorchIO's image. Without one, voxels
            count as 1 mm; there, and where it stems from one that libraries give to plain arrays,
            the callback warns once.
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
        loader: Hashable | None = None,
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
        places = {"image": image, "label": label, "organ": organ, "loader": loader}
        for name, place in places.items():
            _check_place(name, place)
        self.image, self.label, self.organ, self.loader = image, label, organ, loader
        if not isinstance(spacing, str):
            check_spacing(spacing)
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
        """Replace the batch's image and label, in each of its parts that has them."""
        self.adapter.score_with(pl_module)
        step = (self.seed or 0, trainer.current_epoch, batch_idx, trainer.global_rank)
        report: list[dict[str, Any]] = []
        if not entries_of(batch):
            raise _not_replaceable(batch)
        where = {name: getattr(self, name) for name in NAMES}
        for path, entries, _ in find_parts(batch, where, self.loader):
            places = [path + entry.path for entry in entries.values()]
            if not all(can_replace(batch, place) for place in places[:2]):
                raise _not_replaceable(batch)
            before = [entry.with_affine() for entry in entries.values()]
            part = ".".join(map(str, path))
            after = self.adapter(
                before[0],
                before[1],
                before[2] if len(before) > 2 else None,
                names=[
                    place[0] if len(place) == 1 else ".".join(map(str, place)) for place in places
                ],
                spacing=self._find_spacing(batch, path, len(before[0])),
                seed=_sample_seeds(step, len(before[0]), part),
            )
            for place, old, new in zip(places, before, after, strict=False):
                if new is not old:
                    replace_entry(batch, place, new, in_place=True)
            report += [{"loader": part, **entry} if part else entry for entry in self.report]
        self.adapter.synth.report = report

    @property
    def state_key(self) -> str:
        """Identify this callback among several in a checkpoint, by all of its arguments."""
        places: tuple[Any, ...] = (self.image, self.label, self.organ, self.spacing, self._own_seed)
        if self.loader is not None:  # without one the key is that of earlier versions
            places += (self.loader,)
        key = f"{type(self).__qualname__}{places}: {self!r}"
        return re.sub(r" at 0x[0-9a-f]+", "", key)  # addresses change with the process

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the seed of a checkpoint."""
        self.seed = state_dict["seed"]

    # -- the batch ---------------------------------------------------------------------------------

    def _find_spacing(self, batch: Any, path: Path, samples: int) -> Any:
        """Return the spacing, which may be an entry of the part at a path, or of the batch."""
        if not isinstance(self.spacing, str | int):
            return self.spacing
        for part in (value_at(batch, path), batch):
            if isinstance(self.spacing, int) and not is_list(part):
                return self.spacing
            found = find_path(part, self.spacing)
            if found is not None:
                spacing = value_at(part, found)
                _check_entry(spacing, samples)
                return spacing
        raise missing_entry(batch, self.spacing, "spacing")


def _not_replaceable(batch: Any) -> TypeError:
    return TypeError(
        "a batch must be a dictionary or a list, whose entries can be replaced, got "
        f"{type(batch).__name__}; let collate_fn or the dataset return one of these, or call "
        "ts.SynthesizeTumor in training_step"
    )


def _check_entry(spacing: Any, samples: int) -> None:
    """Raise ValueError for three numbers in a batch of three: one size a sample is collated so."""
    if samples != 3 or not isinstance(spacing, torch.Tensor) or spacing.shape != (3,):
        return
    if bool((spacing != spacing[0]).any()):
        raise ValueError(
            "spacing must be (B, 3) in the batch, but three numbers for three samples can be "
            f"(dx, dy, dz) or one size for each sample, got {spacing!r}; let the dataset give each "
            "sample an array or tensor (dx, dy, dz)"
        )


def _check_place(argument: str, place: Any) -> None:
    """Raise ValueError unless a place may be a key, a position or a path."""
    if place == () or is_bool(place) or not isinstance(place, Hashable):
        raise ValueError(
            f"{argument} must be a key, a position or a path in the batch, got {place!r}; pass for "
            f"example {argument}='{argument}'"
        )


def _sample_seeds(step: tuple[int, ...], batch_size: int, part: str = "") -> list[int]:
    """Return one seed per sample, different for each step, order of its numbers, and part."""
    text = repr(tuple(int(number) for number in step)) + part
    digest = hashlib.sha256(text.encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randint(MAX_SEED, (batch_size,), generator=rng, device="cpu").tolist()
