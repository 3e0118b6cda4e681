"""An nnU-Net v2 trainer whose training patches get synthetic tumours.

    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerTumorSynth

A training step then goes: the workers load, crop, rotate and scale patches as ever; the trainer
takes the batch to the training device, adds tumours on HU recovered from the plans' normalisation,
and only then applies what nnU-Net's own pipeline has after the spatial part (noise, blur,
brightness, contrast, low resolution, gamma, mirroring, regions, deep-supervision targets). The
validation data, the network, the loss and the prediction are nnU-Net's.

Settings are an entry ``"tumorsynth"`` of the dataset's dataset.json, or the same as JSON in the
environment variable ``TUMORSYNTH_NNUNET``, which wins key by key; see :func:`read_settings`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import _LRScheduler

try:
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError as error:
    raise ImportError(
        "tumorsynth.nnunet needs nnU-Net v2, 2.5 or later: pip install nnunetv2"
    ) from error

from tumorsynth.adapter import SETTINGS, Adapter
from tumorsynth.arguments import check_probability
from tumorsynth.intensity import HU, Intensity, ZScore

__all__ = ["TumorSynthMixin", "nnUNetTrainerTumorSynth", "read_settings"]

ENTRY, VARIABLE = "tumorsynth", "TUMORSYNTH_NNUNET"
_TUMOR_NAME = re.compile(r"tumou?r|lesion|cancer|carcinoma|metasta|nodule|neoplas", re.IGNORECASE)
# what an nnU-Net user may say of the core; the scale and the device follow from plans and trainer
_CORE = sorted(SETTINGS.keys() - {"intensity", "device"})
_OWN = ("p", "healthy_only", "trainer")

# What only moves voxels may come before the synthesis, in the workers.
_SPATIAL = {
    "Convert3DTo2DTransform",
    "Convert2DTo3DTransform",
    "SpatialTransform",
    "MirrorTransform",
    "Rot90Transform",
    "TransposeAxesTransform",
}


class TumorSynthMixin:
    """Put in front of an nnU-Net trainer, gives its training patches synthetic tumours::

        class MyTrainer(TumorSynthMixin, nnUNetTrainer_250epochs): ...

    Works with 3-D configurations of one CT channel, with regions and an ignore label. Refused, when
    training starts, are: a 2-D configuration, a cascade's second stage, several input channels, and
    a normalisation that depends on the image.
    """

    synthesis: Adapter
    # set with the data loaders, which until 2.5 are made before initialize
    _after_synthesis: Sequence[Any] = ()
    _at: list[torch.device] | None = None  # where each of these runs

    # -- nnU-Net's hooks ---------------------------------------------------------------------------

    def initialize(self: Any) -> None:
        settings = read_settings(self.dataset_json, self.label_manager.ignore_label)
        _check_configuration(self)
        for name, value in settings.pop("trainer").items():
            setattr(self, name, value)
        p = settings.pop("p")
        intensity = _intensity(self)
        self.synthesis = Adapter(**settings, intensity=intensity, device=self.device)
        self.synthesis.synth.p = p
        self._affine = _affine(self.plans_manager, self.configuration_manager)
        # nnU-Net seeds torch nowhere, so every process draws alike; numpy starts from the system
        self._rng = np.random.default_rng([np.random.randint(2**31), self.local_rank])
        self._seen: Counter[str] = Counter()
        self.print_to_log_file(
            f"tumorsynth: p={p:g}, {self.synthesis.described()}, spacing "
            f"{self.configuration_manager.spacing}"
        )
        super().initialize()  # type: ignore[misc]

    def get_training_transforms(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The spatial part alone; what comes after it waits until the synthesis is done."""
        pipeline = super().get_training_transforms(*args, **kwargs)  # type: ignore[misc]
        first, self._after_synthesis = _split(pipeline.transforms)
        self._at = None
        pipeline.transforms = first
        return pipeline

    def configure_optimizers(self: Any, *args: Any, **kwargs: Any) -> Any:
        """nnU-Net's own; in 2.5, under a torch that it was not written for, with its schedule
        mended."""
        of_nnunet = super().configure_optimizers  # type: ignore[misc]
        try:
            return of_nnunet(*args, **kwargs)
        except TypeError as error:
            if "positional argument" not in str(error):
                raise
        with mock.patch.dict(of_nnunet.__globals__, PolyLRScheduler=_PolyLRScheduler):
            return of_nnunet(*args, **kwargs)

    def train_step(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        image = batch["data"].to(self.device, non_blocking=True)
        label = batch["target"].to(self.device, non_blocking=True)
        image, label = self._synthesize(image, label)
        image, label = self._augment(image, label)
        return super().train_step({**batch, "data": image, "target": label})  # type: ignore[misc]

    def on_train_epoch_end(self: Any, *args: Any, **kwargs: Any) -> None:
        super().on_train_epoch_end(*args, **kwargs)  # type: ignore[misc]
        seen, self._seen = self._seen, Counter()
        made, patches = seen.pop("made"), seen.pop("patches")
        others = "".join(f"; {n} x {reason}" for reason, n in seen.most_common(4))
        self.print_to_log_file(f"tumorsynth: {made} tumours in {patches} patches{others}")

    # -- the two steps ----------------------------------------------------------------------------

    def _synthesize(self: Any, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 1, X, Y, Z) as the plans normalise it, label (B, 1, X, Y, Z)."""
        seeds = self._rng.integers(2**63 - 1, size=len(image)).tolist()
        new_image, new_label = self.synthesis(image, label, affine=self._affine, seed=seeds)
        self._seen["patches"] += len(image)
        for record in self.synthesis.report:
            self._seen["made" if record["applied"] else record["reason"]] += 1
        # -1 is what lies beyond the scan; the feather of a tumour at its border ends there
        return torch.where(label < 0, image, new_image), new_label

    def _augment(self: Any, image: Tensor, label: Tensor) -> tuple[Tensor, Any]:
        """The rest of nnU-Net's pipeline, sample by sample as in its workers."""
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(on_gpu):
            if self._at is None:
                at_home = [_works_on(transform, self.device) for transform in self._after_synthesis]
                self._at = [self.device if yes else torch.device("cpu") for yes in at_home]
            torch.manual_seed(int(self._rng.integers(2**63 - 1)))
            done = []
            for one, its_label in zip(image, label, strict=True):
                sample = {"image": one, "segmentation": its_label}
                for transform, device in zip(self._after_synthesis, self._at, strict=True):
                    sample = transform(**_to(sample, device))
                done.append(_to(sample, self.device))
        image = torch.stack([sample["image"] for sample in done])
        labels: list[Any] = [sample["segmentation"] for sample in done]
        if isinstance(labels[0], list):  # one per level of deep supervision
            return image, [torch.stack(level) for level in zip(*labels, strict=True)]
        return image, torch.stack(labels)


class nnUNetTrainerTumorSynth(TumorSynthMixin, nnUNetTrainer):
    """nnU-Net's default trainer with synthetic tumours: ``-tr nnUNetTrainerTumorSynth``."""


class _TakesVerbose(_LRScheduler):
    """torch's base of a schedule as it was: newer ones no longer take ``verbose``."""

    def __init__(self, optimizer: Any, last_epoch: int = -1, verbose: bool = False) -> None:
        super().__init__(optimizer, last_epoch)


class _PolyLRScheduler(PolyLRScheduler, _TakesVerbose):
    """nnU-Net's schedule, whose call of its base's constructor ends up above."""


def read_settings(dataset_json: dict[str, Any], ignore_label: int | None = None) -> dict[str, Any]:
    """The settings for a dataset, checked; label names are turned into values.

    In dataset.json, all of it optional::

        "tumorsynth": {
            "organ_labels": ["liver"],      names or values of the dataset's labels
            "tumor_label": "tumor",
            "p": 0.5,                       share of the patches that get tumours
            "healthy_only": false,          spare patches that hold a tumour already
            "generator": "liver-early", "count": [1, 3], "size_mm": [5, 20], ...
            "trainer": {"num_epochs": 250}  attributes of the trainer
        }

    Without ``tumor_label`` the one label is taken whose name says tumour, lesion, cancer or the
    like; without ``organ_labels`` the one other label. Raises ValueError where that is not
    clear, TypeError for an unknown key.
    """
    settings = {**dataset_json.get(ENTRY, {}), **_from_environment()}
    unknown = sorted(settings.keys() - {*_CORE, *_OWN})
    if unknown:
        raise TypeError(
            f"unknown tumorsynth setting {', '.join(unknown)}; there are {', '.join(_OWN)}, "
            f"{', '.join(_CORE)}"
        )
    labels = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
    tumor = settings.get("tumor_label")
    if tumor is None:
        named = [name for name in labels if _TUMOR_NAME.search(name)]
        if len(named) != 1:
            raise ValueError(
                f"tumor_label must be said where not one label is named a tumour, got {labels}; "
                f'add "{ENTRY}": {{"tumor_label": ...}} to dataset.json or to {VARIABLE}'
            )
        tumor = named[0]
    values = _values(tumor, labels)
    if len(values) != 1:
        raise ValueError(
            f"tumor_label must be one value, but {tumor!r} stands for {values}; name a single "
            f"one of {labels}"
        )
    (tumor_label,) = values
    organ = settings.get("organ_labels")
    if organ is None:
        others = set().union(*(_values(name, labels) for name in labels)) - {0, tumor_label}
        if len(others) != 1:
            raise ValueError(
                f"organ_labels must be said where the tumour's is not one of two labels, got "
                f'{labels}; add "{ENTRY}": {{"organ_labels": [...]}} to dataset.json or to '
                f"{VARIABLE}"
            )
        organ = sorted(others)
    organ_labels = tuple(v for v in _values(organ, labels) if v != tumor_label)
    if not organ_labels or ignore_label in organ_labels:
        raise ValueError(
            f"organ_labels must hold a label beside the tumour's ({tumor_label}) and none that is "
            f"ignored ({ignore_label}), got {organ!r}; the dataset has {labels}"
        )
    return {
        **settings,
        "organ_labels": organ_labels,
        "tumor_label": tumor_label,
        "p": check_probability("p", settings.get("p", 0.5)),
        "trainer": _trainer_attributes(settings.get("trainer", {})),
    }


def _from_environment() -> dict[str, Any]:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE} must be JSON, got {text!r}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f'{VARIABLE} must be a JSON object like {{"p": 0.5}}, got {text!r}')
    return settings


