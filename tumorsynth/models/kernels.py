"""Find out which kernels the libraries behind PyTorch offer on this processor.

The processor's list of features does not answer this: ``ONEDNN_MAX_CPU_ISA`` limits oneDNN,
``ATEN_CPU_CAPABILITY`` limits PyTorch, and a build of PyTorch may lack oneDNN. So these
functions try a tiny operation once and cache the answer.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

TORCH_LIMIT = "ATEN_CPU_CAPABILITY"
TORCH_CAPABILITIES = ("default", "avx2", "avx512", "avx512_vnni", "amx_bf16", "amx_fp16")
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the first that is set counts
ONEDNN_ISA = ("SSE4", "AVX")  # how the names of its instruction sets begin
X86_WITHOUT_BFLOAT16 = ("NO AVX", "DEFAULT", "AVX2")  # names that PyTorch gives its capability


def cpu_isa() -> str:
    """Describe the instruction sets that PyTorch and oneDNN use on this processor.

    oneDNN computes the convolutions, in which tumours spend their time; PyTorch the rest. Each has
    a limit in the environment of its own.

    Returns:
        PyTorch's capability, oneDNN's limit, whether oneDNN is missing, and whether the CPU
        computes in bfloat16: ``"AVX512, bfloat16"``, ``"AVX512, bfloat16 slower than float32"``,
        ``"AVX512, convolutions up to AVX2 (ONEDNN_MAX_CPU_ISA), no bfloat16"``.
    """
    parts = [torch.backends.cpu.get_cpu_capability()]
    torch_is_limited = os.environ.get(TORCH_LIMIT) in TORCH_CAPABILITIES  # it ignores other words
    if torch_is_limited:
        parts[0] += f" ({TORCH_LIMIT})"
    limit = onednn_limit()
    if not uses_onednn():
        parts.append("no oneDNN")
    elif limit is not None:
        parts.append(f"convolutions up to {limit[1]} ({limit[0]})")
    elif torch_is_limited:
        parts.append("convolutions not limited")
    if not cpu_computes_bfloat16():
        parts.append("no bfloat16")
    else:
        parts.append("bfloat16" if cpu_gains_from_bfloat16() else "bfloat16 slower than float32")
    return ", ".join(parts)


def onednn_limit() -> tuple[str, str] | None:
    """Return the variable that limits oneDNN's instruction set, and the set; None if none does."""
    for name in ONEDNN_LIMITS:
        value = os.environ.get(name, "").upper()
        if value:  # oneDNN ignores words that it does not know
            return (name, value) if value.startswith(ONEDNN_ISA) else None
    return None


def uses_onednn() -> bool:
    """Whether PyTorch has oneDNN and may use it; ``torch.backends.mkldnn.enabled`` can change."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def cpu_computes_bfloat16() -> bool:
    """Whether convolutions on this CPU multiply in bfloat16.

    PyTorch accepts bfloat16 on any processor. Where the libraries only emulate it, a convolution is
    much slower than in float32.
    """
    return uses_onednn() and _multiplies_bfloat16()


def cpu_gains_from_bfloat16() -> bool:
    """Whether convolutions on this CPU are faster in bfloat16 than in float32.

    Intel's AVX512-BF16 multiplies bfloat16 more slowly than float32; its AMX, and the processors of
    other makers that compute in bfloat16, are faster. The maker decides, not a comparison of times,
    so that the same machine always gives the same tumours.
    """
    return cpu_computes_bfloat16() and (not _is_intel() or _uses_amx())


def _cpu_description() -> str:
    """Return maker and features as Linux lists them; elsewhere the maker, if Python knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()


@cache
def _is_intel() -> bool:
    return "GenuineIntel" in _cpu_description()


@cache
def _uses_amx() -> bool:
    limit = onednn_limit()
    if limit is not None and "AMX" not in limit[1]:
        return False
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch >= 2.5
    return "amx_bf16" in _cpu_description() if supported is None else bool(supported())


@cache
def _multiplies_bfloat16() -> bool:
    """Test convolutions of denormal numbers.

    bfloat16 instructions of x86 and Arm read denormal numbers as 0, float32 instructions do not.
    Unlike a comparison of times, this gives the same answer every time.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    capability = torch.backends.cpu.get_cpu_capability()
    # a limit of PyTorch's own kernels says nothing of oneDNN's
    if x86 and capability in X86_WITHOUT_BFLOAT16 and not os.environ.get(TORCH_LIMIT):
        return False
    layers: list[Callable[[Tensor, Tensor], Tensor]] = [_convolve, F.conv_transpose3d]
    denormal, scale = 2.0**-130, 2.0**40
    flushes = not bool(_full((1,), denormal))  # the caller's setting, for float32
    torch.set_flush_denormal(False)
    image, weight = _full((1, 16, 4, 4, 4), denormal), _full((16, 16, 3, 3, 3), scale)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return all(
                bool(layer(image, weight).all())
                and not bool(layer(image.bfloat16(), weight.bfloat16()).any())
                for layer in layers
            )
    except RuntimeError:  # "bf16 path needs the cpu support ..."
        return False
    finally:
        torch.set_flush_denormal(flushes)


@cache
def onednn_convolves() -> bool:
    """Whether PyTorch's internal oneDNN convolution works as this package calls it, in float32."""
    x, weight = _full((1, 2, 3, 3, 3), 1.0), _full((4, 2, 3, 3, 3), 1.0)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            out = _convolve(x, weight)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(out, _full((1, 4, 1, 1, 1), 54.0))


@cache
def onednn_has_linear() -> bool:
    """Whether PyTorch's internal oneDNN linear layer works as this package calls it."""
    x, weight = _full((2, 3), 1.0), _full((4, 3), 1.0)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            out = torch.ops.mkldnn._linear_pointwise(x, weight, weight[:, 0], "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(out, _full((2, 4), 4.0))


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mkldnn_convolution(x, weight, None, (0, 0, 0), (1, 1, 1), (1, 1, 1), 1)


def _full(shape: tuple[int, ...], value: float) -> Tensor:
    """Return a filled float32 tensor on the CPU, whatever the caller's defaults."""
    return torch.full(shape, value, device="cpu", dtype=torch.float32)
