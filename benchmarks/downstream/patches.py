"""A screen of minutes: patches centred on tumours against patches of the organ around them.

    python -m benchmarks.downstream.patches PLAN.json --pack pack.npz --out RUN

The experiments and arms are those of `benchmarks.downstream.run`. Instead of a segmentation, a
small classifier learns from as many annotated patches and others. Its score is the area under the
ROC curve: each tested tumour against 200 places of its organ at least 5 mm from any tumour. The
screen says what to change in the tumours before long runs, not whether they help. Writes
RUN/patches/NAME.json and RUN/patches.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.common import environment, write
from benchmarks.downstream.experiments import jobs_of
from benchmarks.downstream.exposure import ANNOTATED, OTHERS, crop, pick, scale, stream
from benchmarks.downstream.files import locked, write_json, write_whole
from benchmarks.downstream.job import describe, gather
from benchmarks.downstream.network import block
from benchmarks.downstream.pack import Scan, load_pack
from benchmarks.downstream.run import read_plan
from benchmarks.downstream.training import Views

SIDE = (32, 32, 16)  # voxels: 48 x 48 x 40 mm
STEPS, HALF, RATE = 600, 8, 2e-3
NEAR = 0.1  # of the side: how far a patch may lie from its tumour's voxel
PLACES, APART_MM = 200, 5.0  # of healthy tissue in each tested scan
DRAWS = 1000


class Classifier(nn.Module):
    """Three levels, the first with half the resolution in the plane, and a maximum."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        widths = [channels * 2**k for k in range(3)]
        layers: list[nn.Module] = [nn.Conv3d(1, channels, (4, 4, 3), stride=(2, 2, 1), padding=1)]
        for k, width in enumerate(widths):
            layers += [block(widths[max(0, k - 1)], width), nn.MaxPool3d(2)]
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(4 * channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B,) of patches (B, 1, X, Y, Z)."""
        found: Tensor = self.last(self.body(image).amax((2, 3, 4)))
        return found[:, 0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plan", type=Path, metavar="PLAN.json")
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", metavar="NAME", help="also all jobs in results/NAME.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plan, settings = read_plan(args.plan)
    scans = load_pack(args.pack)
    results = []
    for job in jobs_of(plan, scans):
        path = args.out / "patches" / f"{job.name}.json"
        with locked(args.out / "patches" / f".{job.name}.lock"):
            if not path.is_file():
                annotated, others, _ = gather(job, scans, settings, args.out, args.device)
                start = time.process_time()
                network = train(annotated, others, job.seed, args.steps, args.device)
                found = {n: test(network, scans[n], t, args.device) for n, t in job.tests.items()}
                seconds = round(time.process_time() - start, 1)
                content = {"job": describe(job), "steps": args.steps, "cpu_seconds": seconds}
                about = {"environment": environment(), **content, "scans": found}
                write_json(path, about)
                print(f"{job.name}: AUC {area(found):.3f}, {seconds:.0f} s", flush=True)
        results.append(json.loads(path.read_text()))
    text = table(results)
    write_whole(args.out / "patches.md", text.encode())
    if args.output:
        hours = round(sum(result["cpu_seconds"] for result in results) / 3600, 2)
        write(args.output, {"cpu_hours": hours, "table": text.splitlines(), "jobs": results})
    print(text)


def patches_of(
    seed: int, step: int, kind: int, views: Views, count: int = HALF
) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the patches of half a batch, every other one on a tumour where there are tumours.

    Returns:
        Images, and for each whether its middle is tumour (1), healthy (0) or not known (-1).
    """
    images, truths = [], []
    for slot in range(count):
        rng = stream(seed, step, kind, slot)
        cut = crop(rng, pick(rng, views), SIDE, on_tumor=float(slot % 2 == 0), jitter=NEAR)
        middle = tuple(n // 2 for n in SIDE)
        around = cut[1:, middle[0] - 1 : middle[0] + 1, middle[1] - 1 : middle[1] + 1, middle[2]]
        images.append(cut[:1])
        truths.append(torch.where(around[1].min() > 0, around[0].max(), -1.0))
    return images, truths


def train(annotated: Views, others: Views | None, seed: int, steps: int, device: str) -> Classifier:
    """Train a classifier; both halves of a batch are like those of the segmentation."""
    torch.manual_seed(seed)
    network = Classifier().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images, truths = patches_of(seed, step, ANNOTATED, annotated)
        more, other_truths = patches_of(seed, step, OTHERS, others or annotated)
        truth = torch.stack(truths + other_truths).to(device)
        logits = network(torch.stack(images + more).to(device))
        known = truth >= 0
        loss = F.binary_cross_entropy_with_logits(logits[known], truth[known])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def test(network: Classifier, scan: Scan, tumors: Sequence[int], device: str) -> dict[str, Any]:
    """Scores of a scan's tested tumours, in their middles, and of healthy places."""
    far = ndimage.distance_transform_edt(scan.lesions == 0, scan.spacing) >= APART_MM
    healthy = np.flatnonzero(far & scan.organ)
    rng = np.random.default_rng(0)
    places = [np.unravel_index(k, scan.hu.shape) for k in rng.choice(healthy, PLACES)]
    middles = [ndimage.center_of_mass(scan.lesions == k) for k in tumors]
    scores = []
    for centre in (*middles, *places):
        low = [round(float(c)) - n // 2 for c, n in zip(centre, SIDE, strict=True)]
        index = [np.clip(np.arange(a, a + n), 0, m - 1) for a, n, m in
                 zip(low, SIDE, scan.hu.shape, strict=True)]  # fmt: skip
        patch = scale(torch.from_numpy(scan.hu[np.ix_(*index)].astype(np.float32)))
        scores.append(float(network(patch[None, None].to(device))))
    return {
        "diameters_mm": [scan.diameters_mm[k - 1] for k in tumors],
        "tumors": [round(s, 4) for s in scores[: len(tumors)]],
        "healthy": [round(s, 4) for s in scores[len(tumors) :]],
    }


def area(scans: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean over tumours of the share of healthy places in their own scan that score lower."""
    return float(np.mean(np.concatenate([shares(scan) for scan in scans.values()])))


def shares(scan: Mapping[str, Any]) -> np.ndarray:
    """For each tumour, the share of healthy places that score lower."""
    tumors, healthy = (np.array(scan[key])[:, None] for key in ("tumors", "healthy"))
    result: np.ndarray = ((healthy.T < tumors) + 0.5 * (healthy.T == tumors)).mean(1)
    return result


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """AUC by experiment and arm, and its paired difference to `real-and-healthy`."""
    held: dict[str, dict[str, dict[tuple[str, int, int], np.ndarray]]] = {}
    for result in results:
        job = result["job"]
        own = held.setdefault(job["experiment"], {}).setdefault(job["arm"]["name"], {})
        for name, scan in result["scans"].items():
            own[name, job["fold"], job["seed"]] = shares(scan)
    lines = ["| experiment | arm | AUC | minus real-and-healthy |", "| --- | --- | --- | --- |"]
    for experiment, arms in held.items():
        reference = arms.get("real-and-healthy", {})
        for arm, own in arms.items():
            value = np.concatenate(list(own.values())).mean()
            common = sorted(set(own) & set(reference))
            words = "-"
            if common and arm != "real-and-healthy":
                differences = {key: own[key] - reference[key] for key in common}
                words = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(differences))
            lines.append(f"| {experiment} | {arm} | {value:.3f} | {words} |")
    return "\n".join(lines) + "\n"


def interval(values: Mapping[tuple[str, int, int], np.ndarray]) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of a bootstrap over scans, tumours and seeds."""
    names, seeds = sorted({k[0] for k in values}), sorted({k[2] for k in values})
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen, own_seeds = rng.choice(names, len(names)), rng.choice(seeds, len(seeds))
        picked: list[float] = []
        for name in chosen:
            cells = [v for k, v in values.items() if k[0] == name for s in own_seeds if k[2] == s]
            if not cells:
                continue
            tumors = rng.integers(len(cells[0]), size=len(cells[0]))
            picked += [float(v) for cell in cells for v in cell[tumors]]
        if picked:
            drawn.append(np.mean(picked))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.concatenate(list(values.values())).mean()), float(low), float(high)


if __name__ == "__main__":
    main()
