"""`tumorsynth bench` and what it measures with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_crop, tiny_generator

import tumorsynth as ts
from tumorsynth.commands.timing import (
    ORDER,
    Watch,
    call_times,
    cpu_name,
    pass_times,
    patch_and_label,
    peak_mib,
    times,
)
from tumorsynth.fetching import run_alone
from tumorsynth.models.kernels import cpu_isa

CPU = torch.device("cpu")


def bench(capsys, *words: object) -> tuple[int, str]:
    pytest.importorskip("typer")
    from tumorsynth.commands.main import main

    return main(["bench", *map(str, words)]), capsys.readouterr().out


def test_the_command_prints_every_step_and_its_share(tmp_path, capsys):
    tiny_generator().save(tmp_path / "gen")
    code, out = bench(
        capsys, "--generator", tmp_path / "gen", "--side", 48, "--size-mm", 8, 8, "--repeats", 1
    )
    rows = dict(re.findall(r"^ *(\w+) +[\d.]+ +(\d+)% *$", out, re.M))
    assert code == 0
    assert list(rows) == "place crop encode denoise decode blend other".split()
    assert 96 <= sum(map(int, rows.values())) <= 104
    milliseconds = re.search(r"one call, 8 to 8 mm in a patch of 48\^3: ([\d.]+) ms", out)
    share = re.search(r"^([\d.]+) of four .*, 32 channels, 96\^3\), ([\d.]+) ms$", out, re.M)
    assert milliseconds and share
    expected = float(milliseconds[1]) / float(share[2])
    assert float(share[1]) == pytest.approx(expected, rel=0.5, abs=0.0051)  # of one pair of them
    assert cpu_name() in out and cpu_isa() in out and torch.__version__ in out
    threads = torch.get_num_threads()
    assert re.search(rf", {threads} thread{'s' * (threads > 1)}, torch", out)


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (3.2, True)])
def test_a_busy_machine_is_told(capsys, monkeypatch, load, said):
    pytest.importorskip("typer")
    from tumorsynth.commands.main import main

    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr("tumorsynth.commands.timing.reference_work", lambda _: lambda: None)
    assert main(["bench", "--generator", "hu2023", "--side", "48", "--repeats", "1"]) == 0
    assert ("3.2 cores were busy" in capsys.readouterr().err) is said


def test_convolutions_are_timed_right_before_each_call(monkeypatch):
    order = []
    synth = ts.SynthesizeTumor("hu2023", count=1, size_mm=8.0)
    image, label = patch_and_label(40)
    inner = synth.forward
    monkeypatch.setattr(synth, "forward", lambda *a, **k: (order.append("call"), inner(*a, **k))[1])
    call_times(synth, image, label, 2, lambda: order.append("between"), spacing=1.0)
    assert order == ["call", *["between", "call"] * 4]


def test_the_first_line_comes_before_torch():
    program = (
        "import sys, typer; from tumorsynth.commands.main import main;\n"
        "typer.echo = lambda text, **_: (print('torch' in sys.modules), sys.exit(0))\n"
        "main(['bench'])"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "False\n", done.stderr


def test_a_generator_without_networks_and_a_codebook_have_rows_of_their_own(capsys, monkeypatch):
    monkeypatch.setattr("tumorsynth.commands.timing.reference_work", lambda _: lambda: None)
    code, out = bench(capsys, "--generator", "hu2023", "--side", 48, "--repeats", 1)
    assert code == 0 and "paint" in out and "encode" not in out
    synth = ts.SynthesizeTumor(tiny_generator(codes=16), count=1, size_mm=8.0)
    image, label = patch_and_label(40)
    found = call_times(synth, image, label, repeats=1, spacing=1.0)
    assert list(found) == ["call", *(k for k in ORDER if k in found)] and "quantise" in found


def test_a_tumour_that_does_not_fit_is_an_error_with_its_reason(capsys):
    code, out = bench(capsys, "--generator", "hu2023", "--side", 32, "--size-mm", 60, 60)
    assert code == 2 and out == ""


def test_measuring_leaves_no_trace():
    synth = ts.SynthesizeTumor(tiny_generator(), count=1, size_mm=8.0)
    generator = synth.handle.get(CPU)
    image, label = patch_and_label(40)
    before = set(synth.__dict__), set(generator.__dict__)
    expected = synth(image, label, spacing=1.0, seed=0)[0]
    call_times(synth, image, label, repeats=1, spacing=1.0)
    assert (set(synth.__dict__), set(generator.__dict__)) == before
    assert torch.equal(synth(image, label, spacing=1.0, seed=0)[0], expected)


def test_a_task_is_timed_while_it_runs():
    """Not only while it is made: most of a call are tasks, which `fetching` runs."""

    class Work:
        def task(self):
            (value,) = yield [torch.ones(1)]
            time.sleep(0.05)
            return (yield from self.part()) + value

        def part(self):
            time.sleep(0.02)
            (value,) = yield [torch.ones(1)]
            return value

    work, watch = Work(), Watch(CPU)
    watch.wrap(work, "task", "whole")
    watch.wrap(work, "part", "part")
    assert float(run_alone(work.task())) == 2
    assert watch.spent["whole"][0] >= 50 and watch.spent["part"][0] >= 20
    assert sum(wall for wall, _ in watch.spent.values()) < 500  # counted once


def test_a_step_inside_another_is_counted_once():
    class Work:
        def outer(self):
            return self.inner() + sum(range(200_000))

        def inner(self):
            return sum(range(400_000))

    work, watch = Work(), Watch(CPU)
    watch.wrap(work, "inner", "inner")
    watch.wrap(work, "outer", "outer")
    whole = Watch(CPU)
    whole.wrap(work, "outer", "both")
    work.outer()
    parts = [watch.spent[key][1] for key in ("inner", "outer")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(whole.spent["both"][1], rel=0.1, abs=0.5)


def test_every_pass_is_timed_by_both_clocks():
    found = pass_times(tiny_generator(codes=16), batch=2, repeats=2)
    assert list(found) == "encode denoise quantise decode inpaint change".split()
    assert all(len(ms) == 2 and min(ms) >= 0 for clocks in found.values() for ms in clocks.values())
    calls = []
    assert len(times(lambda: calls.append(0), CPU, 3)["wall_ms"]) == 3 and len(calls) == 4


def test_peak_memory_is_of_the_call_alone():
    kept = torch.ones(8 * 2**20)  # 32 MiB that were there before
    peak = peak_mib(lambda: torch.ones(16 * 2**20).sum(), CPU)
    if peak is None:
        pytest.skip("resident memory is read on Linux with glibc alone")
    assert 60 <= peak <= 80 and kept.sum() > 0


def test_more_steps_have_their_own_noise_levels_and_the_networks_times():
    from benchmarks.speed.steps import with_steps

    generator, (crop, mask) = tiny_generator(prediction="x0"), tiny_crop()
    expected = generator.change(crop, mask, seed=0)
    assert torch.equal(with_steps(generator, 4).change(crop, mask, seed=0), expected)
    asked: list[float] = []
    inner = generator.denoiser.forward

    def forward(x_t, t, cond):
        asked.append(round(float(t), 4))
        return inner(x_t, t, cond)

    generator.denoiser.forward = forward
    for steps, told in ((1, [3]), (2, [3, 0]), (8, [3, 2.5, 2, 1.5, 1, 0.5, 0, 0])):
        asked.clear()
        other = with_steps(generator, steps)
        assert other.change(crop, mask, seed=0).isfinite().all() and asked == told
        if steps > 4:  # the middle level is where its own schedule has it
            level = float(other.schedule.alphas_cumprod[steps // 2 - 1])
            assert level == pytest.approx(float(generator.schedule.alphas_cumprod[1]), rel=1e-6)
