"""One run of downstream.py: a network trained in one arm, on one fold, and its scores.

The networks, loss, loaders and sliding window are MONAI's; devices and processes are Lightning
Fabric's. Nothing here depends on the arm but the scans it lists and the synthesis on the batch: for
one seed all arms start from the same weights and take the same number of steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset, set_track_meta
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet, SwinUNETR, UNet
from monai.optimizers import WarmupCosineSchedule
from scipy import ndimage
from torch.utils.data import RandomSampler, Subset

from benchmarks.downstream.downstream_data import ORGAN, TUMOR, Case, centre_of, random_part
from tumorsynth.evaluation.metrics import CaseScores, scores
from tumorsynth.intensity import Scaled
from tumorsynth.monai import BatchSynthesizeTumord
from tumorsynth.synthesizer import SynthesizeTumor

NETWORKS = ("unet", "dynunet", "swinunetr")


@dataclass(frozen=True)
class Settings:
    """What all runs of a benchmark share; the defaults are the paper's.

    Its appendix E.2: 1 mm, crops of 96^3, window, warm-up and cosine, overlap 0.75, tumour kept in
    the organ. Learning rate, weight decay, epochs, batch, augmentation and synthesis on half of the
    healthy crops are those of the authors' program.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm
    crop: tuple[int, int, int] = (96, 96, 96)  # voxels
    window: tuple[float, float] = (-175.0, 250.0)  # HU
    steps: int = 0  # optimiser steps; 0: epochs decide
    epochs: int = 2000  # through the annotated and healthy scans of the fold
    warmup: float = 0.05  # of the steps
    lr: float = 4e-4
    weight_decay: float = 1e-5
    batch: int = 2  # crops, per process
    overlap: float = 0.75
    keep_mm: float = 0.0  # a predicted tumour may lie this far outside the organ
    channels: int = 0  # of the networks' first level; 0: the published 16, 32 and 48
    centre_on: str = "organ"  # half of the crops: on any voxel of the organ, or "tumor" where it is
    p: float = 0.5  # synthesis, per crop of a scan that may have it
    synthesize_on: str = "healthy"  # or "all"
    size_mm: tuple[float, float] = (5.0, 20.0)
    count: tuple[int, int] = (1, 3)
    pool: int = 0  # versions of each scan with synthetic tumours, made once; 0: new ones each time


@dataclass(frozen=True)
class Arm:
    """What the networks are trained on.

    generator: paints tumours, a bundled name or a folder; None: real tumours alone.
    with_healthy: whether the scans without tumours take part.
    """

    name: str
    generator: str | None = None
    with_healthy: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # of SynthesizeTumor


def make_network(name: str, settings: Settings) -> torch.nn.Module:
    """MONAI's network of that name for 1 channel and 3 classes."""

    def channels(*published: int) -> list[int]:
        first = settings.channels or published[0]
        return [round(c * first / published[0]) for c in published]

    levels = 4 if min(settings.crop) < 64 else 5  # fewer where the crop has no room for more
    kernels, strides = _nnunet_plan(settings.spacing, settings.crop)
    factor = {"unet": 2 ** (levels - 1), "swinunetr": 32}.get(name, np.prod(strides, 0))
    if (np.asarray(settings.crop) % factor).any() or min(settings.crop) < 2 * np.max(factor):
        raise ValueError(
            f"{name} needs crops of a multiple of {factor} voxels, twice that at least, "
            f"got {settings.crop}; change --crop"
        )
    if name == "unet":
        widths = channels(16, 32, 64, 128, 256)[:levels]
        return UNet(3, 1, 3, widths, [2] * (levels - 1), num_res_units=2)
    if name == "dynunet":
        widths = channels(32, 64, 128, 256, 320, 320)[: len(strides)]
        return DynUNet(3, 1, 3, kernels, strides, strides[1:], filters=widths, norm_name="instance")
    if name == "swinunetr":
        feature_size = 12 * max(1, round((settings.channels or 48) / 12))  # heads need a multiple
        return SwinUNETR(1, 3, feature_size=feature_size)
    raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")


