"""`Generator.compile`: the same results, a limited number of shapes, and a fallback."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import tiny_crop, tiny_generator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tumorsynth as ts
from tumorsynth.devices import full_float32
from tumorsynth.generators import compiled as module
from tumorsynth.generators.compiled import Compiled, in_parts
from tumorsynth.generators.diffusion import Generator
from tumorsynth.generators.recorded import RecordedPass

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")


class Counting:
    """A backend that runs the graph as it is, and counts compilations and passes."""

    def __init__(self) -> None:
        self.compiled, self.passes = 0, []

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.passes += [len(a) for a in args if a.ndim == 3]
            return graph(*args)

        return run


class Small(nn.Module):
    """(B, 2, n) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # some channels of some would be 0 throughout
            torch.manual_seed(0)
            self.layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 2:
            raise ValueError(f"two channels, got {x.shape[1]}")
        return self.layer(x.transpose(1, 2)).transpose(1, 2).relu()


def batch(size: int, n: int = 3) -> Tensor:
    return torch.randn(size, 2, n, generator=torch.Generator().manual_seed(size))


def failing(graph, inputs):
    raise RuntimeError("no compiler\nwas found here")


@pytest.mark.parametrize("size", range(20))
def test_a_batch_is_split_into_four_sizes(size):
    parts = in_parts(size)
    assert sum(parts) == size and set(parts) <= {8, 4, 2, 1}
    assert all(parts.count(part) == 1 for part in set(parts) - {8})


