"""What all frameworks' adapters share: the core for any real dtype, and for a separate organ map.

An adapter takes the user's container apart and puts it together as it came. It holds no science.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tumorsynth.arguments import check_keywords
from tumorsynth.pipeline.place import PlacedSample, skip_sample
from tumorsynth.pipeline.requests import skip_records
from tumorsynth.pipeline.validation import (
    check_grid,
    check_input,
    check_tumor_label,
    check_whole,
    plain,
)
from tumorsynth.placement.arguments import check_organ_labels
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.types import Skip, SkipCode
from tumorsynth.synthesizer import SynthesizeTumor

# The core's keyword arguments with their defaults, but for p: a framework has its own word for it.
SETTINGS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(SynthesizeTumor).parameters.items()
    if name != "p"
}
_WIDE = [getattr(torch, name, None) for name in ("uint16", "uint32", "uint64")]  # torch >= 2.3


class Adapter:
    """The core, called with what a framework's container holds.

    Images of an integer dtype (HU as read from a file) are computed in float32; the changed voxels
    are rounded back, clipped to the dtype. Labels keep their dtype, whichever it is.

    separate_organ: every call brings a map of its own for the organ. ``organ_labels`` are values of
        that map and ``tumor_label`` is one of the label, so they may be equal. The map stays as it
        is; the label gets the tumour, whatever value lies there.
    healthy_only: leave samples alone whose label holds a tumour already (the paper synthesises on
        healthy scans alone).
    settings: the core's keyword arguments; ``adapter.synth.p`` stays 1, unless the framework leaves
        the decision to the core.
    """

    def __init__(
        self, separate_organ: bool = False, healthy_only: bool = False, **settings: Any
    ) -> None:
        check_keywords(self, settings, SETTINGS)
        self.given = {**settings, **({"healthy_only": True} if healthy_only else {})}
        self.separate_organ = separate_organ
        self.healthy_only = bool(healthy_only)
        self.tumor_label: int = settings.get("tumor_label", SETTINGS["tumor_label"])
        if separate_organ:
            if settings.get("bulge"):
                raise ValueError(
                    "bulge must be off where the organ is in a map of its own, which does not tell "
                    f"what lies around it, got {settings['bulge']!r}; put the organ into the label"
                )
            if settings.get("mass_effect"):
                raise ValueError(
                    "mass_effect must be 0 where the organ is in a map of its own, which would not "
                    f"move with the label, got {settings['mass_effect']!r}; put the organ into the "
                    "label"
                )
            self.tumor_label = check_tumor_label(self.tumor_label, ())
            organs = check_organ_labels(settings.get("organ_labels", (1,)))
            # in the map handed to the core, which is made for the call, a value that is free
            settings = {**settings, "organ_labels": organs, "tumor_label": max(organs) + 1}
        self.synth = SynthesizeTumor(**settings)

    def __repr__(self) -> str:
        return f"Adapter({self.described()})"

    def described(self) -> str:
        """The settings that were given, for a framework's repr: name=value, ..."""
        held = self.synth.handle.source
        given = {
            name: held if name == "generator" and held is not None else value
            for name, value in self.given.items()
        }
        return ", ".join(f"{name}={value!r}" for name, value in given.items())

    @property
    def report(self) -> list[dict[str, Any]]:
        return self.synth.report

    def __call__(
        self,
        image: Tensor,
        label: Tensor,
        organ: Tensor | None = None,
        leave: Sequence[bool] | None = None,
        names: Sequence[Any] = ("image", "label", "organ"),
        **call: Any,
    ) -> tuple[Tensor, Tensor]:
        """A new (image, label), of the types, dtypes and metadata of the old.

        image, label, organ: (B, 1, X, Y, Z) or (1, X, Y, Z). leave: for each sample, whether the
        framework wants it left alone. names: what the user calls the three. call: what the core's
        forward takes (spacing, affine, seed, params). Errors are the core's; RuntimeError on CUDA
        in a forked worker process.
        """
        if organ is None and self.separate_organ:
            raise ValueError(
                "organ must be given: this synthesis was made for a separate organ map"
            )
        if call.get("spacing") is None:  # else the affines do not matter
            check_grid(names, [getattr(x, "affine", None) for x in (image, label, organ)])
        work_image = image.float() if _holds_integers(image) else image
        if organ is not None or self.healthy_only or _is_wide(label):
            check_input(work_image, label, self.tumor_label)
        left = self._left_alone(image, label, leave)
        if left and len(left) == _batch(image):  # nothing to check, nothing to load
            skipped = [PlacedSample(skip_sample(left[b]), []) for b in sorted(left)]
            self.synth.report = [record.to_dict() for record in skip_records(skipped)]
            self.synth.params = [sample.to_params() for sample in skipped]
            return image, label
        if organ is not None:
            work_label = self._organ_and_tumor(label, organ)
        elif _is_wide(label):
            work_label = label.to(torch.int64)
        else:
            work_label = label

        new_image, new_label, self.synth.report, self.synth.params = self._run(
            work_image, work_label, exclude=left, **call
        )

        if new_image is work_image:  # the core's way of saying that nothing was to be done
            return image, label
        if work_image is not image:
            changed = plain(new_image) != plain(work_image)
            new_image = _with(image, changed, _rounded(plain(new_image), image.dtype))
        if work_label is not label:
            changed = plain(new_label) != plain(work_label)
            if organ is None:
                value = plain(new_label).to(label.dtype)
            else:
                value = torch.tensor(self.tumor_label, device=label.device).to(label.dtype)
            new_label = _with(label, changed, value)
        return new_image, new_label

    def _left_alone(
        self, image: Tensor, label: Tensor, leave: Sequence[bool] | None
    ) -> dict[int, Skip]:
        """Return which samples are not to be changed, and why."""
        left: dict[int, Skip] = {}
        if self.healthy_only:
            labels = plain(label) if label.ndim == 5 else plain(label)[None]
            ill = (labels == self.tumor_label).flatten(1).any(1).tolist()
            skip = Skip(SkipCode.HAS_TUMOR, "left alone (holds a tumour already)")
            left = {b: skip for b, has_tumor in enumerate(ill) if has_tumor}
        if leave is not None:
            if len(leave) != _batch(image):
                raise ValueError(
                    f"there must be one answer for each of the {_batch(image)} samples, "
                    f"got {len(leave)}; give one bool per sample of the batch"
                )
            skip = Skip(SkipCode.EXCLUDED, "left alone (as asked)")
            left |= {b: skip for b, excluded in enumerate(leave) if excluded}
        return left

    def _run(self, image: Tensor, label: Tensor, **call: Any) -> tuple[Any, ...]:
        try:
            return self.synth.synthesize(image, label, **call)
        except RuntimeError as error:
            if "forked subprocess" not in str(error):  # torch's own words
                raise
            raise RuntimeError(
                "the synthesis cannot use CUDA in a forked worker process; synthesise on the "
                "batch in the training process (BatchSynthesizeTumord, TumorSynthCallback, or "
                "ts.SynthesizeTumor itself), use MONAI's ThreadDataLoader, or start the workers "
                "with DataLoader(..., multiprocessing_context='spawn')"
            ) from error

    def _organ_and_tumor(self, label: Tensor, organ: Tensor) -> Tensor:
        """One map for the core: the organ map's organs, and tumours that the label has already."""
        if not isinstance(organ, Tensor) or organ.shape != label.shape:
            found = tuple(organ.shape) if isinstance(organ, Tensor) else type(organ).__name__
            raise ValueError(
                f"the organ map must have the label's shape {tuple(label.shape)}, got {found}; "
                "resample it onto the label's grid"
            )
        if organ.device != label.device:
            raise ValueError(
                f"organ map and label must be on one device, got {organ.device} and {label.device}"
            )
        check_whole("label", label)
        check_whole("the organ map", organ)
        there, organ = plain(label), plain(organ)
        both = torch.zeros(organ.shape, dtype=torch.int64, device=organ.device)
        for value in self.synth.organ_labels:
            both[is_organ(organ, (value,))] = value
        both[there == self.tumor_label] = self.synth.tumor_label
        return both


def _batch(image: Tensor) -> int:
    return len(image) if image.ndim == 5 else 1


def _is_wide(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in _WIDE


def _holds_integers(x: object) -> bool:
    if not isinstance(x, Tensor):
        return False
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in an integer dtype: to the nearest, clipped to what the dtype holds."""
    limits = torch.iinfo(dtype)
    return x.round().clamp(limits.min, limits.max).to(dtype)


def _with(x: Tensor, changed: Tensor, value: Tensor) -> Tensor:
    """A clone of x, subclass and metadata included, that holds ``value`` where ``changed``."""
    out = x.clone()
    held = plain(out)
    held.copy_(torch.where(changed, value, held))
    return out