def _nnunet_plan(spacing: Sequence[float], crop: Sequence[int]) -> tuple[list, list]:
    """Kernels and strides by nnU-Net's rule, as in MONAI's DynUNet tutorial: halve the axes whose
    spacing is at most twice the finest, down to 4 voxels, in at most six levels."""
    mm, size = np.asarray(spacing, float), np.asarray(crop)
    kernels, strides = [], [[1, 1, 1]]
    while len(strides) < 6:
        fine = mm <= 2 * mm.min()
        halve = fine & (size >= 8)
        kernels.append([3 if f else 1 for f in fine])
        if not halve.any():
            break
        strides.append([2 if h else 1 for h in halve])
        mm, size = mm * np.where(halve, 2, 1), size // np.where(halve, 2, 1)
    else:
        kernels.append([3, 3, 3])
    return kernels, strides


def train(
    fabric: Any,
    network: str,
    arm: Arm,
    cases: Sequence[Case],
    loaded: Any,
    index: dict[str, int],
    settings: Settings,
    seed: int,
    workers: int = 0,
    pool: dict[str, list[dict[str, Any]]] | None = None,
    checkpoint: Path | None = None,
    save_every: int = 1000,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The trained network and how it went.

    cases: to train on. loaded: a dataset of all scans on the working grid; index: each case's place
    in it. pool: what `make_pool` made for this arm. checkpoint: written every ``save_every`` steps;
    where it is there already, training goes on from it, with crops drawn anew.
    """
    used = [c for c in cases if arm.with_healthy or not c.healthy]
    steps = settings.steps or max(
        1, settings.epochs * len(cases) // (settings.batch * fabric.world_size)
    )
    names = {c.name for c in used}
    torch.manual_seed(seed)
    model = make_network(network, settings)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = WarmupCosineSchedule(optimizer, round(settings.warmup * steps), steps)
    model, optimizer = fabric.setup(model, optimizer)
    loss_of = DiceCELoss(
        to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-6
    )
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": 0, "made": 0}
    if checkpoint is not None and checkpoint.is_file():
        fabric.load(checkpoint, state)
    first = state["step"]
    # by process and by where it starts: what is drawn depends on these and the seed alone
    own = seed * 1000 + fabric.global_rank + 10**6 * first
    crops = random_part(settings, pool).set_random_state(own)
    dataset = Dataset(Subset(loaded, [index[c.name] for c in used]), crops)
    sampler = RandomSampler(
        dataset,
        num_samples=max(1, steps - first) * settings.batch,
        generator=torch.Generator().manual_seed(own),
    )
    torch.manual_seed(own)  # MONAI's loader seeds its workers from it
    loader = DataLoader(dataset, workers, batch_size=settings.batch, sampler=sampler)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    synthesize = None if settings.pool else _synthesis(arm, settings, own)
    start, recent = time.process_time(), deque(maxlen=20)
    model.train()
    set_track_meta(False)  # of crops; keeping track takes longer than cropping
    try:
        for batch in islice(loader, steps - first):
            part = {k: batch[k] for k in ("image", "label", "healthy")}
            if synthesize is not None:
                part = synthesize(part)
                state["made"] += sum(record["applied"] for record in synthesize.report)
            loss = loss_of(model(part["image"]), part["label"])
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent.append(loss.detach())
            state["step"] += 1
            if state["step"] % save_every == 0 or state["step"] == steps:
                told_loss = float(torch.stack(list(recent)).mean())
                if not np.isfinite(told_loss):
                    raise ValueError(
                        f"the loss is not finite in {arm.name}, {network}, step {state['step']}; "
                        f"lower --lr {settings.lr}"
                    )
                if checkpoint is not None and state["step"] < steps:
                    fabric.save(checkpoint, state)
                    fabric.print(f"{checkpoint.stem}: step {state['step']}, loss {told_loss:.4f}")
    finally:
        set_track_meta(True)
    told = {
        "steps": state["step"],
        "scans": len(used),
        "scans_listed_healthy": sum(c.healthy for c in used),
        "synthetic_tumors": state["made"],
        "synthetic_versions": sum(len(v) for n, v in (pool or {}).items() if n in names),
        "loss_at_the_end": round(float(torch.stack(list(recent)).mean()), 4),
        "cpu_seconds_training": round(time.process_time() - start, 1),
    }
    return model, told


def make_pool(
    arm: Arm, cases: Sequence[Case], loaded: Any, index: dict[str, int], settings: Settings
) -> dict[str, list[dict[str, Any]]]:
    """Versions of each scan that may have synthetic tumours, made on the whole scan in HU.

    The same whatever the network, the fold and the seed are: a scan's versions depend on the scan
    and the generator alone, and are trained on where the scan is.
    """
    if arm.generator is None or not settings.pool:
        return {}
    synth = SynthesizeTumor(arm.generator, **_options(arm, settings))
    versions: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        data = loaded[index[case.name]]
        versions[case.name] = []
        if settings.synthesize_on == "healthy" and not data["healthy"]:
            continue
        for k in range(settings.pool):
            image, label = synth(
                data["image"],
                data["label"],
                spacing=settings.spacing,
                seed=index[case.name] * settings.pool + k,
            )
            if any(record["applied"] for record in synth.report):
                version = {"image": image, "label": label, "centre": centre_of(label)}
                versions[case.name].append(version)
    return versions


def _options(arm: Arm, settings: Settings) -> dict[str, Any]:
    fixed = {"organ_labels": ORGAN, "tumor_label": TUMOR}
    return {**fixed, "size_mm": settings.size_mm, "count": settings.count, **arm.options}


def _synthesis(arm: Arm, settings: Settings, seed: int) -> BatchSynthesizeTumord | None:
    """Tumours on the collated batch, on its device, after the augmentation, as published."""
    if arm.generator is None:
        return None
    synthesize = BatchSynthesizeTumord(
        "image",
        "label",
        prob=settings.p,
        spacing=settings.spacing,
        when=(lambda d: d["healthy"]) if settings.synthesize_on == "healthy" else None,
        generator=arm.generator,
        intensity=Scaled(*settings.window, 0.0, 1.0),
        **_options(arm, settings),
    )
    return synthesize.set_random_state(seed)


@torch.no_grad()
def predict(
    model: torch.nn.Module, data: dict[str, Any], settings: Settings, device: Any
) -> np.ndarray:
    """The label map (X, Y, Z) of one scan on the working grid, post-processed."""
    low, high = settings.window
    image = data["image"].as_tensor()[None].to(device)
    scaled = ((image - low) / (high - low)).clamp(0, 1)
    model.eval()
    logits = sliding_window_inference(
        scaled, settings.crop, 2, model, overlap=settings.overlap, mode="gaussian"
    )
    found = logits[0].argmax(0).byte().cpu().numpy()
    organ = data["organ"][0].numpy() > 0 if "organ" in data else None
    return postprocess(found, organ, settings)


def postprocess(found: np.ndarray, organ: np.ndarray | None, settings: Settings) -> np.ndarray:
    """Tumour kept where the organ is, or at most keep_mm from it.

    organ: a segmenter's mask, as in the paper; without one the largest part of what the network
    itself calls organ or tumour.
    """
    if organ is None:
        parts, count = ndimage.label(found > 0)
        organ = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else found > 0
    if settings.keep_mm > 0 and organ.any():
        organ = ndimage.distance_transform_edt(~organ, settings.spacing) <= settings.keep_mm
    return np.where((found == TUMOR) & ~organ, 0, found).astype(np.uint8)


def test(
    fabric: Any,
    model: torch.nn.Module,
    cases: Sequence[Case],
    loaded: Any,
    index: dict[str, int],
    settings: Settings,
) -> dict[str, CaseScores]:
    """Scores by case, on the working grid; every process scores its share and gets all."""
    own: dict[str, CaseScores] = {}
    for case in cases[fabric.global_rank :: fabric.world_size]:
        data = loaded[index[case.name]]
        found = predict(model, data, settings, fabric.device)
        own[case.name] = scores(found, data["label"][0].numpy(), settings.spacing, TUMOR, (ORGAN,))
    if fabric.world_size == 1:
        return own
    shares: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(shares, own)
    return {name: score for share in shares for name, score in share.items()}
