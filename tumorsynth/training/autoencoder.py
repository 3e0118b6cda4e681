"""Stage 1: train an autoencoder on CT, annotated or not (paper 3.1).

tumorsynth train autoencoder dataset.json -o RUN/ae
python -m tumorsynth.training.autoencoder pack.npz -o RUN/ae    (needs torch only)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.training.config import (
    PRESETS,
    AutoencoderTraining,
    Hardware,
    configured,
    parse_arguments,
)
from tumorsynth.training.cubes import case_shares, sample_cube
from tumorsynth.training.data import (
    Case,
    Cases,
    check_cases,
    complain,
    counted,
    fingerprint,
    given,
    split,
)
from tumorsynth.training.discriminators import Adversaries, random_slices
from tumorsynth.training.engine import (
    Average,
    ahead,
    places,
    random_of,
    train_loop,
    update,
)
from tumorsynth.training.evaluate import autoencoder_metrics
from tumorsynth.training.folders import (
    UNMEASURED,
    facts,
    no_licence,
    save_autoencoder,
)
from tumorsynth.training.launch import check_hardware, launch, usable_precision
from tumorsynth.training.log import millions, say
from tumorsynth.training.losses import (
    ReconstructionLoss,
    commitment,
    feature_matching,
    hinge_discriminator_loss,
    hinge_generator_loss,
    slice_perceptual,
)
from tumorsynth.training.networks import starting_autoencoder
from tumorsynth.training.pictures import Pair, side_by_side
from tumorsynth.training.run_folder import RunFolder, claimed, identity_of, written

CROPS, RANGE, PICTURE, SLICES = 0, 1, 2, 3  # purposes of random streams


def train(
    cases: Cases,
    output: Path,
    config: AutoencoderTraining = AutoencoderTraining(),  # noqa: B008 (frozen)
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    *,
    resume: bool = False,
    init: str | None = None,
    card: dict[str, Any] | None = None,
) -> Autoencoder:
    """Train, and write an autoencoder folder into ``output``; returns it, on the CPU.

    cases: or what reads them, called once all else is checked. init: an autoencoder to start from,
    as for `read_autoencoder`. Raises ValueError for every problem with the cases before anything
    starts; see `train_loop` for what happens later.

    Cases that are held out are not trained on: the result is measured on them, or else on the
    others, and the figures and a grid of pictures are written into the folder. Killed while
    measuring, the folder is whole but for them, and resuming measures again.
    """
    check_hardware(hardware)
    model, started = starting_autoencoder(config, init)
    if config.patch_size % model.config.factor:
        raise ValueError(
            f"--patch-size must be a multiple of {model.config.factor}, got {config.patch_size}"
        )
    run = RunFolder(
        output, identity_of(config, stage=1, init=started and started["sha256"]), resume
    )
    cases = given(cases)
    complain(check_cases(cases, config.patch_size))
    cases, held_out = split(cases)
    run.complete(scans={c.name: fingerprint(c) for c in cases})
    config = replace(config, precision=usable_precision(hardware, config.precision))
    fabric = launch(hardware, config.precision)
    with claimed(output):
        stage = AutoencoderStage(fabric, model, cases, config, hardware.workers)
        title = f"autoencoder of {millions(model)} M parameters"
        seconds = train_loop(fabric, run, stage, config, title)
        result = cast(Autoencoder, stage.average.average)
        if fabric.is_global_zero:
            result.to(fabric.device).eval().requires_grad_(False)
            stage.measure_range(result)
            stage.fit_detail(result)
            training = {
                **asdict(config),
                **facts(cases, held_out, fabric, seconds),
            }
            full = {
                "name": output.name,
                "licence": no_licence(started),
                **(card or {}),
                "metrics": {"skipped": UNMEASURED},
                "training": training,
                **({"init": started} if started else {}),
            }
            with written(run):
                save_autoencoder(result, output, full)
                say(fabric, f"measuring on {counted(len(held_out or cases), 'scan')} ...")
                full["metrics"] = autoencoder_metrics(result, cases, held_out, config.steps, output)
                save_autoencoder(result.to("cpu"), output, full)
        fabric.barrier()
    return result


class AutoencoderStage:
    """The networks, optimisers and losses of stage 1; `train_loop` drives it."""

    def __init__(
        self,
        fabric: Any,
        model: Autoencoder,
        cases: list[Case],
        config: AutoencoderTraining,
        workers: int,
    ):
        self.fabric, self.config, self.cases, self.workers = fabric, config, cases, workers
        self.model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.reconstruct, self.wrapped = fabric.setup(Reconstruct(model), self.optimiser)
        self.average = Average(copy.deepcopy(model), model, config.ema)
        self.reconstruction = ReconstructionLoss()
        self.perceptual = slice_perceptual(config.perceptual).to(fabric.device)
        self.adversaries: Adversaries | None = None
        if config.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.adversaries = Adversaries(config.discriminator_width)
            self.adversary_optimiser = torch.optim.AdamW(
                self.adversaries.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.9)
            )
            self.judge, self.wrapped_adversary = fabric.setup(
                self.adversaries, self.adversary_optimiser
            )
        self.shares = case_shares(cases)
        self.places = places(fabric, config)
        self.batches: Iterator[list[Tensor]] | None = None

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimiser": self.optimiser, "average": self.average}
        if self.adversaries is not None:
            parts["adversaries"] = self.adversaries
            parts["adversary_optimiser"] = self.adversary_optimiser
        return parts

    def crops(self, step: int) -> list[Tensor]:
        """This process's cubes of a step, one tensor (b, 1, D, H, W) in [-1, 1] a part."""
        return [
            torch.stack([self._crop(CROPS, step, place) for place in part]) for part in self.places
        ]

    def _crop(self, *stream: int) -> Tensor:
        rng = random_of(self.config.seed, *stream)
        return sample_cube(self.cases, self.shares, self.config, rng)

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        if self.batches is None:
            self.batches = ahead(self.crops, iter(range(step, self.config.steps)), self.workers)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        parts = next(self.batches)
        told: dict[str, Tensor] = {}
        for index, (part, crops) in enumerate(zip(self.places, parts, strict=True)):
            last = index == len(parts) - 1
            losses = self._part(step, part, crops.to(self.fabric.device), last)
            for name, value in losses.items():
                told[name] = told.get(name, torch.zeros_like(value)) + value.detach() / len(parts)
        update(self.model, self.wrapped, self.config.clip)
        if self._judging(step):
            assert self.adversaries is not None
            update(self.adversaries, self.wrapped_adversary, self.config.clip)
        self.average.update(step)
        return told

    def _part(self, step: int, part: list[int], x: Tensor, last: bool) -> dict[str, Tensor]:
        """Losses and gradients of one part of a step: of the cubes x at these places."""
        c, parts = self.config, self.config.accumulate
        with self.fabric.no_backward_sync(self.reconstruct, enabled=not last):
            with self.fabric.autocast():
                recon, latent, quantised = self.reconstruct(x)
            recon, latent, quantised = recon.float(), latent.float(), quantised.float()
            losses = {"l1": self.reconstruction(recon, x)}
            loss = losses["l1"]
            if self.model.codebook is not None:
                losses["commitment"] = commitment(latent, quantised)
                loss = loss + c.commitment_weight * losses["commitment"]
                if c.dead_code_every and last and (step + 1) % c.dead_code_every == 0:
                    self.model.codebook.restart_dead(latent.detach())
            else:
                loss = loss + c.latent_weight * latent.square().mean()
            if c.perceptual != "none":
                losses["perceptual"] = self.perceptual(recon, x)
                loss = loss + c.perceptual_weight * losses["perceptual"]
            slices: list[Tensor] = []
            if self._judging(step):
                assert self.adversaries is not None
                slices = self._slices(step, part, x, recon)
                self.adversaries.requires_grad_(False)
                with self.fabric.autocast():
                    with torch.no_grad():
                        real = self.adversaries(slices[0], x)
                    fake = self.adversaries(slices[1], recon)
                self.adversaries.requires_grad_(True)
                for (_, real_features), (logits, features) in zip(real, fake, strict=True):
                    loss = loss + c.adversarial_weight * (
                        hinge_generator_loss(logits.float())
                        + c.feature_weight * feature_matching(real_features, features)
                    )
            losses = {"loss": loss, **losses}
            self.fabric.backward(loss / parts)
        if c.adversarial_weight:
            losses["discriminators"] = torch.zeros_like(loss)
        if slices:
            with self.fabric.no_backward_sync(self.judge, enabled=not last):
                with self.fabric.autocast():
                    both = self.judge(
                        torch.cat([slices[0], slices[1].detach()]), torch.cat([x, recon.detach()])
                    )
                judged = torch.zeros_like(loss)
                for logits, _ in both:
                    judged = judged + hinge_discriminator_loss(*logits.float().chunk(2))
                self.fabric.backward(judged / parts)
            losses["discriminators"] = judged
        return losses

    def _slices(self, step: int, part: list[int], x: Tensor, recon: Tensor) -> list[Tensor]:
        """Slices of the scans and of their reconstructions: which, only step and place decide."""
        drawn = []
        for index, place in enumerate(part):
            number = int(random_of(self.config.seed, SLICES, step, place).integers(2**62))
            one = (v[index : index + 1] for v in (x, recon))
            drawn.append(random_slices(*one, generator=torch.Generator().manual_seed(number)))
        return [torch.cat(volume) for volume in zip(*drawn, strict=True)]

    def _judging(self, step: int) -> bool:
        late = step >= self.config.adversarial_start * self.config.steps
        return self.adversaries is not None and late

    @torch.no_grad()
    def measure_range(self, model: Autoencoder) -> None:
        """Scale of a continuous latent: the 0.1 and 99.9 percentiles over all channels."""
        if model.codebook is not None:
            return
        latents = []
        for index in range(64):
            crop = self._crop(RANGE, index)[None]
            latents.append(model.encode(crop.to(self.fabric.device)).flatten().float().cpu())
        low, high = np.percentile(torch.cat(latents).numpy(), [0.1, 99.9])
        model.latent_low.fill_(float(low))
        model.latent_high.fill_(float(high))

    def fit_detail(self, model: Autoencoder) -> None:
        """The directions of the detail, from 64 crops with nothing put in."""
        plain = replace(self.config, hollow=0.0)
        streams = (random_of(self.config.seed, RANGE, index) for index in range(64))
        cubes = (sample_cube(self.cases, self.shares, plain, rng)[None] for rng in streams)
        model.fit_detail(cube.to(self.fabric.device) for cube in cubes)

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Four cubes, each beside its reconstruction in three planes; there is no detail yet."""
        model = self.average.average
        pairs: list[Pair] = []
        for index in range(4):
            crop = self._crop(PICTURE, index)[None]
            recon = model(crop.to(self.fabric.device)).cpu()
            middle = [n // 2 for n in crop.shape[2:]]
            pairs.append(((crop[0, 0] + 1) / 2, (recon[0, 0] + 1) / 2, middle))
        return side_by_side(pairs)


class Reconstruct(nn.Module):
    """Cubes -> reconstruction, latent, quantised latent; the codebook learns on the way."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.reconstruct(x)


def main() -> None:
    from tumorsynth.training.reading import load_data

    told = parse_arguments([AutoencoderTraining, Hardware], "autoencoder", _extra)
    preset = PRESETS["autoencoder"][told["preset"]]
    train(
        partial(load_data, Path(told["data"]), Path(told["labels"]) if told["labels"] else None),
        Path(told["out"]),
        configured(AutoencoderTraining, preset, told),
        configured(Hardware, {}, told),
        resume=told["resume"],
        init=told["init"],
    )


def _extra(parser: Any) -> None:
    parser.add_argument("--init", help="a trained folder to start from")


if __name__ == "__main__":
    main()
