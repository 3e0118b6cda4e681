"""Tasks that need values of a device's tensors: what they get, in which order, for which waits."""

from __future__ import annotations

import warnings

import pytest
import torch
from pretend import pretended

from tumorsynth import fetching
from tumorsynth.fetching import run_alone, run_or_on_cpu, run_together, together_on_cpu

MPS = torch.device("mps")


def tensors() -> list[torch.Tensor]:
    """Of all dtypes that may come, in shapes that leave wide ones without alignment."""
    rng = torch.Generator().manual_seed(0)
    values = 100 * torch.rand(3, 5, 7, generator=rng)
    dtypes = (torch.bool, torch.float64, torch.uint8, torch.int64, torch.bfloat16, torch.float32)
    made = [values[: 1 + n % 3].to(dtype) for n, dtype in enumerate(dtypes * 2)]
    return [
        *made,
        values.permute(2, 0, 1)[1::2],
        values[0, 0, :1].expand(4),
        values[0, 0, ::5][:1],
        torch.tensor(True),
        torch.tensor(2.5, dtype=torch.float16),
        torch.tensor(float("nan")),
        torch.empty(0, 3, dtype=torch.int16),
    ]


def test_tensors_come_together_as_they_are(monkeypatch):
    there = tensors()
    with pretended(monkeypatch, *there) as gpu:
        here = together_on_cpu(there)
        assert gpu.count() == 1 and not any(gpu.holds(tensor) for tensor in here)
    for found, want in zip(here, tensors(), strict=True):
        assert (found.dtype, found.shape) == (want.dtype, want.shape)
        assert torch.equal(found.double().nan_to_num(-1), want.double().nan_to_num(-1))


def test_tensors_of_the_cpu_stay(monkeypatch):
    there, here = tensors()[:2], tensors()
    with pretended(monkeypatch, *there) as gpu:
        found = together_on_cpu([there[0], *here, there[1]])
        assert gpu.count() == 1
        assert all(a is b for a, b in zip(found[1:-1], here, strict=True))
        assert together_on_cpu([]) == [] and gpu.count() == 1


def test_large_tensors_come_by_themselves(monkeypatch):
    """Packed, they would take as much memory of the device again."""
    monkeypatch.setattr(fetching, "MAX_PACKED_BYTES", 40)
    there = [torch.arange(10.0), torch.arange(11.0), torch.arange(3), torch.arange(12.0)]
    with pretended(monkeypatch, *there) as gpu:
        found = together_on_cpu(there)
        assert gpu.count() == 3
    assert [len(one) for one in found] == [10, 11, 3, 12]
    assert all(one.tolist() == list(range(len(one))) for one in found)


def test_tensors_come_one_by_one_where_a_device_cannot_pack_them(monkeypatch):
    def lacking(tensors):
        raise NotImplementedError("The operator 'aten::cat' is not there")

    there = [torch.arange(3.0), torch.tensor(True)]
    with pretended(monkeypatch, *there) as gpu:
        monkeypatch.setattr(torch, "cat", lacking)
        found = together_on_cpu(there)
        assert gpu.count() == 2
    assert [one.tolist() for one in found] == [[0.0, 1.0, 2.0], True]


def summing(values, log, name):
    """A task that asks once for each of its values."""
    total = 0.0
    for value in values:
        log.append(name)
        (found,) = yield [value]
        total += float(found)
    return total


def test_tasks_ask_a_device_together(monkeypatch):
    lengths, log = (2, 0, 4, 1), []
    there = [torch.arange(float(n)) for n in lengths]
    with pretended(monkeypatch, *there) as gpu:
        made = run_together(summing(t, log, n) for n, t in enumerate(there))
        assert made == [1.0, 0.0, 6.0, 0.0] and gpu.count() == max(lengths)
        assert log == [0, 2, 3, 0, 2, 2, 2]
        assert run_alone(summing(there[0], log, 0)) == 1.0 and gpu.count() == max(lengths) + 2


def test_tasks_of_the_cpu_run_one_after_the_other():
    log = []
    made = run_together(summing(torch.arange(float(n)), log, n) for n in (3, 0, 2))
    assert made == [3.0, 0.0, 1.0] and log == [3, 3, 3, 2, 2]
    assert run_together([]) == []


def test_one_that_fails_ends_the_others(monkeypatch):
    ended = []

    def failing(values):
        yield [values]
        raise ValueError("no")

    def waiting(values):
        try:
            while True:
                yield [values]
        finally:
            ended.append(True)

    there = torch.ones(2)
    with pretended(monkeypatch, there), pytest.raises(ValueError, match="no"):
        run_together([waiting(there), failing(there)])
    assert ended == [True]


@pytest.mark.parametrize("asks", [0, 1, 3])
def test_a_task_runs_on_the_cpu_where_its_device_lacks_an_operator(monkeypatch, asks):
    there = torch.arange(3.0)

    def work(device):
        (found,) = yield [there[1]]
        for _ in range(asks):
            yield [there]
        if device.type != "cpu":
            raise NotImplementedError("The operator 'aten::this' is not there")
        return float(found)

    step = f"step {asks}"  # each warns once a process
    with pretended(monkeypatch, there):
        with pytest.warns(UserWarning, match=f"mps lacks an operator, so {step} runs on the CPU"):
            found = run_together(run_or_on_cpu(step, MPS, work) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert found == run_together([run_or_on_cpu(step, MPS, work)]) * 2 == [1.0, 1.0]

    def never(device):
        yield [there]
        raise NotImplementedError("nowhere")

    with pytest.raises(NotImplementedError, match="nowhere"):
        run_alone(run_or_on_cpu(step, MPS, never))
