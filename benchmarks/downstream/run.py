"""Train and test the jobs of a plan that are not finished; start it again to resume.

    python -m benchmarks.downstream.run PLAN.json --pack pack.npz --out RUN [--jobs 1]

A job trains one network in one arm of one experiment, on one fold, with one seed. It leaves
RUN/jobs/NAME.json when it is done, and a checkpoint while it runs. A second command with the same
RUN takes jobs that no other is at. `benchmarks.downstream.table` compares what is finished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.downstream.experiments import Job, jobs_of
from benchmarks.downstream.files import locked
from benchmarks.downstream.job import fingerprint, rescore, run_job
from benchmarks.downstream.pack import load_pack
from benchmarks.downstream.training import Settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plan", type=Path, metavar="PLAN.json")
    parser.add_argument("--pack", type=Path, required=True, help="of benchmarks.downstream.pack")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")
    parser.add_argument("--rescore", action="store_true", help="score finished jobs again")
    args = parser.parse_args(argv)
    if args.jobs == 1 or args.list or args.rescore:
        work(args)
        return
    workers = [multiprocessing.Process(target=work, args=(args,)) for _ in range(args.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))


def read_plan(path: Path) -> tuple[dict[str, Any], Settings]:
    """Read a plan: its runs, and the settings that differ from the defaults."""
    plan = json.loads(path.read_text())
    given = plan.get("settings", {})
    unknown = set(given) - {field.name for field in fields(Settings)}
    if unknown:
        raise ValueError(f"{path} has unknown settings {sorted(unknown)}")
    return plan, Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def work(args: argparse.Namespace) -> None:
    """Run every job that is neither finished nor another process's."""
    torch.set_num_threads(1)
    plan, settings = read_plan(args.plan)
    scans = load_pack(args.pack)
    jobs = jobs_of(plan, scans)
    done = [job for job in jobs if is_done(job, settings, args.out)]
    print(f"{len(jobs)} jobs, {len(done)} finished", flush=True)
    if args.rescore:
        for job in done:
            rescore(job, scans, args.out)
        return
    for job in jobs:
        if args.list:
            print("finished" if job in done else "to do   ", job.name)
            continue
        with locked(args.out / "jobs" / f".{job.name}.lock", wait=False) as ours:
            if not ours or is_done(job, settings, args.out):
                continue
            print(f"{time.strftime('%F %T')} {job.name}", flush=True)
            result = run_job(job, scans, settings, args.out, args.device)
            print(f"{time.strftime('%F %T')} {job.name} done {result['cpu_seconds']}", flush=True)


def is_done(job: Job, settings: Settings, out: Path) -> bool:
    """Whether a job's result is there; ValueError if it was made with other settings."""
    path = out / "jobs" / f"{job.name}.json"
    if not path.is_file():
        return False
    if json.loads(path.read_text())["fingerprint"] != fingerprint(job, settings):
        raise ValueError(f"{path} was made with other settings; choose another --out")
    return True


if __name__ == "__main__":
    main()
