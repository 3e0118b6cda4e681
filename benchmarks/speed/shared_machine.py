"""What do CPU threads cost while other programs keep the processor busy?

    python -m benchmarks.speed.shared_machine [--repeats 3] [--busy 2] [--limit 60]

Wall time of the README's first snippet, `tumorsynth demo`, `tumorsynth bench` (the time that it
prints for a call) and a call in a loop, each in a process of its own: with torch's own number of
threads and with OMP_NUM_THREADS=1, on the machine as it is ("quiet": see load) and beside --busy
processes that compute without end. The rows of a repeat follow each other, so that all of them see
the same machine. A run that takes longer than --limit seconds is stopped; the row says how many
were (`stopped`), and its figures are then lower bounds.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.common import HERE, arguments, parse, spread, write

ROOT = HERE.parent
ISA = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
WAITING = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CALL = """
import statistics, time
import tumorsynth as ts
from tumorsynth.commands.timing import patch_and_label
image, label = patch_and_label(96)
synth = ts.SynthesizeTumor("liver-early", count=1, size_mm=18)
took = []
for seed in range(4):
    start = time.perf_counter()
    synth(image, label, spacing=1.0, seed=seed)
    took.append(time.perf_counter() - start)
print(f"one call: {statistics.median(took[1:]) * 1e3:.1f} ms")
"""
NAMES = ("README's snippet", "tumorsynth demo", "tumorsynth bench, a call", "a call in a loop")


def command(name: str, folder: str) -> list[str]:
    if name == NAMES[0]:
        readme = (ROOT / "README.md").read_text()
        return [sys.executable, "-c", readme.split("```python\n")[1].split("```")[0]]
    if name == NAMES[1]:
        return [sys.executable, "-m", "tumorsynth", "demo", "-o", folder]
    if name == NAMES[2]:
        return [sys.executable, "-m", "tumorsynth", "bench", "--repeats", "1", "--device", "cpu"]
    return [sys.executable, "-c", CALL]


def seconds(name: str, threads: int | None, limit: float) -> float:
    """Of one run: what it printed for a call, else the whole process."""
    env = {name: value for name, value in os.environ.items() if name not in WAITING}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            ran = subprocess.run(
                command(name, folder), env=env, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return limit
        took = time.perf_counter() - start
    if ran.returncode:
        raise RuntimeError(f"{name} failed: {ran.stderr[-500:]}")
    printed = re.search(r"([\d.]+) ms(,|$)", ran.stdout, re.MULTILINE)
    return float(printed[1]) / 1e3 if printed and "call" in name else took


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside processes that never wait."""
    spin = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    parser = arguments(__doc__, "shared_machine", repeats=3)
    parser.add_argument(
        "--busy", type=int, default=os.cpu_count(), help="processes [default: cores]"
    )
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of one run")
    parser.add_argument("--only", choices=NAMES, action="append", help="these alone")
    args = parse(parser)
    rows: list[dict[str, Any]] = []
    for name in args.only or NAMES:
        took: dict[tuple[int, int | None], list[float]] = {}
        for _ in range(args.repeats):
            for processes in (0, args.busy):
                for threads in (None, 1):
                    with busy(processes):
                        one = seconds(name, threads, args.limit)
                    took.setdefault((processes, threads), []).append(one)
        for (processes, threads), values in took.items():
            alone = statistics.median(took[processes, 1])
            row = {
                "what": name,
                "busy": processes,
                "threads": threads or "default",
                "seconds": spread(values),
                "stopped": sum(value >= args.limit for value in values),
                "of_one_thread": round(statistics.median(values) / alone, 2),
            }
            print(row, flush=True)
            rows.append(row)
    settings = {key: os.environ.get(key) for key in ISA}
    load = [round(value, 1) for value in os.getloadavg()]
    what = {"repeats": args.repeats, "limit_s": args.limit, "cores": os.cpu_count(), "load": load}
    write(args.output, {**what, "isa_limits": settings, "rows": rows})


if __name__ == "__main__":
    main()
