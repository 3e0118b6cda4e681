"""Stage 1: train an autoencoder on CT, annotated or not (paper 3.1).

    tumorsynth train autoencoder dataset.json -o RUN/ae
    python -m tumorsynth.training.autoencoder pack.npz -o RUN/ae    (torch only)

RUN/ae becomes an autoencoder folder.
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

from tumorsynth.devices import onto
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
    fingerprint,
    pluralize,
    raise_problems,
    read_cases_now,
    split_held_out,
)
from tumorsynth.training.discriminators import Adversaries, random_slices
from tumorsynth.training.engine import (
    WeightAverage,
    adamw,
    batch_slots,
    prefetch,
    random_stream,
    train_loop,
    update,
)
from tumorsynth.training.evaluate import autoencoder_metrics
from tumorsynth.training.folders import (
    UNMEASURED,
    default_licence,
    save_autoencoder,
    training_facts,
)
from tumorsynth.training.launch import check_hardware, launch, usable_precision
from tumorsynth.training.log import millions, print_status
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
from tumorsynth.training.run_folder import (
    RunFolder,
    explain_write_errors,
    identity_of,
    lock_folder,
)

# purposes of random streams of stage 1
CROP_STREAM, RANGE_STREAM, PICTURE_STREAM, SLICE_STREAM = 0, 1, 2, 3
RANGE_CUBES = 64  # from which the latent's range and the detail are fitted
LATENT_PERCENTILES = (0.1, 99.9)  # that become the normalised latent's range
PICTURE_ROWS = 4
PICTURE_CAPTIONS = ("scan", "reconstruction")


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
    """Train an autoencoder and write an autoencoder folder.

    The finished network is measured on the held-out cases, or else on those trained on; the
    figures and a grid of pictures are written into the folder. If the run is killed while it
    measures, the folder is complete but for these, and resuming measures again.

    Args:
        cases: scans, or a function that reads them; it is called after all other arguments are
            checked. Held-out cases are measured and not trained on.
        output: folder of the run, which becomes the autoencoder folder.
        config: settings of the training.
        hardware: where to run.
        resume: continue from the last checkpoint in ``output``.
        init: an autoencoder to start from, as for `read_autoencoder`.
        card: fields of the card, such as "licence".

    Returns:
        The autoencoder, on the CPU.

    Raises:
        ValueError: for settings or cases that cannot be trained with, before anything starts.
        FileNotFoundError: for a start that does not exist.
        Diverged: see `train_loop`, as for OSError and SystemExit.

    Examples:
        >>> cases = load_pack(Path("ct.npz"))
        >>> autoencoder = train(cases, Path("RUN/ae"), AutoencoderTraining(steps=4000))
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
    read = read_cases_now(cases)
    raise_problems(check_cases(read, config.patch_size))
    training, held_out = split_held_out(read)
    run.complete(scans={c.name: fingerprint(c) for c in training})
    config = replace(config, precision=usable_precision(hardware, config.precision))
    fabric = launch(hardware, config.precision)
    with lock_folder(output):
        stage = AutoencoderStage(fabric, model, training, config, hardware.workers)
        title = f"autoencoder of {millions(model)} M parameters"
        seconds = train_loop(fabric, run, stage, config, title)
        result = cast(Autoencoder, stage.average.average)
        if fabric.is_global_zero:
            result.to(fabric.device).eval().requires_grad_(False)
            stage.measure_range(result)
            stage.fit_detail(result)
            fields = {
                "name": output.name,
                "licence": default_licence(started),
                **(card or {}),
                "metrics": {"skipped": UNMEASURED},
                "training": {
                    **asdict(config),
                    **training_facts(training, held_out, fabric, seconds),
                },
                **({"init": started} if started else {}),
            }
            with explain_write_errors(run):
                save_autoencoder(result, output, fields)
                scans = pluralize(len(held_out or training), "scan")
                print_status(fabric, f"measuring on {scans} ...")
                fields["metrics"] = autoencoder_metrics(
                    result, training, held_out, config.steps, output
                )
                save_autoencoder(result.to("cpu"), output, fields)
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
        self.optimiser = adamw(model, fabric.device, lr=config.lr, weight_decay=config.weight_decay)
        self.reconstruct, self.wrapped = fabric.setup(Reconstruct(model), self.optimiser)
        self.average = WeightAverage(copy.deepcopy(model), model, config.ema)
        self.reconstruction = ReconstructionLoss()
        self.perceptual = slice_perceptual(config.perceptual).to(fabric.device)
        self.adversaries: Adversaries | None = None
        if config.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.adversaries = Adversaries(config.discriminator_width)
            self.adversary_optimiser = adamw(
                self.adversaries, fabric.device, lr=config.discriminator_lr, betas=(0.5, 0.9)
            )
            self.discriminate, self.wrapped_adversary = fabric.setup(
                self.adversaries, self.adversary_optimiser
            )
        self.shares = case_shares(cases)
        self.slots = batch_slots(fabric, config)
        self.batches: Iterator[list[Tensor]] | None = None

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimiser": self.optimiser, "average": self.average}
        if self.adversaries is not None:
            parts["adversaries"] = self.adversaries
            parts["adversary_optimiser"] = self.adversary_optimiser
        return parts

    def cubes(self, step: int) -> list[Tensor]:
        """Return this process's cubes of a step: (b, 1, D, H, W) in [-1, 1] for each part."""
        return [
            torch.stack([self._cube(CROP_STREAM, step, slot) for slot in part])
            for part in self.slots
        ]

    def _cube(self, *stream: int) -> Tensor:
        rng = random_stream(self.config.seed, *stream)
        return sample_cube(self.cases, self.shares, self.config, rng)

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        if self.batches is None:
            self.batches = prefetch(self.cubes, iter(range(step, self.config.steps)), self.workers)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        parts = next(self.batches)
        sums: dict[str, Tensor] = {}
        for index, (slots, cubes) in enumerate(zip(self.slots, parts, strict=True)):
            last = index == len(parts) - 1
            losses = self._part(step, slots, onto(cubes, self.fabric.device), last)
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / len(parts)
        update(self.model, self.wrapped, self.config.clip)
        if self._is_adversarial(step):
            assert self.adversaries is not None
            update(self.adversaries, self.wrapped_adversary, self.config.clip)
        self.average.update(step)
        return sums

    def _part(self, step: int, slots: list[int], x: Tensor, last: bool) -> dict[str, Tensor]:
        """Losses and gradients of one part of a step: of the cubes x in these slots."""
        config = self.config
        with self.fabric.no_backward_sync(self.reconstruct, enabled=not last):
            with self.fabric.autocast():
                recon, latent, quantised = self.reconstruct(x)
            recon, latent, quantised = recon.float(), latent.float(), quantised.float()
            restart = config.dead_code_every and last and (step + 1) % config.dead_code_every == 0
            loss, losses = self._reconstruction_loss(x, recon, latent, quantised, bool(restart))
            slices: list[Tensor] = []
            if self._is_adversarial(step):
                slices = self._slices(step, slots, x, recon)
                loss = self._add_adversarial_loss(loss, slices, x, recon)
            losses = {"loss": loss, **losses}
            self.fabric.backward(loss / config.accumulate)
        if config.adversarial_weight:
            losses["discriminators"] = torch.zeros_like(loss)
        if slices:
            losses["discriminators"] = self._discriminator_step(slices, x, recon, last)
        return losses

    def _reconstruction_loss(
        self, x: Tensor, recon: Tensor, latent: Tensor, quantised: Tensor, restart_codes: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss but for the adversarial part, and its terms for the log."""
        config = self.config
        losses = {"l1": self.reconstruction(recon, x)}
        loss = losses["l1"]
        if self.model.codebook is not None:
            losses["commitment"] = commitment(latent, quantised)
            loss = loss + config.commitment_weight * losses["commitment"]
            if restart_codes:
                self.model.codebook.restart_dead(latent.detach())
        else:
            loss = loss + config.latent_weight * latent.square().mean()
        if config.perceptual != "none":
            losses["perceptual"] = self.perceptual(recon, x)
            loss = loss + config.perceptual_weight * losses["perceptual"]
        return loss, losses

    def _add_adversarial_loss(
        self, loss: Tensor, slices: list[Tensor], x: Tensor, recon: Tensor
    ) -> Tensor:
        """The loss with what the discriminators, which do not learn here, say of the cubes."""
        assert self.adversaries is not None
        config = self.config
        self.adversaries.requires_grad_(False)
        with self.fabric.autocast():
            with torch.no_grad():
                real = self.adversaries(slices[0], x)
            fake = self.adversaries(slices[1], recon)
        self.adversaries.requires_grad_(True)
        for (_, real_features), (logits, features) in zip(real, fake, strict=True):
            loss = loss + config.adversarial_weight * (
                hinge_generator_loss(logits.float())
                + config.feature_weight * feature_matching(real_features, features)
            )
        return loss

    def _discriminator_step(
        self, slices: list[Tensor], x: Tensor, recon: Tensor, last: bool
    ) -> Tensor:
        """Loss and gradients of the discriminators."""
        with self.fabric.no_backward_sync(self.discriminate, enabled=not last):
            with self.fabric.autocast():
                outputs = self.discriminate(
                    torch.cat([slices[0], slices[1].detach()]), torch.cat([x, recon.detach()])
                )
            total = x.new_zeros(())
            for logits, _ in outputs:
                total = total + hinge_discriminator_loss(*logits.float().chunk(2))
            self.fabric.backward(total / self.config.accumulate)
        return total

    def _slices(self, step: int, slots: list[int], x: Tensor, recon: Tensor) -> list[Tensor]:
        """Slices of the scans and of their reconstructions; step and slot decide which."""
        pairs = []
        for index, slot in enumerate(slots):
            seed = int(random_stream(self.config.seed, SLICE_STREAM, step, slot).integers(2**62))
            cubes = (v[index : index + 1] for v in (x, recon))
            pairs.append(random_slices(*cubes, generator=torch.Generator().manual_seed(seed)))
        return [torch.cat(volume) for volume in zip(*pairs, strict=True)]

    def _is_adversarial(self, step: int) -> bool:
        late = step >= self.config.adversarial_start * self.config.steps
        return self.adversaries is not None and late

    @torch.no_grad()
    def measure_range(self, model: Autoencoder) -> None:
        """Set the range of a continuous latent: percentiles 0.1 and 99.9 over all channels."""
        if model.codebook is not None:
            return
        latents = []
        for index in range(RANGE_CUBES):
            cube = self._cube(RANGE_STREAM, index)[None]
            latents.append(model.encode(cube.to(self.fabric.device)).flatten().float().cpu())
        low, high = np.percentile(torch.cat(latents).numpy(), LATENT_PERCENTILES)
        model.latent_low.fill_(float(low))
        model.latent_high.fill_(float(high))

    def fit_detail(self, model: Autoencoder) -> None:
        """Fit the directions of the detail on 64 cubes without holes."""
        plain = replace(self.config, hollow=0.0)
        streams = (random_stream(self.config.seed, RANGE_STREAM, k) for k in range(RANGE_CUBES))
        cubes = (sample_cube(self.cases, self.shares, plain, rng)[None] for rng in streams)
        model.fit_detail(cube.to(self.fabric.device) for cube in cubes)

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Draw four cubes, each beside its reconstruction, which has no detail yet."""
        model = self.average.average
        pairs: list[Pair] = []
        for index in range(PICTURE_ROWS):
            cube = self._cube(PICTURE_STREAM, index)[None]
            recon = model(cube.to(self.fabric.device)).cpu()
            middle = [n // 2 for n in cube.shape[2:]]
            pairs.append(((cube[0, 0] + 1) / 2, (recon[0, 0] + 1) / 2, middle))
        return side_by_side(pairs, PICTURE_CAPTIONS)


class Reconstruct(nn.Module):
    """Map cubes to reconstruction, latent and quantised latent; the codebook learns meanwhile."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.reconstruct(x)


def main() -> None:
    from tumorsynth.training.reading import load_data

    flags = parse_arguments([AutoencoderTraining, Hardware], "autoencoder", _add_flags)
    labels = Path(flags["labels"]) if flags["labels"] else None
    train(
        partial(load_data, Path(flags["data"]), labels),
        Path(flags["out"]),
        configured(AutoencoderTraining, PRESETS["autoencoder"][flags["preset"]], flags),
        configured(Hardware, {}, flags),
        resume=flags["resume"],
        init=flags["init"],
    )


def _add_flags(parser: Any) -> None:
    parser.add_argument("--init", help="a trained folder to start from")


if __name__ == "__main__":
    main()
