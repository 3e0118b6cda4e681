"""Everything that a GPU has to tell, in order of worth, within a few minutes.

    PYTHONPATH=. python benchmarks/gpu/gpu_session.py --minutes 9 --out DIR [--commit TEXT]
    PYTHONPATH=. python benchmarks/gpu/gpu_session.py --out DIR --parts NAME ...   # some of the parts
    PYTHONPATH=. python benchmarks/gpu/gpu_session.py --out DIR --device cpu --tiny  # does it run?

Each part is a process of its own with a limit of its own, and writes what it has found so far: one
that fails or takes too long loses nothing but itself (`memory.py`, `scaling.py` and `steps.py`
write at their end); the exit status is then 1. Needs torch, numpy, einops, safetensors and
scipy alone, and no installation; `pytest -m gpu` comes first where pytest is there, else
`gpu_checks.py`. Ends with a table of what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEAST_S = 10.0  # a part is not begun with less


@dataclass
class Part:
    name: str
    limit_s: float
    script: str
    options: list[str] = field(default_factory=list)


def ways(name: str, limit_s: float, generator: str, which: list[str], *options: str) -> Part:
    return Part(name, limit_s, "ways.py", ["--generator", generator, "--ways", *which, *options])


FEW = ("--batches", "1", "8")  # each shape is compiled for a while
PARTS = [
    Part("checks", 120, "gpu_checks.py"),
    ways("shipped", 60, "liver-early", ["float32", "bfloat16"]),
    ways("published", 90, "published", ["float32", "bfloat16", "table of distances"]),
    ways("shipped_compiled", 150, "liver-early", ["compiled float32", "compiled bfloat16"], *FEW),
    ways("published_compiled", 200, "published", ["compiled bfloat16", "compiled float32"], *FEW),
    Part("search", 40, "search.py"),
    ways("published_other", 60, "published", ["full float32", "bfloat16, channels last"], *FEW),
    ways("shipped_other", 60, "liver-early", ["full float32", "bfloat16, channels last"], *FEW),
    Part("memory", 60, "memory.py"),
    Part("scaling", 90, "scaling.py"),
    Part("steps", 90, "steps.py"),
    ways("published_last", 150, "published", ["compiled bfloat16, channels last"], *FEW),
    ways("shipped_last", 120, "liver-early", ["compiled bfloat16, channels last"], *FEW),
]


def command(part: Part, args: argparse.Namespace) -> list[str]:
    if part.name == "checks" and find_spec("pytest") is not None and not args.tiny:
        tests = ROOT / "tests"
        marked = [str(p) for p in sorted(tests.glob("test_*.py")) if "mark.gpu" in p.read_text()]
        options = ["-m", "gpu", "-q", "-rs", "--continue-on-collection-errors"]
        return [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *marked]
    options = list(part.options)
    if args.tiny and part.script == "ways.py":
        options[options.index("--generator") + 1] = "tiny"
    found = [sys.executable, str(HERE / part.script), "--device", args.device, *options]
    if part.name != "checks":
        found += [
            "-o",
            str(args.out / f"{part.name}_{args.device}"),
            "--repeats",
            str(args.repeats),
        ]
    return found


def run(part: Part, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """What became of a part; its output goes to NAME.log."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if args.commit:
        environment["BENCHMARK_COMMIT"] = args.commit
    start, log = time.monotonic(), args.out / f"{part.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(part, args),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,  # to end the compiler's workers with it
        )
        try:
            ended = f"exit {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            ended = f"ended after its {limit_s:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    found = {"part": part.name, "ended": ended, "s": round(time.monotonic() - start, 1)}
    print(f"{part.name}: {ended}, {found['s']} s", flush=True)
    if ended != "exit 0" or part.name == "checks":
        print("    " + "\n    ".join(log.read_text().splitlines()[-25:]), flush=True)
    return found


def table(out: Path) -> list[str]:
    """A line for each row of each JSON that has times."""
    lines = []
    for path in sorted(out.glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError:  # of a part that was ended while it wrote
            lines.append(f"{path.name} is not whole")
            continue
        rows = found.get("rows", []) if isinstance(found, dict) else []
        for row in rows if isinstance(rows, list) else []:
            if "ms" not in row and "wall_ms" not in row:
                continue
            stages = row.get("ms", {"": row})
            times = "  ".join(f"{k} {v['wall_ms']['median']:g}" for k, v in stages.items()).strip()
            words = [row.get("generator"), row.get("way")]
            if "samples_in_a_call" in row:
                words.append(f"call of {row['samples_in_a_call']}")
            elif "batch" in row:
                words.append(f"batch {row['batch']}")
            rest = [
                f"{key} {row[key]}"
                for key in ("change_peak_mib", "peak_mib", "rms_hu", "first_s", "compiled")
                if row.get(key) is not None
            ]
            lines.append(f"{' | '.join(filter(None, words))}: {times}  [{', '.join(rest)}]")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--commit", help="of a copy without git, for the JSONs")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    end, found = time.monotonic() + 60 * args.minutes, []
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        left = end - time.monotonic()
        if left < LEAST_S:
            print(f"{part.name}: not begun, the time is over")
            found.append({"part": part.name, "ended": "not begun", "s": 0.0})
            continue
        limit_s = part.limit_s * (4 if args.tiny else 1)  # slower machines try it
        found.append(run(part, args, min(limit_s, left)))
        (args.out / "session.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(["", "ms, median by the wall's clock", *table(args.out)]))
    if any(part["ended"] != "exit 0" for part in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
