"""Checks of what a call gets; each error says the rule, the value and the fix."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tumorsynth.label_values import ROUNDING, describe_fraction
from tumorsynth.pipeline.params_grid import ParamsGrid
from tumorsynth.placement.arguments import MAX_COUNT
from tumorsynth.placement.organ import holds
from tumorsynth.placement.types import SkipCode, TumorParams

REJECTING_CODES = (SkipCode.GATE, SkipCode.FAINT, SkipCode.TISSUE)  # of tumours that were placed
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes of an image


def plain(x: Tensor) -> Tensor:
    """Return a tensor of the same memory without the subclass (MetaTensor)."""
    return x.as_subclass(Tensor) if type(x) is not Tensor else x


def check_input(image: Tensor, label: Tensor, tumor_label: int) -> None:
    """Check type, shape, dtype and device of an image and its label.

    Raises:
        ValueError: for shapes or devices that cannot be or do not fit.
        TypeError: for anything but dense tensors of a usable dtype.
    """
    for name, value in (("image", image), ("label", label)):
        if not isinstance(value, Tensor):
            fix = _to_tensor(name, value)
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}; {fix}")
        if value.is_nested or value.layout != torch.strided or value.is_quantized:
            raise TypeError(
                f"{name} must be a plain dense tensor, got a nested, sparse or quantised one; "
                "convert it, for example with to_dense()"
            )
    if image.ndim not in (4, 5) or image.shape[-4] != 1 or 0 in image.shape:
        raise ValueError(
            "image must be (B, 1, X, Y, Z) or (1, X, Y, Z) with at least one voxel, got "
            f"{tuple(image.shape)}; {_to_shape(tuple(image.shape))}"
        )
    if label.shape != image.shape:
        fix = "resample it onto the image's grid"
        if label.ndim == image.ndim and label.shape[-3:] == image.shape[-3:]:
            fix = (
                "make one map of its channels: a one-hot label with label.argmax(-4, keepdim=True)"
            )
        elif label.ndim == image.ndim - 1:
            fix = "give it a channel with label.unsqueeze(-4)"
        raise ValueError(
            f"label must have the image's shape {tuple(image.shape)}, got {tuple(label.shape)}; "
            f"{fix}"
        )
    if image.dtype not in FLOATS:
        raise TypeError(
            f"image must be floating point, got {image.dtype}; convert it with image.float()"
        )
    if label.is_complex() or (label.is_floating_point() and label.dtype not in FLOATS):
        raise TypeError(
            f"label must hold whole numbers, got {label.dtype}; convert it with label.long()"
        )
    if label.device != image.device:
        raise ValueError(
            f"image and label must be on one device, got {image.device} and {label.device}"
        )
    if image.device.type == "meta":
        raise ValueError("image and label must hold voxels, but on the meta device they have none")
    if label.dtype == torch.bool or not holds(label.dtype, tumor_label):
        raise ValueError(
            f"tumor_label {tumor_label} does not fit the label's dtype {label.dtype}; "
            "convert the label, for example with label.to(torch.int16)"
        )


def check_first_phase(first_phase: Any, image: Tensor) -> None:
    """Check the image of the phase that replayed tumours were placed in.

    Raises:
        ValueError: unless it lies on the image's grid.
        TypeError: unless it is a floating-point tensor.
    """
    if not isinstance(first_phase, Tensor) or first_phase.dtype not in FLOATS:
        found = getattr(first_phase, "dtype", type(first_phase).__name__)
        raise TypeError(
            f"first_phase must be a floating-point tensor like the image, got {found}; pass the "
            "image that params were drawn in"
        )
    if first_phase.shape != image.shape or first_phase.device != image.device:
        raise ValueError(
            f"first_phase must have the image's shape {tuple(image.shape)} and device "
            f"{image.device}, got {tuple(first_phase.shape)} on {first_phase.device}; register one "
            "phase to the other first"
        )


def check_same_voxels(params: Sequence[Mapping[str, Any]], has_tissue_range: bool) -> None:
    """Raise ValueError if tumours of params may take other voxels in another phase.

    Args:
        params: of the first phase.
        has_tissue_range: whether the generator's card says where it may paint.
    """
    tumors = [TumorParams.from_dict(values) for entry in params for values in entry["tumors"]]
    reasons = {
        "the generator's tissue_range": has_tissue_range and bool(tumors),
        "bulge": any(tumor.bulge > 0 for tumor in tumors),
        "mass_effect": any(tumor.displaces for tumor in tumors),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"first_phase must be given with contrast_hu, as the tumours' voxels depend on the "
            f"image ({', '.join(found)}), got None; pass the image that params were drawn in, "
            "which may be this one"
        )


def as_whole(name: str, label: Tensor) -> Tensor:
    """Return a label map of whole numbers: the map itself, or a rounded copy of its type.

    Values within ROUNDING of a whole number are rounded: they were quantised in a file.

    Raises:
        ValueError: for a map with other fractions, which interpolation has put on every edge.
    """
    if not label.is_floating_point():
        return label
    is_whole = True
    for part in plain(label).split(16, dim=-3):  # parts that fit into a cache take half the time
        whole = part.round()
        if bool((part != whole).any()):
            is_whole = False
            wrong = ~((part - whole).abs() <= ROUNDING)
            if bool(wrong.any()):
                raise ValueError(
                    f"{name} must hold whole numbers, got "
                    f"{describe_fraction(float(part[wrong][0]))}; resample labels with "
                    "mode='nearest'"
                )
    if is_whole:
        return label
    rounded = label.clone()
    plain(rounded).round_().add_(0)  # -0.0 becomes 0.0
    return rounded


def _to_tensor(name: str, value: object) -> str:
    """Return the fix for an image or a label that is no tensor."""
    several = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(one, str | os.PathLike) for one in several):
        return f"load the file first, with nibabel or the framework's reader, and pass its {name}"
    if isinstance(value, np.ndarray):
        return f"convert it with torch.as_tensor({name})"
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
        return f"make a batch of it with torch.stack({name}), or pass one at a time"
    if isinstance(value, list | tuple):
        return f"convert it with torch.as_tensor(np.asarray({name}))"
    if isinstance(value, Mapping):
        return f"pass its entry of the {name}"
    return "pass a tensor of its voxels"


def _to_shape(shape: tuple[int, ...]) -> str:
    """Return the fix for an image of the wrong shape."""
    if 0 in shape:
        return "an axis has no voxel: look at the crop in front"
    if len(shape) < 3 or (len(shape) in (3, 4) and shape[-3] == 1):
        return "a tumour is three-dimensional: pass the volume that the slice is of"
    if len(shape) == 3:
        return "add the channel with image[None]"
    if len(shape) == 4:
        return (
            f"if these are {shape[0]} scans, add the channel with image[:, None]; if they are "
            "channels of one, pass the CT's alone, image[:1]"
        )
    if len(shape) == 5:
        return "pass the CT's channel alone, image[:, :1]"
    return "reshape it"


def is_record(record: Any) -> bool:
    """Return whether this is an entry of ``synth.params``."""
    return isinstance(record, dict) and {"applied", "tumors"} <= record.keys()


def check_params(params: Any, batch: int, seed: Any = None) -> None:
    """Raise ValueError unless this is ``synth.params`` of an earlier call.

    Args:
        params: to be checked.
        batch: number of samples, each of which has an entry.
        seed: the call's, which must be None: params hold the seeds of what they repeat.
    """
    if seed is not None:
        raise ValueError(
            f"seed must not be given together with params, which repeat an earlier call with its "
            f"own seeds, got seed={seed!r}; leave one of them out"
        )
    is_sequence = isinstance(params, Sequence) and not isinstance(params, str)
    wrong = [record for record in params if not is_record(record)] if is_sequence else []
    if not is_sequence or len(params) != batch or wrong:
        found = str(len(params)) if is_sequence else type(params).__name__
        found = f"{wrong[0]!r:.60} among them" if wrong else found
        raise ValueError(
            f"params must hold one record for each of the {batch} samples, got {found}; "
            "pass synth.params of an earlier call with the same batch"
        )
    for record in params:
        _check_record(record)


def _check_record(record: dict[str, Any]) -> None:
    """Raise ValueError for an entry of params whose tumours cannot be made."""
    tumors, rejected = record["tumors"], record.get("rejected", ())
    if not isinstance(tumors, list | tuple) or len(tumors) > MAX_COUNT:
        raise ValueError(
            f"a record's tumors must be a list of at most {MAX_COUNT}, got "
            f"{len(tumors) if isinstance(tumors, list | tuple) else tumors!r}; "
            "pass synth.params of an earlier call"
        )
    codes, code = [code.value for code in SkipCode], record.get("code")
    if code is not None and code not in codes:
        raise ValueError(
            f"a record's code must be one of {', '.join(codes)}, got {code!r}; pass synth.params "
            "of an earlier call"
        )
    for values in tumors:
        TumorParams.from_dict(values)
    ParamsGrid.of_record(record)
    try:
        valid = all(
            0 <= int(number) < len(tumors)
            and isinstance(reason, str)
            and reason
            and (not code or len(code) == 1 and code[0] in REJECTING_CODES)
            for number, reason, *code in rejected
        )
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise ValueError(
            f"a record's rejected must be pairs of a tumour's number and a reason, perhaps with a "
            f"code, got "
            f"{rejected!r}; pass synth.params of an earlier call"
        )
