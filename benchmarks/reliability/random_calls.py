"""Thousands of random calls in one go: what becomes of them?

    python -m benchmarks.reliability.random_calls [--minutes 30] [--examples 200]

The properties of tests/pipeline/test_properties.py, in turn and from new seeds every time,
--examples of each, until the minutes (of CPU time) are over. The first failure ends the run, with
the example that shows it. A call that is repeated or replayed for comparison is not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.common import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("-o", "--output", default="random_calls")
    args = parser.parse_args()
    os.environ["TUMORSYNTH_EXAMPLES"] = str(args.examples)
    torch.set_num_threads(1)
    tests = Path(__file__).resolve().parents[2] / "tests"
    sys.path[:0] = [str(tests), str(tests / "pipeline")]
    import test_properties as properties

    tests = {k: v for k, v in vars(properties).items() if hasattr(v, "hypothesis")}
    made: dict[str, Counter[str]] = {name: Counter() for name in tests}
    started = time.process_time()
    while (spent := time.process_time() - started) < 60 * args.minutes:
        for name, test in tests.items():
            properties.COUNTS.clear()
            test()
            found = properties.COUNTS
            slowest = max(made[name]["slowest, CPU ms"], found.pop("slowest, CPU ms", 0))
            made[name] += found
            made[name]["slowest, CPU ms"] = slowest
            print(name, dict(made[name]), flush=True)
        print(f"{spent / 60:.1f} min:", {k: dict(v) for k, v in made.items()}, flush=True)
        write(
            args.output,
            {
                "calls": {k: dict(sorted(v.items())) for k, v in made.items()},
                "cpu_minutes": round((time.process_time() - started) / 60, 1),
            },
        )


if __name__ == "__main__":
    main()
