"""Number format of a diffusion generator's networks: float32, or bfloat16 where that is safe.

* "auto" is bfloat16 on CPUs that are faster in it, if the denoiser predicts x0 or v, else float32.
* "float32" follows PyTorch's settings: by default, CUDA convolutions round to TF32.
* "bfloat16" falls back to float32, with one warning, on CPUs that only emulate it.

If the denoiser predicts noise, it and the encoder compute in full float32, since its steps multiply
errors, and "bfloat16" is the decoder's alone. In bfloat16 the same seed gives the same tumour bit
by bit on machines of one kind.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from tumorsynth.models.kernels import cpu_computes_bfloat16, cpu_gains_from_bfloat16, cpu_isa

PRECISIONS = ("auto", "float32", "bfloat16")


def computes_in_bfloat16(precision: str, device: torch.device, prediction: str) -> bool:
    """Decide whether networks compute in bfloat16.

    Args:
        precision: one of `PRECISIONS`. "auto" is bfloat16 on a CPU that is faster in it, unless the
            network predicts noise.
        device: where the networks are.
        prediction: what the denoiser predicts, "noise", "x0" or "v".

    Raises:
        ValueError: if ``precision`` is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {PRECISIONS}, got {precision!r}; set generator.precision = "
            "'auto'"
        )
    on_cpu = device.type == "cpu"
    if precision == "auto":
        return on_cpu and prediction != "noise" and cpu_gains_from_bfloat16()
    if precision == "bfloat16" and on_cpu and not cpu_computes_bfloat16():
        _warn_of_float32()
        return False
    return precision == "bfloat16"


@cache  # once per process
def _warn_of_float32() -> None:
    warnings.warn(
        "precision is 'bfloat16', which this CPU only emulates (PyTorch uses "
        f"{cpu_isa()}): the generator computes in float32; "
        "set generator.precision = 'auto' to choose the format by CPU without this warning",
        stacklevel=2,
    )
