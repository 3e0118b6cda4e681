"""Seeds: one for each sample of a batch, and independent random streams derived from one seed.

`placement/sample_tumor.py` draws a tumour's diameter, axes, rotation, feather, capsule contact and
two seeds one after the other from one generator; a new draw among these would change later ones.
The quantities in `STREAM_SALTS` have streams of their own, derived from one of the two seeds: a new
one there changes no existing one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from operator import index

import torch

from tumorsynth.arguments import any_bool

# Each stream XORs the seed with its own salt. Params of earlier versions replay only while these
# numbers stay as they are.
STREAM_SALTS: dict[str, int] = {
    "contrast": 0x6875,  # contrast of the tumour, uniform in a range
    "contrast_prior": 0x7072696F,  # contrast of the tumour, from a contrast prior
    "structure": 0x636F7265,  # rim and necrotic core
    "contrast_condition": 0x636F6E74,  # contrast that conditions a diffusion generator
    "lumps": 0x6C756D70,  # inside a heterogeneous tumour
    "heterogeneity": 0x68657465,  # how strong the lumps are where no prior tells it
    "vessel_noise": 0x76657373,  # noise where a vessel was
    "rim": 0x72696D,  # how a rim varies around its tumour
    "own_variation": 0x6F776E76,  # slow variation of the tumour's own
    "edge": 0x65646765,  # softness of the tumour's edge
    "bulge": 0x62756C67,  # share of the tumour beyond its organ
    "fill_noise": 0x66696C6C,  # noise of the background fill
    "lesion": 0x6C657369,  # lesion and pose of a copy, where its shape names none
}


def substream(seed: int, name: str) -> torch.Generator:
    """Return a new CPU generator for one random quantity of a tumour.

    Args:
        seed: the tumour's noise seed or shape seed.
        name: a key of `STREAM_SALTS`.

    Returns:
        A generator that depends on the seed and the name alone.
    """
    return torch.Generator().manual_seed(seed ^ STREAM_SALTS[name])


def per_sample_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """Return one seed for each sample of a batch.

    Args:
        seed: one int, which counts up over the batch; one int for each sample; or None, which draws
            from torch's global generator. Integers of NumPy and torch count as ints.
        batch: number of samples.

    Raises:
        ValueError: if a seed is not an int from 0 to 2**63 - 1, or their number is not ``batch``.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (batch,)).tolist()
    try:  # index() accepts integers of NumPy and torch, and rejects floats
        seeds = [index(s) for s in islice(seed, batch + 1)]  # type: ignore[arg-type]
    except TypeError:
        try:
            seeds = [index(seed) + i for i in range(batch)]  # type: ignore[arg-type]
        except TypeError:
            seeds = []
    if any_bool(seed) or len(seeds) != batch or any(s < 0 or s >= 2**63 for s in seeds):
        raise ValueError(
            f"seed must be one non-negative int below 2**63, or one for each of the {batch} "
            f"samples, got {seed!r}; pass seed=0, or a list of {batch} ints"
        )
    return seeds


def distributed_rank() -> int:
    """Return this process's rank in a distributed training, 0 outside of one.

    A worker process inherits it from a process that has joined the group, or from torchrun.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))