@torch.no_grad()
def test_every_batch_of_up_to_eight_needs_four_shapes_and_each_is_compiled_once():
    network, backend = Small(), Counting()
    compiled = Compiled(4, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower")  # Python 3.13.0
        for size in (1, 2, 3, 4, 5, 6, 7, 8, 16, 1, 7):
            torch.testing.assert_close(compiled(network, batch(size)), network(batch(size)))
    assert backend.compiled == 4 and backend.passes[-3:] == [4, 2, 1]


@torch.no_grad()
def test_shapes_beyond_the_limit_run_uncompiled_with_one_warning():
    network, backend = Small(), Counting()
    compiled = Compiled(2, backend)
    compiled(network, batch(1)), compiled(network, batch(2))
    with pytest.warns(UserWarning, match="2 shapes are compiled: others run as they are"):
        assert torch.equal(compiled(network, batch(4)), network(batch(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower")  # Python 3.13.0
        compiled(network, batch(8)), compiled(network, batch(1))
        compiled(network.forward, batch(1))  # the bound is a network's own
    assert backend.compiled == 3 and len(backend.passes) == 4


@torch.no_grad()
def test_the_limit_is_ours_and_not_torchs_of_eight():
    network, backend = Small(), Counting()
    compiled = Compiled(12, backend)
    for n in [*range(2, 14), *range(2, 14)]:
        compiled(network, batch(1, n))
    assert backend.compiled == 12 and len(backend.passes) == 24


@torch.no_grad()
def test_a_failure_warns_once_with_the_reason():
    network, compiled = Small(), Compiled(backend=failing)
    with pytest.warns(UserWarning, match="does not work here.*no compiler was found here") as said:
        assert torch.equal(compiled(network, batch(3)), network(batch(3)))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower")  # Python 3.13.0
        assert torch.equal(compiled(network, batch(2)), network(batch(2)))


@torch.no_grad()
def test_torch_compile_is_not_blamed_for_wrong_input():
    network, backend = Small(), Counting()
    compiled = Compiled(backend=backend)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="two channels, got 3"):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower")  # Python 3.13.0
        compiled(network, torch.ones(1, 3, 4))
    assert torch.equal(compiled(network, batch(1)), network(batch(1))) and backend.passes == [1]


@torch.no_grad()
def test_out_of_memory_errors_reach_the_caller():
    def full(graph, inputs):
        def run(*args):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        return run

    compiled = Compiled(backend=full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        compiled(Small(), batch(1))
    assert compiled.works


@torch.no_grad()
def test_answers_are_not_overwritten_by_the_next_pass():
    """As those of CUDA graphs are."""

    def reusing(graph, inputs):
        memory: list[Tensor] = []

        def run(*args):
            (answer,) = graph(*args)
            if not memory:
                memory.append(torch.empty_like(answer))
            return (memory[0].copy_(answer),)

        return run

    network, compiled = Small(), Compiled(backend=reusing)
    one, other = batch(1), batch(1) + 1
    found = compiled(network, one)
    compiled(network, other)
    assert torch.equal(found, network(one)) and not torch.equal(found, network(other))
    both = torch.cat([batch(16), batch(16) - 1])
    assert torch.equal(compiled(network, both), network(both))


def test_with_gradients_nothing_is_compiled():
    backend = Counting()
    x = batch(1).requires_grad_()
    Compiled(backend=backend)(Small(), x).sum().backward()
    assert backend.compiled == 0 and x.grad is not None


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "4"])
def test_a_limit_that_is_no_positive_integer_is_refused(wrong):
    with pytest.raises(ValueError, match="max_shapes must be a positive whole number"):
        tiny_generator().compile(max_shapes=wrong)


def agrees(generator: Generator, compiled: Generator, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        crop, mask = tiny_crop(size)
        for paint in ("change", "inpaint"):
            want = getattr(generator, paint)(crop, mask, seed=0, contrast_hu=-30.0)
            made = getattr(compiled, paint)(crop, mask, seed=0, contrast_hu=-30.0)
            assert compiled.compiled is not None and compiled.compiled.works
            torch.testing.assert_close(made, want, rtol=0, atol=1e-5)


def test_compiling_keeps_results_settings_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tumorsynth.generators.precision.cpu_computes_bfloat16", lambda: True)
    plain, generator = tiny_generator(codes=16), tiny_generator(codes=16)
    plain.precision = generator.precision = "float32"
    backend = Counting()
    assert generator.compile(backend=backend) is generator
    with torch.autocast("cpu", torch.bfloat16):  # a caller's has no say
        agrees(plain, generator, (3, 1))
    assert backend.compiled == 6  # encode, denoise, decode, of two crops and of one
    generator.precision = "bfloat16"
    generator.change(*tiny_crop(), seed=0)
    assert backend.compiled == 7  # the decoder's alone: noise is predicted in float32

    other = generator.with_sampler(crop_size=64)
    assert other.compiled is generator.compiled
    generator.to("cpu")
    assert generator.compiled._runs == {}
    assert plain.save(tmp_path / "a") and generator.save(tmp_path / "b")
    for name in ("model.safetensors", "card.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_copies_and_pickles_take_the_settings_along():
    generator = tiny_generator().compile(3, failing)
    for made in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert made.compiled is not generator.compiled
        assert (made.compiled.max_shapes, made.compiled.backend) == (3, failing)


def test_a_call_succeeds_where_torch_cannot_compile():
    image, label = 100 + torch.zeros(1, 48, 48, 48), torch.ones(1, 48, 48, 48, dtype=torch.uint8)
    want = ts.SynthesizeTumor(tiny_generator(), size_mm=8.0)(image, label, spacing=1.0, seed=0)
    synth = ts.SynthesizeTumor(tiny_generator().compile(backend=failing), size_mm=8.0)
    with pytest.warns(UserWarning, match="torch.compile does not work here"):
        made = synth(image, label, spacing=1.0, seed=0)
    assert torch.equal(made[0], want[0]) and torch.equal(made[1], want[1])


def test_the_compiler_is_not_imported_unless_asked_for():
    program = (
        "import sys, torch, tumorsynth as ts; "
        "g = ts.load_generator('liver-early'); "
        "g.change(torch.full((1, 1, 32, 32, 32), 0.6), torch.ones(1, 1, 32, 32, 32) > 0, seed=0); "
        "s = ts.SynthesizeTumor('hu2023'); x = torch.full((1, 24, 24, 24), 60.0); "
        "s(x, torch.ones_like(x), seed=0, spacing=1); assert s.report[0]['applied'], s.report; "
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("codes", [0, 16])
def test_torchs_own_compiler_keeps_the_results(codes):
    generator = tiny_generator(codes=codes)
    generator.precision = "float32"
    agrees(generator, generator.with_sampler().compile(), (1, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_keep_the_results_for_any_batch():
    # neither codes, nor a step that multiplies rounding by 263
    plain, generator = (tiny_generator(prediction="x0").to("cuda") for _ in range(2))
    plain.precision = generator.precision = "float32"
    generator.compile()
    for size in (1, 2, 3, 8, 7, 1, 16):
        crop, mask = (x.to("cuda") for x in tiny_crop(size))
        for paint in ("change", "inpaint"):
            with full_float32("cuda"):
                want = getattr(plain, paint)(crop, mask, seed=0)
                made = [getattr(generator, paint)(crop, mask, seed=seed) for seed in (0, 1)][0]
            assert generator.compiled is not None and generator.compiled.works
            torch.testing.assert_close(made, want, rtol=0, atol=1e-4)


# -- recorded passes, by stand-ins that replay on the CPU -----------------------------------------


class Replaying:
    """A recorded pass: memory of its own for inputs and answer, slow enough for threads to meet."""

    made: list[Replaying] = []

    def __init__(self, run, inputs, pool) -> None:
        self.run, self.pool = run, pool
        self.inputs = [x.clone() for x in inputs]
        self.answer = run(*self.inputs).clone()
        self.made.append(self)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        time.sleep(0.002)
        self.answer.copy_(self.run(*self.inputs))
        time.sleep(0.002)
        return self.answer


@pytest.fixture
def records(monkeypatch):
    monkeypatch.setattr(Replaying, "made", [])
    monkeypatch.setattr(module, "new_pool", lambda: "pool")
    monkeypatch.setattr(module, "RecordedPass", Replaying)
    monkeypatch.setattr(Compiled, "_records_on", lambda self, device: not self._unrecorded)
    return Replaying


def test_threads_take_turns_on_one_recording(records):
    compiled = Compiled(4, Counting())
    networks = [Small(), Small()]

    def call(k: int) -> bool:
        with torch.no_grad():  # of the thread
            x = batch(1 + k % 3) + k
            return torch.equal(compiled(networks[k % 2], x), networks[k % 2](x))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(48)))
    # batches of 1, 2 and 2 + 1 of two networks, all in one pool's memory
    assert len(records.made) == 4 and {one.pool for one in records.made} == {"pool"}


def test_what_another_thread_compiles_has_no_say(monkeypatch):
    """Torch's ``is_compiling`` is one flag for all threads."""
    package = Path(ts.__file__).parent
    found = [p.name for p in package.rglob("*.py") if "is_compiling()" in p.read_text()]
    assert found == []
    monkeypatch.setattr("torch.compiler._is_compiling_flag", True, raising=False)
    backend, network = Counting(), Small()
    with torch.no_grad():
        assert torch.equal(Compiled(backend=backend)(network, batch(1)), network(batch(1)))
    assert backend.compiled == 1


@torch.no_grad()
def test_what_cannot_be_recorded_runs_compiled_with_one_warning(records, monkeypatch):
    def failing(run, inputs, pool):
        raise AssertionError

    monkeypatch.setattr(module, "RecordedPass", failing)
    network, backend = Small(), Counting()
    compiled = Compiled(4, backend)
    with pytest.warns(UserWarning, match="CUDA graphs do not .* line [0-9]+: raise Asser") as said:
        assert torch.equal(compiled(network, batch(3)), network(batch(3)))
        assert torch.equal(compiled(network, batch(8)), network(batch(8)))
    assert len(said) == 1 and backend.compiled == 3 and not compiled.works


@torch.no_grad()
def test_a_recording_that_exceeds_the_memory_is_tried_again(records, monkeypatch):
    def full(run, inputs, pool):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    network, compiled = Small(), Compiled(1, Counting())
    with monkeypatch.context() as patch, pytest.raises(torch.cuda.OutOfMemoryError):
        patch.setattr(module, "RecordedPass", full)
        compiled(network, batch(8))
    assert torch.equal(compiled(network, batch(4)), network(batch(4))) and len(records.made) == 1


class FakeCuda:
    """Stand-ins for torch.cuda's: a graph notes the operators of its recording and repeats them."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        log = self.log

        class Stream:
            def __init__(self, device) -> None:
                pass

            def wait_stream(self, other) -> None:
                log.append("wait")

        class Graph:
            def __init__(self) -> None:
                self.operators: list[tuple] = []

            def replay(self) -> None:
                log.append("replay")
                with torch.inference_mode():  # a recording writes to any memory
                    for function, args, kwargs, out in self.operators:
                        made = function(*args, **kwargs)
                        if isinstance(out, Tensor) and made is not out:
                            out.copy_(made)

        class Recording(TorchDispatchMode):
            def __init__(self, graph, pool, capture_error_mode) -> None:
                super().__init__()
                assert capture_error_mode == "thread_local"
                assert not torch.is_autocast_cache_enabled()
                log.append(f"record in {pool}")
                self.graph = graph

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                if not any(r.alias_info for r in function._schema.returns):  # views need no repeat
                    self.graph.operators.append((function, args, kwargs or {}, out))
                return out

        current = Stream(None)
        for name, fake in (
            ("Stream", Stream),
            ("CUDAGraph", Graph),
            ("graph", Recording),
            ("stream", lambda stream: nullcontext()),
            ("device", lambda device: nullcontext()),
            ("current_stream", lambda device: current),
        ):
            monkeypatch.setattr(torch.cuda, name, fake)


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_a_recorded_pass_replays_on_memory_of_its_own(monkeypatch, inference):
    cuda, network, calls = FakeCuda(monkeypatch), Small(), []

    def run(x: Tensor) -> Tensor:
        calls.append(x)
        return network(x)

    with torch.inference_mode() if inference else nullcontext():
        recorded = RecordedPass(run, [batch(2)], "pool")
    assert cuda.log == ["wait", "wait", "record in pool"] and len(calls) == 3
    assert torch.is_autocast_cache_enabled()
    for x in (batch(2), batch(2) - 3, batch(2)):
        given = x.clone()
        assert torch.equal(recorded(x), network(x)) and torch.equal(x, given)
    assert len(calls) == 3 and cuda.log[3:] == ["replay"] * 3
    assert len({x.data_ptr() for x in calls}) == 1


@forks
def test_a_forked_process_does_not_wait_for_a_lock_of_its_parent():
    network, compiled = Small(), Compiled(4, "eager")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            queue.put(compiled(network, batch(1)).tolist())

    with compiled._lock:  # as if another thread were at it
        process = context.Process(target=child, daemon=True)
        process.start()
        try:
            with torch.no_grad():
                assert queue.get(timeout=300) == network(batch(1)).tolist()
        finally:
            process.kill()
