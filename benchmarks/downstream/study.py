"""How long to train, and at which rate? The arm `real` alone, on patients kept for validation.

    python -m benchmarks.downstream.study --pack pack.npz --out STUDY [--rates 1e-3 3e-3]

Trains on two annotated patients and validates on four others, at several steps of one training;
writes STUDY/study.json. An interrupted study resumes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.downstream.arms import ARMS
from benchmarks.downstream.experiments import Job, every
from benchmarks.downstream.exposure import ANNOTATED, crops_of, view
from benchmarks.downstream.files import write_json
from benchmarks.downstream.job import score
from benchmarks.downstream.pack import Scan, load_pack
from benchmarks.downstream.training import Settings, loss_of, predict, train
from tumorsynth.evaluation.froc import Pool

TRAINED = ("ircadb_p01", "radcttace_0745_eqp")
VALIDATED = ("radcttace_0697_eqp", "radcttace_1720_eqp", "radcttace_2144_eqp", "crlm_1006")
STEPS = (500, 1000, 2000, 3000, 4000, 6000)
CROPS, CROP_SEED = 48, 10**6  # of the validation loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-3, 3e-3))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scans = load_pack(args.pack)
    path = args.out / "study.json"
    found = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    for rate in args.rates:
        settings = replace(Settings(), steps=max(args.steps), rate=rate)
        done = {(row["rate"], row["steps"]) for row in found["rows"]}

        def validate(network: torch.nn.Module, step: int, settings: Settings = settings) -> None:
            row = measure(network, scans, settings, args.device)
            row = {"rate": settings.rate, "steps": step, **row}
            print(row, flush=True)
            found["rows"].append(row)
            write_json(path, {"environment": environment(), **found})

        at = {
            step: (lambda network, step=step: validate(network, step))
            for step in args.steps
            if (rate, step) not in done
        }
        if at:
            taught = {name: [view(scans[name], every(scans[name]))] for name in TRAINED}
            train(taught, None, settings, 0, args.out / f"rate{rate:g}.pt", args.device, at)


@torch.no_grad()
def measure(
    network: torch.nn.Module, scans: dict[str, Scan], settings: Settings, device: str
) -> dict[str, Any]:
    """Validation loss on fixed crops, and lesions found at 1 and 4 false positives a scan."""
    views = {name: [view(scans[name], every(scans[name]))] for name in VALIDATED}
    losses = []
    for k in range(CROPS):
        (crop,) = crops_of(CROP_SEED, k, ANNOTATED, 1, views, settings.side)
        image, tumor, counted = crop[None, :1].to(device), crop[None, 1:2], crop[None, 2:]
        losses.append(float(loss_of(network(image).cpu(), tumor, counted)))
    tests = {name: every(scans[name]) for name in VALIDATED}
    job = Job("study", ARMS["real"], 0, 0, "", 1, {}, (), {}, tests, ())
    matches = [
        score(job, scans[n], predict(network, scans[n].hu, scans[n].organ, settings.side, device))
        for n in VALIDATED
    ]
    pool = Pool(matches)
    dice = [m.dsc for m in matches if m.dsc is not None]
    return {
        "loss": round(sum(losses) / CROPS, 4),
        "sensitivity_at_1": pool.at_rate(1.0).sensitivity,
        "sensitivity_at_4": pool.at_rate(4.0).sensitivity,
        "dsc": round(sum(dice) / len(dice), 4),
    }


if __name__ == "__main__":
    main()
