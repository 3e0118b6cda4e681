"""Run one job: gather its scans, train, predict, score."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import environment
from benchmarks.downstream.arms import ARMS
from benchmarks.downstream.experiments import Job
from benchmarks.downstream.exposure import view
from benchmarks.downstream.files import write_json, write_whole
from benchmarks.downstream.generators import make_generator
from benchmarks.downstream.network import UNet
from benchmarks.downstream.pack import Scan
from benchmarks.downstream.training import Settings, Views, predict, train
from benchmarks.downstream.versions import Version, apply, cached_versions
from tumorsynth.evaluation.detection import ScanMatches, match_scan

CANDIDATE, MASK = 0.1, 0.5  # probability of a candidate's voxels, and of the mask for Dice
LEAST_IOU = 0.1  # of a candidate and the tumour that it finds: one that fills the organ finds none


def run_job(
    job: Job, scans: Mapping[str, Scan], settings: Settings, out: Path, device: str
) -> dict[str, Any]:
    """Train and test one job; leave jobs/NAME.json, weights/NAME.pt and maps/NAME.npz."""
    start = time.process_time()
    annotated, others, made = gather(job, scans, settings, out, device)
    before = time.process_time() - start
    checkpoint = out / "checkpoints" / f"{job.name}-{fingerprint(job, settings)}.pt"
    network, told = train(annotated, others, settings, job.seed, checkpoint, device)
    start = time.process_time()
    maps = {
        name: predict(network, scans[name].hu, scans[name].organ, settings.side, device)
        for name in (*job.tests, *job.healthy_tests)
    }
    result = {
        "fingerprint": fingerprint(job, settings),
        "job": describe(job),
        "settings": asdict(settings),
        "environment": environment(),
        "synthetic_tumors": made,
        "cpu_seconds": {
            "versions": round(before, 1),
            "training": told["cpu_seconds"],
            "test": round(time.process_time() - start, 1),
        },
        "losses": told["losses"],
        "patients": {name: scans[name].patient for name in maps},
        "scans": {name: score(job, scans[name], found).as_dict() for name, found in maps.items()},
    }
    _save_maps(out / "maps" / f"{job.name}.npz", maps, scans)
    save_weights(out / "weights" / f"{job.name}.pt", network)
    write_json(out / "jobs" / f"{job.name}.json", result)
    checkpoint.unlink(missing_ok=True)
    return result


def describe(job: Job) -> dict[str, Any]:
    """Return a job as JSON types."""
    described: dict[str, Any] = json.loads(json.dumps(asdict(job)))
    return described


def gather(
    job: Job, scans: Mapping[str, Scan], settings: Settings, out: Path, device: str
) -> tuple[Views, Views | None, int]:
    """Return the scans of both halves of a batch, and how many synthetic tumours there are."""
    annotated = {n: [view(scans[n], taught)] for n, taught in job.annotated.items()}
    healthy = {n: [view(scans[n], ())] for n in job.healthy}
    if job.arm.others == "annotated":
        return annotated, None, 0
    if job.arm.others == "healthy":
        return annotated, healthy, 0
    if job.arm.others == "more":
        return annotated, {n: [view(scans[n], taught)] for n, taught in job.more.items()}, 0
    sources = healthy if job.arm.alone else {**healthy, **annotated}
    versions = make_versions(job, list(sources), scans, settings, out, device)
    if job.arm.keep:
        versions = filtered(job, versions, scans, settings, out, device)
    synthetic = {
        n: [apply(scans[n], source, version) for version in versions[n]]
        for n, (source,) in sources.items()
    }
    made = sum(version.count for own in versions.values() for version in own)
    if not made:
        raise ValueError(f"{job.name}: no tumour could be made; look at the arm's options")
    return (synthetic if job.arm.alone else annotated), synthetic, made


def make_versions(
    job: Job,
    names: Sequence[str],
    scans: Mapping[str, Scan],
    settings: Settings,
    out: Path,
    device: str,
) -> dict[str, list[Version]]:
    """Make or read versions of scans with the arm's tumours."""
    options = {**job.synthesis, **job.arm.options}
    generator, key = make_generator(job, scans)
    key = json.loads(json.dumps({**key, "options": options}))
    folder = out / "versions"
    return {
        n: cached_versions(folder, key, generator, options, scans[n], settings.versions, device)
        for n in names
    }


