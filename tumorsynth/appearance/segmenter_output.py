"""What a segmentation network returns: its errors, and the probability of tumour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("softmax", "sigmoid", "none")
SURE_BACKGROUND = 0.01  # a logit as small is rare where none is negative
ROUNDING = 1e-3  # beyond 0 and 1, of probabilities in half precision


def tumor_probability(
    output: Any, patch_size: Sequence[int], channels: Sequence[int], activation: str | None
) -> Tensor:
    """Return the probability of tumour (X, Y, Z), float32.

    Args:
        output: of the network for one patch: (1, C, X, Y, Z); or, with deep supervision, a list of
            them, of which the first of the patch's size counts, or all stacked
            (1, K, C, X, Y, Z), of which the first counts.
        patch_size: X, Y, Z.
        channels: of the tumour.
        activation: "softmax", "sigmoid", or "none" for probabilities; None for softmax, or sigmoid
            of a single channel.

    Raises:
        TypeError: for anything but tensors.
        ValueError: for another shape, too few channels, and values that cannot be.
    """
    logits = _full_resolution(output, tuple(patch_size))
    count = logits.shape[1]
    if max(channels) >= count:
        raise ValueError(
            f"tumor_channel must be a channel of the segmenter, which returns {count} (0 to "
            f"{count - 1}), got {max(channels)}; pass the channel of the tumour"
        )
    logits = logits[0].float()
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "the segmenter must return finite values, got NaN or infinity; look at its weights, "
            "and at preprocess="
        )
    if activation is None:
        _check_logits(logits)
        activation = "sigmoid" if count == 1 else "softmax"
    if activation == "softmax":
        return logits.softmax(0)[list(channels)].sum(0)
    chosen = logits[list(channels)]
    if activation == "sigmoid":
        return chosen.sigmoid().amax(0)
    low, high = torch.stack(torch.aminmax(chosen)).tolist()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f'activation="none" needs probabilities, but the segmenter returned {low:.3g} to '
            f'{high:.3g}; pass activation="softmax" or "sigmoid"'
        )
    return chosen.amax(0)


def _check_logits(values: Tensor) -> None:
    """Raise ValueError for values (C, X, Y, Z) that are probabilities beyond doubt."""
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if low < -ROUNDING or high > 1 + ROUNDING:
        return
    if len(values) == 1:
        is_probability = low < SURE_BACKGROUND and low < high
    else:
        is_probability = bool((values.sum(0) - 1).abs().max() < ROUNDING)
    if is_probability:
        raise ValueError(
            "the segmenter must return logits, but its values look like probabilities, from "
            f'{low:.3g} to {high:.3g}; pass activation="none", or activation="softmax" or '
            '"sigmoid" if they are logits'
        )


def _full_resolution(output: Any, patch_size: tuple[int, ...]) -> Tensor:
    """Return the output (1, C, X, Y, Z) of the patch's size."""
    outputs = list(output) if isinstance(output, list | tuple) else [output]
    wrong = [one for one in outputs if not isinstance(one, Tensor)]
    if wrong or not outputs:
        found = type(wrong[0] if wrong else output).__name__
        raise TypeError(
            "the segmenter must return a tensor (B, C, X, Y, Z), or a list of them with the full "
            f"resolution first, got {found}; pass a function that returns the tensor, for example "
            'lambda x: network(x)["logits"]'
        )
    for one in outputs:
        one = one[:, 0] if one.ndim == 6 else one
        if one.ndim == 5 and len(one) == 1 and tuple(one.shape[2:]) == patch_size:
            return one
    x, y, z = patch_size
    raise ValueError(
        f"the segmenter must return (1, channels, {x}, {y}, {z}) for one patch, got "
        f"{' and '.join(str(tuple(one.shape)) for one in outputs)}; pass a patch_size that it keeps"
    )
