"""Independent random streams derived from one seed.

A tumour stores two seeds in its params. Whatever else is random about it comes from a substream of
one of these, so that a new random quantity changes no existing one.
"""

from __future__ import annotations

import torch

# Each stream XORs the seed with its own salt. Params of earlier versions replay only while these
# numbers stay as they are.
STREAM_SALTS: dict[str, int] = {
    "contrast": 0x6875,  # contrast of the tumour, uniform in a range
    "contrast_prior": 0x7072696F,  # contrast of the tumour, from a contrast prior
    "structure": 0x636F7265,  # rim and necrotic core
    "contrast_condition": 0x636F6E74,  # contrast that conditions a diffusion generator
    "bulge": 0x62756C67,  # share of the tumour beyond its organ
    "fill_noise": 0x66696C6C,  # noise of the background fill
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
