"""Stage 2: train a denoiser on annotated tumours over a frozen autoencoder (paper 3.2).

    tumorsynth train denoiser dataset.json -o RUN/gen --autoencoder RUN/ae --tumor-label 2
    python -m tumorsynth.training.denoiser pack.npz -o RUN/gen --autoencoder RUN/ae  (torch only)

The noise schedule is a cosine of 4 steps. By default the network predicts x0: with so few steps and
so few tumours this reproduces the contrast of real tumours better than predicting noise. RUN/gen
becomes a generator folder.
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

from tumorsynth.appearance.contrast import ContrastConfig, contrast_of
from tumorsynth.appearance.surroundings import level_around
from tumorsynth.appearance.tissue import CARD_KEY
from tumorsynth.devices import onto
from tumorsynth.generators.diffusion import Generator
from tumorsynth.generators.sampling import q_sample, target
from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.training.config import (
    PRESETS,
    DataConfig,
    DenoiserTraining,
    Hardware,
    configured,
    parse_arguments,
)
from tumorsynth.training.crop_pool import CHOICE_STREAM, PICTURE_STREAM, CropKey, TumorCrops
from tumorsynth.training.crops import contrast_range, tissue_warning
from tumorsynth.training.data import (
    Case,
    Cases,
    DataProblems,
    Tumor,
    check_cases,
    find_tumors,
    fingerprint,
    pluralize,
    raise_problems,
    read_cases_now,
    split_held_out,
    to_unit,
)
from tumorsynth.training.engine import (
    WeightAverage,
    adamw,
    batch_slots,
    prefetch,
    random_stream,
    train_loop,
    update,
)
from tumorsynth.training.evaluate import generator_metrics
from tumorsynth.training.folders import (
    UNMEASURED,
    default_licence,
    origin,
    read_autoencoder,
    training_facts,
)
from tumorsynth.training.launch import check_hardware, launch, usable_precision
from tumorsynth.training.log import millions, print_status
from tumorsynth.training.networks import sampler_config, starting_denoiser
from tumorsynth.training.outlines import tighten_outlines
from tumorsynth.training.pictures import Pair, middle_voxel, side_by_side
from tumorsynth.training.run_folder import (
    RunFolder,
    explain_write_errors,
    identity_of,
    lock_folder,
)
from tumorsynth.training.tissue import learned_tissue

PICTURE_ROWS = 4
PICTURE_CAPTIONS = ("training crop", "generated tumour")


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
    """Train a denoiser and write a generator folder.

    Args:
        cases: annotated scans, or a function that reads them; it is called after all other
            arguments are checked. Held-out cases are measured and not trained on.
        autoencoder: a folder or a bundled generator's name, as for `read_autoencoder`.
        output: folder of the run, which becomes the generator folder.
        config: settings of the training.
        data: which tumours to learn from.
        hardware: where to run.
        resume: continue from the last checkpoint in ``output``.
        init: a generator whose denoiser to start from.
        card: fields of the card, such as "name" and "licence".

    Returns:
        The generator, on the CPU.

    Raises:
        ValueError: for settings or cases that cannot be trained with, before anything starts.
        FileNotFoundError: for an autoencoder or a start that does not exist.
        Diverged: see `train_loop`, as for OSError and SystemExit.

    Examples:
        >>> cases = load_pack(Path("liver.npz"))
        >>> generator = train(cases, "RUN/ae", Path("RUN/gen"), DenoiserTraining(steps=600))
    """
    check_hardware(hardware)
    trained, stage1 = read_autoencoder(autoencoder)
    network, multiple, started = starting_denoiser(config, trained, init)
    _check_sizes(config, trained, multiple)
    started_from = {"autoencoder": stage1["sha256"], "init": started and started["sha256"]}
    run = RunFolder(output, identity_of(config, stage=2, **asdict(data), **started_from), resume)
    annotated, held_out, tumors = _read_tumors(cases, config, data)
    run.complete(scans={c.name: fingerprint(c) for c in annotated})
    cases = annotated
    if data.outlines == "visible":
        tissue = config.tissue_low, config.tissue_high
        cases, tumors = tighten_outlines(cases, tumors, data.tumor_label, tissue)
    conditioned = config.contrast == "on"
    contrast = contrast_range(cases, tumors, data.tumor_label, config) if conditioned else None
    config = replace(config, precision=usable_precision(hardware, config.precision))
    fabric = launch(hardware, config.precision)
    for warning in (
        tissue_warning(cases, tumors, data.tumor_label, config),
        started and started.get("autoencoder"),
    ):
        if warning:
            print_status(fabric, f"mind: {warning}")
    fields = {
        "name": output.name,
        "licence": default_licence(started, stage1),
        CARD_KEY: learned_tissue(cases, tumors, data.tumor_label, config).to_card(),
        **(card or {}),
    }
    sampler = sampler_config(config, multiple, contrast)
    generator = Generator(trained, copy.deepcopy(network), sampler, fields)
    crops = TumorCrops(cases, tumors, data.tumor_label, config, generator.window)
    with lock_folder(output):
        stage = DenoiserStage(fabric, network, generator, crops, hardware.workers)
        title = f"denoiser of {millions(network)} M parameters on {_summarize(tumors, contrast)}"
        seconds = train_loop(fabric, run, stage, config, title)
        if fabric.is_global_zero:
            generator.card["training"] = {
                **asdict(config),
                **asdict(data),
                "tumours": len(tumors),
                **training_facts(cases, held_out, fabric, seconds),
            }
            generator.card["autoencoder"] = origin(stage1)
            if started:
                generator.card["init"] = started
            with explain_write_errors(run):
                _measure_and_save(generator, annotated, held_out, data, config, output, fabric)
        fabric.barrier()
    return generator.to("cpu")


def _check_sizes(config: DenoiserTraining, autoencoder: Autoencoder, multiple: int) -> None:
    if config.patch_size % multiple:
        raise ValueError(
            f"--patch-size must be a multiple of {multiple} for these networks, "
            f"got {config.patch_size}"
        )
    low, high = autoencoder.config.window
    if not low <= config.tissue_low < config.tissue_high <= high:
        raise ValueError(
            f"the tissue of {config.tissue_low:g} to {config.tissue_high:g} HU must lie in the "
            f"autoencoder's window of {low:g} to {high:g} HU; choose another --autoencoder, "
            "--preset, or --tissue-low and --tissue-high"
        )


def _read_tumors(
    cases: Cases, config: DenoiserTraining, data: DataConfig
) -> tuple[list[Case], list[Case], list[Tumor]]:
    """Cases to train on, held-out cases, and the tumours of the former; all problems at once."""
    read = read_cases_now(cases)
    problems = check_cases(read, config.patch_size)
    training, held_out = split_held_out(read)
    tumors: list[Tumor] = []
    try:
        tumors = find_tumors(training, data.tumor_label, data.min_diameter_mm, data.max_diameter_mm)
    except DataProblems as error:
        problems += error.problems
    raise_problems(problems)
    return training, held_out, tumors


def _measure_and_save(
    generator: Generator,
    training: list[Case],
    held_out: list[Case],
    data: DataConfig,
    config: DenoiserTraining,
    output: Path,
    fabric: Any,
) -> None:
    generator.card["metrics"] = {"skipped": UNMEASURED}
    generator.save(output)  # complete even if the measuring is interrupted
    print_status(fabric, f"measuring on {pluralize(len(held_out or training), 'scan')} ...")
    generator.card["metrics"] = generator_metrics(
        generator, training, held_out, data.tumor_label, config.steps, output
    )
    generator.to("cpu").save(output)


class DenoiserStage:
    """The network, optimiser, loss and encoded crops of stage 2; `train_loop` drives it."""

    def __init__(
        self, fabric: Any, network: nn.Module, generator: Generator, crops: TumorCrops, workers: int
    ):
        self.fabric, self.config, self.crops, self.workers = fabric, crops.config, crops, workers
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.network.train().requires_grad_(True)
        self.optimiser = adamw(
            network, fabric.device, lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        self.denoise, self.wrapped = fabric.setup(self.network, self.optimiser)
        self.generator = generator.to(fabric.device)
        self.average = WeightAverage(generator.denoiser, network, self.config.ema)
        self.schedule = generator.schedule
        self.slots = batch_slots(fabric, self.config)
        self.encoded: dict[CropKey, tuple[Tensor, Tensor]] = {}  # latent and condition
        self.batches: Iterator[dict[CropKey, tuple[Tensor, Tensor]]] | None = None

    def state(self) -> dict[str, Any]:
        return {"model": self.network, "optimiser": self.optimiser, "average": self.average}

    def new_crops(self, first: int) -> Iterator[list[CropKey]]:
        """Yield for every step from ``first`` on the crops that no step since has used."""
        seen: set[CropKey] = set()
        for step in range(first, self.config.steps):
            keys = {self.crops.key(step, slot) for part in self.slots for slot in part}
            yield sorted(keys - seen)
            seen = {k for k in seen | keys if k[1] >= self.crops.window(step, k[0])[0]}

    @torch.no_grad()
    def encode(self, hu: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a tumour crop into its normalised latent and its condition.

        One crop at a time: in a batch the last digits could depend on the other crops, and a
        resumed run would differ.
        """
        image, inside, contrast = self._conditions(hu, mask)
        autoencoder = self.generator.autoencoder
        with self.fabric.autocast():
            volume = (image * 2 - 1).permute(0, 1, 4, 2, 3).contiguous()
            latent = autoencoder.normalize(autoencoder.encode(volume)).float()
            return latent, self.generator.condition(image, inside, contrast).float()

    def _conditions(self, hu: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a crop in [0, 1], its mask and its contrast, as a batch of one on the device."""
        hu, inside = onto(hu[None], self.fabric.device), onto(mask[None], self.fabric.device)
        return to_unit(hu, self.generator.window), inside, self.measure_contrast(hu, inside)

    def measure_contrast(self, hu: Tensor, mask: Tensor) -> Tensor | None:
        """Measure the contrast (B,) in HU that conditions the denoiser; None without condition.

        Args:
            hu: (B, 1, X, Y, Z) in HU.
            mask: (B, 1, X, Y, Z) bool, the tumours.
        """
        condition = self.generator.sampler.contrast
        if condition is None:
            return None
        return contrast_of(hu, mask, level_around(hu, mask, condition.tissue))

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        if self.batches is None:
            self.batches = prefetch(self.crops.sample, self.new_crops(step), self.workers)
        for key, crop in next(self.batches).items():
            self.encoded[key] = self.encode(*crop)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.fabric.device)
        for index, part in enumerate(self.slots):
            last = index == len(self.slots) - 1
            with self.fabric.no_backward_sync(self.denoise, enabled=not last):
                loss = self._loss(step, part)
                self.fabric.backward(loss / len(self.slots))
            total += loss.detach() / len(self.slots)
        update(self.network, self.wrapped, self.config.clip)
        self.average.update(step)
        for key in [k for k in self.encoded if k[1] < self.crops.window(step + 1, k[0])[0]]:
            del self.encoded[key]
        return {"loss": total}

    def _loss(self, step: int, slots: list[int]) -> Tensor:
        chosen = [self.encoded[self.crops.key(step, slot)] for slot in slots]
        x0 = torch.cat([latent for latent, _ in chosen])
        condition = torch.cat([c for _, c in chosen])
        times, noises = zip(*(self._noise(step, slot, x0) for slot in slots), strict=True)
        t = onto(torch.tensor(times), x0.device)
        noise = onto(torch.stack(noises), x0.device)
        x_t = q_sample(self.schedule, x0, t, noise)
        with self.fabric.autocast():
            predicted = self.denoise(x_t, t, condition).float()
        wanted = target(self.schedule, x0, t, noise, self.generator.sampler.prediction)
        # outside the hole the condition already holds the answer
        mask = condition[:, x0.shape[1] : x0.shape[1] + 1]
        weight = 1 + self.config.inside_weight * (mask > -1).float()
        error = (weight * (predicted - wanted).square()).mean((1, 2, 3, 4))
        return (error / weight.mean((1, 2, 3, 4))).mean()

    def _noise(self, step: int, slot: int, like: Tensor) -> tuple[int, Tensor]:
        """Noise level and noise of a slot of the batch at a step."""
        rng = random_stream(self.config.seed, CHOICE_STREAM, step, slot, 1)
        shape = tuple(like.shape[1:])
        return int(rng.integers(self.schedule.timesteps)), torch.from_numpy(
            rng.standard_normal(shape, dtype="float32")
        )

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Draw four training crops, each beside what the generator paints into its mask."""
        pairs: list[Pair] = []
        for index in range(PICTURE_ROWS):
            hu, mask = self.crops.crop(random_stream(self.config.seed, PICTURE_STREAM, index))
            image, inside, contrast = self._conditions(hu, mask)
            with self.fabric.autocast():
                painted = self.generator.inpaint(image, inside, seed=index, contrast_hu=contrast)
            volumes = image[0, 0].float().cpu(), painted[0, 0].float().cpu()
            pairs.append((*volumes, middle_voxel(mask[0])))
        return side_by_side(pairs, PICTURE_CAPTIONS)


def _summarize(tumors: list[Tumor], contrast: ContrastConfig | None) -> str:
    """Number, sizes and contrast of the tumours, so that the user sees whether they are tumours."""
    sizes = sorted(t.diameter_mm for t in tumors)
    summary = f"{pluralize(len(tumors), 'tumour')} of {sizes[0]:.0f} to {sizes[-1]:.0f} mm"
    if contrast is None:
        return summary
    return f"{summary}, contrast to draw {contrast.low:g} to {contrast.high:g} HU"


def main() -> None:
    from tumorsynth.training.reading import load_data

    flags = parse_arguments([DenoiserTraining, DataConfig, Hardware], "denoiser", _add_flags)
    labels = Path(flags["labels"]) if flags["labels"] else None
    train(
        partial(load_data, Path(flags["data"]), labels),
        flags["autoencoder"],
        Path(flags["out"]),
        configured(DenoiserTraining, PRESETS["denoiser"][flags["preset"]], flags),
        configured(DataConfig, {}, flags),
        configured(Hardware, {}, flags),
        resume=flags["resume"],
        init=flags["init"],
        card={"name": flags["name"]} if flags["name"] else None,
    )


def _add_flags(parser: Any) -> None:
    parser.add_argument("--autoencoder", required=True, help="folder or bundled generator's name")
    parser.add_argument("--name", help="the generator's name [default: the folder's]")
    parser.add_argument("--init", help="a trained generator to start from")


if __name__ == "__main__":
    main()
