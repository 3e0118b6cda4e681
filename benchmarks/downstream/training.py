"""Train one network; an interrupted training resumes where it was, with the same crops."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.downstream.exposure import ANNOTATED, OTHERS, View, crops_of, scale
from benchmarks.downstream.files import write_whole
from benchmarks.downstream.network import UNet

Views = Mapping[str, Sequence[View]]


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run share.

    Attributes:
        side: of a crop, in voxels.
        channels: of the network's first level.
        steps: of training.
        half: crops of each half of a batch: annotated ones and others.
        rate: learning rate, after ``warm_up`` steps.
        warm_up: steps.
        averaging: steps over which the tested weights are averaged, exponentially.
        versions: of each scan with synthetic tumours.
        save_every: steps between checkpoints.
    """

    side: tuple[int, int, int] = (64, 64, 32)
    channels: int = 16
    steps: int = 4000
    half: int = 1
    rate: float = 1e-3
    warm_up: int = 100
    averaging: int = 500
    versions: int = 24
    save_every: int = 100


def loss_of(logits: Tensor, tumor: Tensor, counted: Tensor) -> Tensor:
    """Cross entropy plus Dice of the batch, where the loss counts."""
    weight = counted.sum().clamp(min=1)
    entropy = F.binary_cross_entropy_with_logits(logits, tumor, reduction="none")
    probability = logits.sigmoid() * counted
    overlap = (probability * tumor).sum()
    dice = (2 * overlap + 1) / (probability.sum() + (tumor * counted).sum() + 1)
    return (entropy * counted).sum() / weight + 1 - dice


def train(
    annotated: Views,
    others: Views | None,
    settings: Settings,
    seed: int,
    checkpoint: Path,
    device: str = "cpu",
    at: Mapping[int, Any] | None = None,
) -> tuple[UNet, dict[str, Any]]:
    """Train a network.

    Args:
        annotated: scans of the shared half of each batch.
        others: scans of the other half; None takes the annotated ones again.
        settings: of the run.
        seed: of weights and crops.
        checkpoint: file that is written while training, and read if it is there.
        device: of the network.
        at: called with the averaged network after these steps, for curves.

    Returns:
        The network with averaged weights, and what the training was like.
    """
    torch.manual_seed(seed)
    network = UNet(settings.channels).to(device)
    averaged = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=1e-4)
    step, seconds, losses = 0, 0.0, []
    if checkpoint.is_file():
        held = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(held["network"])
        averaged.load_state_dict(held["averaged"])
        optimizer.load_state_dict(held["optimizer"])
        step, seconds, losses = held["step"], held["seconds"], held["losses"]
    start, recent = time.process_time(), []
    while step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / settings.warm_up)
        shared = crops_of(seed, step, ANNOTATED, settings.half, annotated, settings.side)
        rest = crops_of(seed, step, OTHERS, settings.half, others or annotated, settings.side)
        batch = torch.stack(shared + rest).to(device)
        image, tumor, counted = batch[:, :1], batch[:, 1:2], batch[:, 2:]
        loss = loss_of(network(image), tumor, counted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        step += 1
        share = max(1 / settings.averaging, 1 / step)
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, share)
        recent.append(loss.detach())
        if step % settings.save_every == 0 or step == settings.steps:
            losses.append(round(float(torch.stack(recent).mean()), 4))
            recent = []
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step}; lower the rate")
            now = seconds + time.process_time() - start
            _save(checkpoint, network, averaged, optimizer, step, now, losses)
        if at and step in at:
            at[step](averaged)
    told = {"cpu_seconds": round(seconds + time.process_time() - start, 1), "losses": losses}
    return averaged.eval(), told


def _save(
    path: Path,
    network: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    losses: list[float],
) -> None:
    buffer = io.BytesIO()
    state = {
        "network": network.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "losses": losses,
    }
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


@torch.no_grad()
def predict(
    network: nn.Module, hu: np.ndarray, organ: np.ndarray, side: Sequence[int], device: str = "cpu"
) -> np.ndarray:
    """Return the probability of tumour (X, Y, Z) float32, 0 outside the organ.

    Windows of the crop's size overlap by half; their middles weigh more.
    """
    size = np.array(side)
    padding = [(0, max(0, s - n)) for s, n in zip(size, hu.shape, strict=True)]
    image = scale(torch.from_numpy(np.pad(hu, padding, mode="edge").astype(np.float32)))
    inside = np.pad(organ, padding)
    total, weights = torch.zeros(image.shape), torch.zeros(image.shape)
    x, y, z = (torch.hann_window(n + 2, periodic=False)[1:-1] for n in side)
    weight = x[:, None, None] * y[:, None] * z + 1e-3
    starts = [
        sorted({min(a, n - s) for a in range(0, n, s // 2)})
        for n, s in zip(image.shape, side, strict=True)
    ]
    for low in np.array(np.meshgrid(*starts)).reshape(3, -1).T:
        where = tuple(slice(a, a + s) for a, s in zip(low, size, strict=True))
        if not inside[where].any():
            continue
        logits = network(image[where][None, None].to(device))[0, 0].float().cpu()
        total[where] += logits * weight
        weights[where] += weight
    probability = (total / weights.clamp(min=1e-6)).sigmoid().numpy()
    cut = tuple(slice(0, n) for n in hu.shape)
    return np.where(organ, probability[cut], 0).astype(np.float32)
