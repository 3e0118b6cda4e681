"""A pretended device: tensors in the CPU's memory that behave as if they were elsewhere.

An operator that gets tensors of both devices fails as on a GPU, and so do numpy and a CPU's
random generator; the CPU does the work. Importing this module registers the device with PyTorch
for the whole process, so tests that use it run in one of their own (`test_other_device.py`).
(`pretend.py` counts what would be waited for, within the tests' own process.)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from callers import caller
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
MOVES = ("aten._to_copy.", "aten.copy_.", "aten._copy_from.")


RAISING = (
    "median.dim",
    "nanmedian.dim",
    "kthvalue",
    "mode.",
    "histc",
    "put.",
    "put_.",
    "max_unpool",
    "nll_loss",
    "_ctc_loss_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
)


class _Module:
    """What PyTorch asks of a device's module, as torch.cuda is for CUDA."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
# Copies to the device that the program waits for on CUDA, by the function of ours that made them:
# those through `devices.onto` it does not.
copies: Counter[str] = Counter()
# What the program waits for to come from the device, by the function of ours that asked.
waits: Counter[str] = Counter()
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")


def _note_wait(name: str, args: Any) -> None:
    """Note an operator whose answer, or its size, the program needs to go on."""
    by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
        isinstance(index, Pretended) and index.dtype is torch.bool for index in args[1]
    )
    if by_mask or any(ask in name for ask in ASKS):
        waits[caller() or "test"] += 1


def _note_copy() -> None:
    name = caller()
    if name is not None and name != "onto":
        copies[name] += 1


class Pretended(torch.Tensor):
    """A tensor that says it is on the pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    def tolist(self) -> Any:
        waits[caller() or "test"] += 1
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """The context in which the device is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    if isinstance(value, Pretended):
        return value.inner
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def has_deterministic_kernel(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether CUDA runs an operator under ``torch.use_deterministic_algorithms``.

    The list is that function's documentation, with the operators behind the modules named there,
    and ``nanmedian``, which is ``median`` that leaves NaN out.
    """
    name = str(func).removeprefix("aten.")
    if name.startswith(RAISING):
        return False
    if name.startswith("cumsum"):
        dtype = kwargs.get("dtype") or args[0].dtype
        return not (dtype.is_floating_point or dtype.is_complex)
    if name.startswith("bincount"):
        return kwargs.get("weights", args[1] if len(args) > 1 else None) is None
    if name.startswith("scatter_reduce"):
        return "prod" not in (*args, *kwargs.values())
    return True


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func)
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    here = [t for t in given if isinstance(t, Pretended)]
    away = [t for t in given if not isinstance(t, Pretended) and t.ndim > 0]
    if here and torch.are_deterministic_algorithms_enabled():
        if not has_deterministic_kernel(func, args, kwargs):
            raise RuntimeError(f"{name} does not have a deterministic implementation")
    moves = name.startswith(MOVES)
    indexing = name.startswith(("aten.index.", "aten.index_put"))
    indices = indexing and isinstance(args[0], Pretended)  # indices may be the CPU's
    if here and away and not moves and not indices:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    result_here = bool(here) if device is None else torch.device(device).type == NAME
    if here:
        _note_wait(name, args)
        if name.startswith("aten._to_copy.") and not result_here:
            waits[caller() or "test"] += 1
    if name.startswith("aten._to_copy.") and result_here and not here:
        _note_copy()
    if name.startswith("aten.copy_.") and isinstance(args[0], Pretended) and away:
        _note_copy()
    if kwargs.get("generator") is not None and result_here:
        raise RuntimeError(f"{name}: expected a {NAME!r} device type for generator, found 'cpu'")
    a, k = tree_map(_inner, (args, kwargs))
    k.pop("pin_memory", None)
    out = func(*a, **k)
    # what works in place returns what it was given
    same = {id(_inner(t)): t for t in given} if func._schema.is_mutable else {}
    if name.startswith("aten.copy_.") and here and not isinstance(args[0], Pretended):
        waits[caller() or "test"] += 1
    if moves and same:
        result_here = isinstance(args[0], Pretended)
    return tree_map(
        lambda t: (
            same.get(id(t), Pretended(t) if result_here else t)
            if isinstance(t, torch.Tensor)
            else t
        ),
        out,
    )


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Pretended(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    kept = memory_format or torch.contiguous_format
    return Pretended(torch.empty(size, dtype=dtype, device="cpu", memory_format=kept))


def _copy_from(source, target, non_blocking=False):
    if isinstance(target, Pretended) and not isinstance(source, Pretended):
        _note_copy()
    _inner(target).copy_(_inner(source))
    return target


# what torch.tensor and friends call below the dispatch mode
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
