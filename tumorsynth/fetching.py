"""Fetch values from a device for several tasks at once, with one host-device synchronisation.

A task is a generator function. It yields the tensors whose values it needs next, and gets them on
the CPU::

    def brightest(image: Tensor) -> Task[float]:
        (value,) = yield [image.max()]
        return float(value)

    run_together([brightest(first), brightest(second)])  # synchronises once
    run_alone(brightest(first))

A task calls another one by ``yield from``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from tumorsynth.devices import on_cpu, warn_of_missing_operator

T = TypeVar("T")
Task: TypeAlias = Generator[Sequence[Tensor], list[Tensor], T]
MAX_PACKED_BYTES = 2**24  # of a tensor; copying more takes longer than a synchronisation


def run_together(tasks: Iterable[Task[T]]) -> list[T]:
    """Run tasks side by side; return what each returns, in order.

    Each step of all tasks together takes one host-device synchronisation. Tasks whose tensors are
    on the CPU run one after the other.

    Args:
        tasks: must not depend on what another of them does.
    """
    results: list[Any] = []
    asking: list[tuple[int, Task[T], Sequence[Tensor]]] = []
    for number, task in enumerate(tasks):
        results.append(None)
        _go_on(number, task, None, results, asking)
    while asking:
        asked, asking = asking, []
        copies = iter(together_on_cpu([tensor for _, _, wanted in asked for tensor in wanted]))
        for number, task, wanted in asked:
            _go_on(number, task, list(islice(copies, len(wanted))), results, asking)
    return results


def run_alone(task: Task[T]) -> T:
    """Run one task; return what it returns."""
    (result,) = run_together([task])
    return result


def run_or_on_cpu(
    step: str, device: torch.device, work: Callable[[torch.device], Task[T]]
) -> Task[T]:
    """Run work(device), or work(CPU) if the device lacks an operator; see `devices.or_on_cpu`."""
    try:
        return (yield from work(device))
    except NotImplementedError as error:
        warn_of_missing_operator(step, device, error)
    return (yield from work(torch.device("cpu")))


def together_on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU, after one host-device synchronisation for all that are not.

    Each tensor of more than MAX_PACKED_BYTES takes one of its own.

    Args:
        tensors: of any shapes and dtypes, all on one device or the CPU.
    """
    packed = [not on_cpu(t) and t.numel() * t.element_size() <= MAX_PACKED_BYTES for t in tensors]
    if sum(packed) < 2:
        return [tensor.cpu() for tensor in tensors]
    try:
        as_bytes = [_bytes(t) for t, is_packed in zip(tensors, packed, strict=True) if is_packed]
        together = torch.cat(as_bytes)
    except NotImplementedError:  # the device lacks an operator
        return [tensor.cpu() for tensor in tensors]
    copies = iter(together.cpu().split([len(one) for one in as_bytes]))
    return [
        # cloned, since a view as a wider dtype must be aligned
        next(copies).clone().view(t.dtype).view(t.shape) if is_packed else t.cpu()
        for t, is_packed in zip(tensors, packed, strict=True)
    ]


def _bytes(tensor: Tensor) -> Tensor:
    # a view as another dtype needs a stride of 1, which flatten() of one voxel may lack
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _go_on(
    number: int,
    task: Task[T],
    answer: list[Tensor] | None,
    results: list[Any],
    asking: list[tuple[int, Task[T], Sequence[Tensor]]],
) -> None:
    """Run a task until it needs a tensor of a device, or returns; note which.

    Args:
        number: of the task.
        task: to go on with.
        answer: what it asked for; None starts it.
        results: of the tasks, by number.
        asking: the tasks that need tensors.
    """
    send: Any = task.send
    try:
        wanted = send(answer)
        while all(map(on_cpu, wanted)):
            wanted = send(list(wanted))
    except StopIteration as end:
        results[number] = end.value
    else:
        asking.append((number, task, wanted))