def filtered(
    job: Job,
    versions: Mapping[str, Sequence[Version]],
    scans: Mapping[str, Scan],
    settings: Settings,
    out: Path,
    device: str,
) -> dict[str, list[Version]]:
    """Keep the half of each scan's tumours that the network of `real` marks best, or worst.

    A tumour's mark is the mean probability over its voxels.
    """
    teacher = load_weights(out / "weights" / f"{teacher_of(job).name}.pt", settings, device)
    kept = {}
    for name, own in versions.items():
        scan, marks = scans[name], []
        for k, version in enumerate(own):
            shown = apply(scan, view(scan, ()), version)
            for tumor in range(1, version.count + 1):
                voxels = version.index[version.tumor & (version.owner == tumor)]
                if voxels.size:
                    marks.append(
                        (_mark(teacher, shown.hu, voxels, settings.side, device), k, tumor)
                    )
        marks.sort(reverse=job.arm.keep == "seen")
        chosen = marks[: (len(marks) + 1) // 2]
        kept[name] = [
            version.only([tumor for _, at, tumor in chosen if at == k])
            for k, version in enumerate(own)
            if any(at == k for _, at, _ in chosen)
        ]
    return kept


def _mark(
    teacher: UNet, hu: np.ndarray, voxels: np.ndarray, side: Sequence[int], device: str
) -> float:
    """Mean probability over a tumour's voxels, from one window around it."""
    place = np.stack(np.unravel_index(voxels, hu.shape))
    furthest = np.maximum(0, np.array(hu.shape) - side)
    low = np.clip(place.mean(1).round().astype(int) - np.array(side) // 2, 0, furthest)
    cut = hu[tuple(slice(a, a + n) for a, n in zip(low, side, strict=True))]
    found = predict(teacher, cut, np.ones(cut.shape, bool), side, device)
    inside = place - low[:, None]
    kept = ((inside >= 0) & (inside < np.array(cut.shape)[:, None])).all(0)
    return float(found[tuple(inside[:, kept])].mean())


def teacher_of(job: Job) -> Job:
    """The job of `real` whose network filters this job's tumours."""
    return replace(job, arm=ARMS["real"])


def score(job: Job, scan: Scan, probability: np.ndarray) -> ScanMatches:
    """Match candidates inside the organ; tumours that are not tested count neither way."""
    matches = match_scan(
        probability,
        scan.lesions > 0,
        scan.spacing,
        inside=scan.organ,
        candidate_threshold=CANDIDATE,
        mask_threshold=MASK,
        least_iou=LEAST_IOU,
        instances=scan.lesions,
    )
    numbers, first = np.unique(scan.lesions, return_index=True)
    order = [int(k) for k in numbers[np.argsort(first)] if k]
    tested = set(job.tests.get(scan.name, ()))
    tumors = tuple(
        replace(match, diameter_mm=scan.diameters_mm[k - 1])
        for k, match in zip(order, matches.tumors, strict=True)
        if k in tested
    )
    return replace(matches, tumors=tumors, outside=len(matches.tumors) - len(tumors))


def save_weights(path: Path, network: UNet) -> None:
    """Write a network in half precision."""
    buffer = io.BytesIO()
    torch.save({k: v.half() for k, v in network.state_dict().items()}, buffer)
    write_whole(path, buffer.getvalue())


def load_weights(path: Path, settings: Settings, device: str) -> UNet:
    """Read a network of another job."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; put the arm real before arms that filter")
    network = UNet(settings.channels).to(device)
    held = torch.load(path, map_location=device, weights_only=True)
    network.load_state_dict({k: v.float() for k, v in held.items()})
    return network.eval()


def _save_maps(path: Path, maps: Mapping[str, np.ndarray], scans: Mapping[str, Scan]) -> None:
    """Keep the probabilities of the organs' voxels, so that scores can be computed again."""
    buffer = io.BytesIO()
    inside = {n: found[scans[n].organ].astype(np.float16) for n, found in maps.items()}
    np.savez_compressed(buffer, **inside)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def rescore(job: Job, scans: Mapping[str, Scan], out: Path) -> None:
    """Compute the scores of a finished job again from its probabilities."""
    path = out / "jobs" / f"{job.name}.json"
    result = json.loads(path.read_text())
    with np.load(out / "maps" / f"{job.name}.npz") as held:
        for name in held.files:
            probability = np.zeros(scans[name].hu.shape, np.float32)
            probability[scans[name].organ] = held[name]
            result["scans"][name] = score(job, scans[name], probability).as_dict()
    write_json(path, result)


def fingerprint(job: Job, settings: Settings) -> str:
    """What a job's result depends on: its description and the settings."""
    words = json.dumps([describe(job), asdict(settings)], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:12]