def _trainer_attributes(wanted: dict[str, Any]) -> dict[str, Any]:
    known = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every")
    for name, value in wanted.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"trainer may set {', '.join(known)} to whole numbers of at least 1, got "
                f"{name}={value!r}; for anything else derive a trainer from TumorSynthMixin"
            )
    return dict(wanted)


def _values(which: Any, labels: dict[str, Any]) -> list[int]:
    """Label values of a name, a value, or a list of either."""
    if isinstance(which, list | tuple):
        return sorted({value for one in which for value in _values(one, labels)})
    if isinstance(which, str) and which in labels:
        value = labels[which]
        return sorted(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
    held = {int(v) for x in labels.values() for v in (x if isinstance(x, list | tuple) else [x])}
    if isinstance(which, int) and not isinstance(which, bool) and which in held:
        return [which]
    raise ValueError(f"no label {which!r} in the dataset; it has {labels}")


def _check_configuration(trainer: Any) -> None:
    name, configuration = trainer.configuration_name, trainer.configuration_manager
    if len(configuration.patch_size) != 3:
        raise ValueError(
            f"tumorsynth needs a 3-D configuration, got {name} with patches of "
            f"{tuple(configuration.patch_size)}; train 3d_fullres or 3d_lowres"
        )
    if trainer.is_cascaded:
        raise ValueError(
            f"tumorsynth cannot train {name}: the earlier stage's predictions know nothing of the "
            "synthetic tumours; train 3d_fullres or 3d_lowres"
        )
    channels = trainer.dataset_json.get("channel_names") or trainer.dataset_json.get("modality")
    if len(channels) != 1:
        raise ValueError(
            f"tumorsynth needs images of one channel, CT, got {channels}; in the others the "
            "tumour would be missing"
        )


def _intensity(trainer: Any) -> Intensity:
    """What the preprocessed values mean, from the plans."""
    (scheme,) = trainer.configuration_manager.normalization_schemes
    if scheme == "NoNormalization":
        return HU()
    if scheme != "CTNormalization":
        raise ValueError(
            f"tumorsynth needs the plans' normalisation to be CTNormalization, got {scheme}, from "
            'which HU cannot be recovered; set "channel_names": {"0": "CT"} in dataset.json and '
            "plan and preprocess again"
        )
    of = trainer.plans_manager.foreground_intensity_properties_per_channel["0"]
    return ZScore(of["mean"], of["std"], of["percentile_00_5"], of["percentile_99_5"])


def _affine(plans: Any, configuration: Any) -> np.ndarray:
    """Voxel to RAS mm for the arrays of a configuration.

    nnU-Net's readers give axes z, y, x, which the plans permute. Which way they run is not kept in
    the preprocessed data: taken are a DICOM scan's, x to the left and y to the back.
    """
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (source, mm) in enumerate(
        zip(plans.transpose_forward, configuration.spacing, strict=True)
    ):
        affine[2 - source, axis] = mm if source == 0 else -mm
    return affine


def _split(transforms: list[Any]) -> tuple[list[Any], list[Any]]:
    """The leading transforms that only move voxels, and the rest."""
    names = [type(getattr(t, "transform", t)).__name__ for t in transforms]
    cut = next((i for i, name in enumerate(names) if name not in _SPATIAL), len(names))
    if names[:cut].count("Convert3DTo2DTransform") > names[:cut].count("Convert2DTo3DTransform"):
        cut = names.index("Convert3DTo2DTransform")  # no 3-D patch in between
    return transforms[:cut], transforms[cut:]


def _works_on(transform: Any, device: torch.device) -> bool:
    """Whether a transform of batchgeneratorsv2 takes samples that lie on a device.

    Some build a kernel on the CPU, or ask numpy about a tensor; which, changes with the releases.
    So it is tried, on a small sample, a few times since most draw whether to do anything.
    """
    if device.type == "cpu":
        return True
    state = np.random.get_state()
    try:
        for leaf in _leaves(transform):
            for _ in range(8):
                image = torch.ones((1, 16, 16, 16), device=device)
                leaf(image=image, segmentation=torch.zeros_like(image, dtype=torch.int16))
    except Exception:  # whatever it is, it will not happen to a copy on the CPU
        return False
    finally:
        np.random.set_state(state)
    return True


def _leaves(transform: Any) -> list[Any]:
    """A transform without the wrappers that draw whether it, or which of several, is applied."""
    inner = getattr(transform, "transforms", None) or getattr(transform, "list_of_transforms", None)
    if inner is None and hasattr(transform, "transform"):
        inner = [transform.transform]
    return [leaf for one in inner for leaf in _leaves(one)] if inner else [transform]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    if isinstance(value, list):
        return [_to(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value
