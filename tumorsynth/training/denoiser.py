"""Stage 2: train a denoiser on annotated tumours over a frozen autoencoder (paper 3.2).

    tumorsynth train denoiser dataset.json -o RUN/gen --autoencoder RUN/ae --tumor-label 2
    python -m tumorsynth.training.denoiser pack.npz -o RUN/gen --autoencoder RUN/ae  (torch only)

T = 4 steps of the cosine schedule. By default the network predicts x0, which with so few steps and
tumours comes out closer to real contrast than predicting noise. RUN/gen is a generator folder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tumorsynth.appearance.contrast import ContrastConfig, contrast_of, level_around
from tumorsynth.generators.diffusion import Generator
from tumorsynth.generators.sampling import q_sample, target
from tumorsynth.training.config import (
    PRESETS,
    DataConfig,
    DenoiserTraining,
    Hardware,
    configured,
    parse_arguments,
)
from tumorsynth.training.crop_pool import CHOICE, PICTURE, Key, TumorCrops
from tumorsynth.training.crops import contrast_range, other_tissue
from tumorsynth.training.data import (
    Cases,
    DataProblems,
    Tumor,
    check_cases,
    complain,
    counted,
    find_tumors,
    fingerprint,
    given,
    split,
    to_unit,
)
from tumorsynth.training.engine import (
    Average,
    ahead,
    places,
    random_of,
    train_loop,
    update,
)
from tumorsynth.training.evaluate import generator_metrics
from tumorsynth.training.folders import (
    UNMEASURED,
    facts,
    no_licence,
    origin,
    read_autoencoder,
)
from tumorsynth.training.launch import check_hardware, launch, usable_precision
from tumorsynth.training.log import millions, say
from tumorsynth.training.networks import sampler_of, starting_denoiser
from tumorsynth.training.outlines import visible
from tumorsynth.training.pictures import Pair, middle_of, side_by_side
from tumorsynth.training.run_folder import RunFolder, claimed, identity_of, written


def train(
    cases: Cases,
    autoencoder: str,
    output: Path,
    config: DenoiserTraining = DenoiserTraining(),  # noqa: B008 (frozen)
    data: DataConfig = DataConfig(),  # noqa: B008 (frozen)
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    *,
    resume: bool = False,
    init: str | None = None,
    card: dict[str, Any] | None = None,
) -> Generator:
    """Train, and write a generator folder into ``output``; returns the generator, on the CPU.

    cases: or what reads them, called once all else is checked. autoencoder: as for
    `read_autoencoder`. init: a generator whose denoiser to start from. Raises ValueError for every
    problem with the cases before anything starts.
    """
    check_hardware(hardware)
    trained, stage1 = read_autoencoder(autoencoder)
    network, multiple, started = starting_denoiser(config, trained, init)
    if config.patch_size % multiple:
        raise ValueError(
            f"--patch-size must be a multiple of {multiple} for these networks, "
            f"got {config.patch_size}"
        )
    low, high = trained.config.window
    if not low <= config.tissue_low < config.tissue_high <= high:
        raise ValueError(
            f"the tissue of {config.tissue_low:g} to {config.tissue_high:g} HU must lie in the "
            f"autoencoder's window of {low:g} to {high:g} HU; choose another --autoencoder, "
            "--preset, or --tissue-low and --tissue-high"
        )
    used = {"autoencoder": stage1["sha256"], "init": started and started["sha256"]}
    run = RunFolder(output, identity_of(config, stage=2, **asdict(data), **used), resume)
    cases = given(cases)
    problems = check_cases(cases, config.patch_size)
    cases, held_out = split(cases)
    tumors: list[Tumor] = []
    try:
        tumors = find_tumors(cases, data.tumor_label, data.min_diameter_mm, data.max_diameter_mm)
    except DataProblems as error:
        problems += error.problems
    complain(problems)
    annotated = cases
    run.complete(scans={c.name: fingerprint(c) for c in cases})
    if data.outlines == "visible":
        tissue = config.tissue_low, config.tissue_high
        cases, tumors = visible(cases, tumors, data.tumor_label, tissue)
    told = config.contrast == "on"
    contrast = contrast_range(cases, tumors, data.tumor_label, config) if told else None
    config = replace(config, precision=usable_precision(hardware, config.precision))
    fabric = launch(hardware, config.precision)
    for words in (
        other_tissue(cases, tumors, data.tumor_label, config),
        started and started.get("autoencoder"),
    ):
        if words:
            say(fabric, f"mind: {words}")
    generator = Generator(
        trained,
        copy.deepcopy(network),
        sampler_of(config, multiple, contrast),
        {
            "name": output.name,
            "licence": no_licence(started, stage1),
            **(card or {}),
        },
    )
    crops = TumorCrops(cases, tumors, data.tumor_label, config, generator.window)
    with claimed(output):
        stage = DenoiserStage(fabric, network, generator, crops, hardware.workers)
        title = f"denoiser of {millions(network)} M parameters on {_described(tumors, contrast)}"
        seconds = train_loop(fabric, run, stage, config, title)
        if fabric.is_global_zero:
            generator.card["training"] = {
                **asdict(config),
                **asdict(data),
                "tumours": len(tumors),
                **facts(cases, held_out, fabric, seconds),
            }
            generator.card["autoencoder"] = origin(stage1)
            if started:
                generator.card["init"] = started
            generator.card["metrics"] = {"skipped": UNMEASURED}
            with written(run):
                generator.save(output)  # whole already, should the measuring be interrupted
                say(fabric, f"measuring on {counted(len(held_out or annotated), 'scan')} ...")
                generator.card["metrics"] = generator_metrics(
                    generator, annotated, held_out, data.tumor_label, config.steps, output
                )
                generator.to("cpu").save(output)
        fabric.barrier()
    return generator.to("cpu")


class DenoiserStage:
    """The network, optimiser, loss and encoded crops of stage 2; `train_loop` drives it."""

    def __init__(
        self, fabric: Any, network: nn.Module, generator: Generator, crops: TumorCrops, workers: int
    ):
        self.fabric, self.config, self.crops, self.workers = fabric, crops.config, crops, workers
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.network.train().requires_grad_(True)
        self.optimiser = torch.optim.AdamW(
            network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        self.denoise, self.wrapped = fabric.setup(self.network, self.optimiser)
        self.generator = generator.to(fabric.device)
        self.average = Average(generator.denoiser, network, self.config.ema)
        self.schedule = generator.schedule
        self.places = places(fabric, self.config)
        self.encoded: dict[Key, tuple[Tensor, Tensor]] = {}
        self.batches: Iterator[dict[Key, tuple[Tensor, Tensor]]] | None = None

    def state(self) -> dict[str, Any]:
        return {"model": self.network, "optimiser": self.optimiser, "average": self.average}

    def plans(self, first: int) -> Iterator[list[Key]]:
        """For every step from ``first`` on the crops that it uses and no step since has used."""
        seen: set[Key] = set()
        for step in range(first, self.config.steps):
            keys = {self.crops.key(step, place) for part in self.places for place in part}
            yield sorted(keys - seen)
            seen = {k for k in seen | keys if k[1] >= self.crops.window(step, k[0])[0]}

    @torch.no_grad()
    def encode(self, hu: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latent of a tumour crop, and its condition.

        One crop at a time: in a batch the last digits could depend on the batch-mates, and with
        them a resumed run.
        """
        image = to_unit(hu[None].to(self.fabric.device), self.generator.window)
        inside = mask[None].to(image.device)
        contrast = self.contrast(hu[None].to(image.device), inside)
        autoencoder = self.generator.autoencoder
        with self.fabric.autocast():
            volume = (image * 2 - 1).permute(0, 1, 4, 2, 3).contiguous()
            latent = autoencoder.normalize(autoencoder.encode(volume)).float()
            return latent, self.generator.condition(image, inside, contrast).float()

    def contrast(self, hu: Tensor, mask: Tensor) -> Tensor | None:
        """(B,): what the denoiser is told of tumours (B, 1, X, Y, Z) that are there."""
        taught = self.generator.sampler.contrast
        if taught is None:
            return None
        return contrast_of(hu, mask, level_around(hu, mask, taught.tissue))

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        if self.batches is None:
            self.batches = ahead(self.crops.draw, self.plans(step), self.workers)
        for key, crop in next(self.batches).items():
            self.encoded[key] = self.encode(*crop)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        told = torch.zeros((), device=self.fabric.device)
        for index, part in enumerate(self.places):
            last = index == len(self.places) - 1
            with self.fabric.no_backward_sync(self.denoise, enabled=not last):
                loss = self._loss(step, part)
                self.fabric.backward(loss / len(self.places))
            told += loss.detach() / len(self.places)
        update(self.network, self.wrapped, self.config.clip)
        self.average.update(step)
        for key in [k for k in self.encoded if k[1] < self.crops.window(step + 1, k[0])[0]]:
            del self.encoded[key]
        return {"loss": told}

    def _loss(self, step: int, part: list[int]) -> Tensor:
        chosen = [self.encoded[self.crops.key(step, place)] for place in part]
        x0 = torch.cat([latent for latent, _ in chosen])
        cond = torch.cat([c for _, c in chosen])
        times, noises = zip(*(self._noise(step, place, x0) for place in part), strict=True)
        t = torch.tensor(times, device=x0.device)
        noise = torch.stack(noises).to(x0.device)
        x_t = q_sample(self.schedule, x0, t, noise)
        with self.fabric.autocast():
            answer = self.denoise(x_t, t, cond).float()
        wanted = target(self.schedule, x0, t, noise, self.generator.sampler.prediction)
        # outside the hole the answer stands in the condition already
        mask = cond[:, x0.shape[1] : x0.shape[1] + 1]
        weight = 1 + self.config.inside_weight * (mask > -1).float()
        error = (weight * (answer - wanted).square()).mean((1, 2, 3, 4))
        return (error / weight.mean((1, 2, 3, 4))).mean()

    def _noise(self, step: int, place: int, like: Tensor) -> tuple[int, Tensor]:
        rng = random_of(self.config.seed, CHOICE, step, place, 1)
        shape = tuple(like.shape[1:])
        return int(rng.integers(self.schedule.timesteps)), torch.from_numpy(
            rng.standard_normal(shape, dtype="float32")
        )

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Four tumours, each beside what the generator paints into its mask, in three planes."""
        pairs: list[Pair] = []
        for index in range(4):
            hu, mask = self.crops.crop(random_of(self.config.seed, PICTURE, index))
            image = to_unit(hu[None].to(self.fabric.device), self.generator.window)
            inside = mask[None].to(image.device)
            told = self.contrast(hu[None].to(image.device), inside)
            with self.fabric.autocast():
                painted = self.generator.inpaint(image, inside, seed=index, contrast_hu=told)
            volumes = image[0, 0].float().cpu(), painted[0, 0].float().cpu()
            pairs.append((*volumes, middle_of(mask[0])))
        return side_by_side(pairs)


def _described(tumors: list[Tumor], contrast: ContrastConfig | None) -> str:
    """What was found, for a person to see whether it is tumours."""
    sizes = sorted(t.diameter_mm for t in tumors)
    words = f"{counted(len(tumors), 'tumour')} of {sizes[0]:.0f} to {sizes[-1]:.0f} mm"
    if contrast is None:
        return words
    return f"{words}, contrast to draw {contrast.low:g} to {contrast.high:g} HU"


def main() -> None:
    from tumorsynth.training.reading import load_data

    told = parse_arguments([DenoiserTraining, DataConfig, Hardware], "denoiser", _extra)
    train(
        partial(load_data, Path(told["data"]), Path(told["labels"]) if told["labels"] else None),
        told["autoencoder"],
        Path(told["out"]),
        configured(DenoiserTraining, PRESETS["denoiser"][told["preset"]], told),
        configured(DataConfig, {}, told),
        configured(Hardware, {}, told),
        resume=told["resume"],
        init=told["init"],
        card={"name": told["name"]} if told["name"] else None,
    )


def _extra(parser: Any) -> None:
    parser.add_argument("--autoencoder", required=True, help="folder or bundled generator's name")
    parser.add_argument("--name", help="the generator's name [default: the folder's]")
    parser.add_argument("--init", help="a trained generator to start from")


if __name__ == "__main__":
    main()
