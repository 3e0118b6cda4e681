"""Stage 1: train an autoencoder on CT, annotated or not (paper 3.1).

tumorsynth train autoencoder dataset.json -o RUN/ae
python -m tumorsynth.training.autoencoder pack.npz -o RUN/ae    (needs torch only)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tumorsynth.models.autoencoder import LIGHT, Autoencoder, AutoencoderConfig
from tumorsynth.training.config import (
    PRESETS,
    AutoencoderTraining,
    Hardware,
    configured,
    parse_arguments,
)
from tumorsynth.training.data import (
    Case,
    Cases,
    augment,
    check_cases,
    complain,
    counted,
    fingerprint,
    given,
    random_patch,
    split,
    to_unit,
)
from tumorsynth.training.discriminators import PatchDiscriminator, random_slices
from tumorsynth.training.engine import (
    Average,
    ahead,
    millions,
    places,
    random_of,
    say,
    train_loop,
)
from tumorsynth.training.evaluate import autoencoder_metrics
from tumorsynth.training.folders import (
    UNMEASURED,
    hardware_of,
    no_licence,
    origin,
    read_autoencoder,
    save_autoencoder,
)
from tumorsynth.training.launch import check_hardware, launch
from tumorsynth.training.losses import (
    ReconstructionLoss,
    commitment,
    feature_matching,
    hinge_discriminator_loss,
    hinge_generator_loss,
    slice_perceptual,
)
from tumorsynth.training.pictures import Pair, side_by_side
from tumorsynth.training.run_folder import RunFolder, claimed, identity_of, written

NETWORKS = {
    "tiny": replace(LIGHT, encoder_widths=(16, 32), decoder_widths=(32, 16)),
    "light": LIGHT,
    "base": AutoencoderConfig(),
}
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
    model, started = starting_network(config, init)
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
                "scans": [c.name for c in cases],
                "held_out": [c.name for c in held_out],
                "device": hardware_of(fabric.device),
                "processes": fabric.world_size,
                "seconds": round(seconds),
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
        return sample_crop(self.cases, self.shares, self.config, rng)

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
        self._update(self.model, self.wrapped)
        if self._judging(step):
            assert self.adversaries is not None
            self._update(self.adversaries, self.wrapped_adversary)
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

    def _update(self, module: nn.Module, optimiser: Any) -> None:
        nn.utils.clip_grad_norm_(module.parameters(), self.config.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

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
        model.fit_detail(
            sample_crop(self.cases, self.shares, plain, random_of(self.config.seed, RANGE, index))[
                None
            ].to(self.fabric.device)
            for index in range(64)
        )

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


class Adversaries(nn.Module):
    """The two discriminators: of slices (b, 1, S, S) and of volumes (b, 1, S, S, S).

    In float32 on a CPU: the gradient of its bfloat16 convolutions is NaN for layers of 2^3 voxels
    and one channel (seen with torch 2.13).
    """

    def __init__(self, width: int):
        super().__init__()
        self.slices = PatchDiscriminator(2, width)
        self.volumes = PatchDiscriminator(3, width)

    def forward(self, slices: Tensor, volumes: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        plain = volumes.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if plain else nullcontext():
            return [self.slices(slices.float()), self.volumes(volumes.float())]


def sample_crop(
    cases: list[Case], shares: np.ndarray, config: AutoencoderTraining, rng: np.random.Generator
) -> Tensor:
    """(1, side, side, side) in [-1, 1], axes (z, x, y), contrast and offset jittered."""
    case = cases[int(rng.choice(len(cases), p=shares))]
    tissue = (config.tissue_low, config.tissue_high)
    patch = augment(random_patch(case, config.patch_size, rng, tissue)[None], rng)
    gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-15, 15)
    unit = to_unit(patch * gain + offset, (config.window_low, config.window_high))
    cube = (unit * 2 - 1).permute(0, 3, 1, 2).contiguous()
    return hollowed(cube, rng) if rng.random() < config.hollow else cube


def hollowed(cube: Tensor, rng: np.random.Generator) -> Tensor:
    """The cube (1, side, side, side) with one ball of a single value: the 0 of the hole that stage
    2 asks about, or any, at radii of a twelfth to a quarter of the side.

    Crops that hold little but one tissue, lung above all, have little variance: what stands out of
    them comes out of the norms far beyond all else, unless such crops were trained on.
    """
    side = cube.shape[-1]
    radius = rng.uniform(side / 12, side / 4)
    axes = [torch.arange(side) - float(rng.uniform(0.2, 0.8)) * side for _ in range(3)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    stretch = rng.uniform(0.7, 1.4)
    ball = ((x * stretch) ** 2 + y**2 + z**2 < radius**2)[None]
    value = 0.0 if rng.random() < 0.5 else float(rng.uniform(-0.9, 0.9))
    return torch.where(ball, torch.tensor(value), cube)


def case_shares(cases: list[Case]) -> np.ndarray:
    """How often each case is drawn: annotated scans are the organ at hand, and drawn as often as
    all others together; within either by the root of the volume."""
    size = np.array([case.hu.numel() ** 0.5 for case in cases])
    annotated = np.array([case.label is not None for case in cases])
    shares = size / size.sum()
    if annotated.any() and not annotated.all():
        shares = np.where(annotated, size / size[annotated].sum(), size / size[~annotated].sum())
    return shares / shares.sum()


def starting_network(
    config: AutoencoderTraining, init: str | None
) -> tuple[Autoencoder, dict[str, Any] | None]:
    """The network of a config, untrained or as in ``init``, which may have fewer channels, and the
    `origin` of that."""
    sizes = replace(
        NETWORKS[config.network],
        window=(config.window_low, config.window_high),
        detail_channels=config.detail_channels,
    )
    if config.codes is not None:
        sizes = replace(sizes, codes=config.codes)
    if config.latent_channels is not None:
        sizes = replace(sizes, latent_channels=config.latent_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Autoencoder(sizes)
    if init is None:
        return model, None
    trained, card = read_autoencoder(init, "--init")
    asked = config.latent_channels is not None and not sizes.codes
    wider = asked and trained.config.latent_channels < sizes.latent_channels
    given = replace(trained.config, detail_channels=sizes.detail_channels)  # it is found anew
    if wider:
        given = replace(given, latent_channels=sizes.latent_channels)
    if given != sizes:
        raise ValueError(
            f"--init {init} has another size or window than --network {config.network} with "
            f"{sizes.codes} codes, {sizes.latent_channels} latent channels and {sizes.window} HU: "
            f"{trained.config}"
        )
    return _continued(trained, model), origin(card)


@torch.no_grad()
def _continued(trained: Autoencoder, model: Autoencoder) -> Autoencoder:
    """The trained network with the untrained one's further latent channels, which the decoder
    hardly listens to at first, and its detail, which is found after the training."""
    old, new = trained.state_dict(), model.state_dict()
    old.pop("detail_basis", None)
    new["decoder.stem.weight"] *= 0.1
    for name, value in old.items():
        new[name][tuple(slice(n) for n in value.shape)] = value
    model.load_state_dict(new)
    return model


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
