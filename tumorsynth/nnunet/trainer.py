"""An nnU-Net v2 trainer whose training patches get synthetic tumours.

    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerTumorSynth

The workers load, crop, rotate and scale patches as in nnU-Net. The trainer then takes the batch to
the training device, adds tumours on HU recovered from the plans' normalisation, and applies the
rest of nnU-Net's pipeline (noise, blur, brightness, contrast, low resolution, gamma, mirroring,
regions, deep-supervision targets). Validation data, network, loss and prediction are nnU-Net's.

For the settings see `tumorsynth.nnunet.read_settings`.
"""

from __future__ import annotations

from collections import Counter
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

from tumorsynth.adapter import MAX_SEED, Adapter
from tumorsynth.nnunet.augmentation import DeferredTransforms, split_transforms
from tumorsynth.nnunet.plans import check_configuration, read_affine, read_intensity
from tumorsynth.nnunet.segmenter import read_gate
from tumorsynth.nnunet.settings import read_settings


class TumorSynthMixin:
    """Gives the training patches of any nnU-Net trainer synthetic tumours.

    It works with 3-D configurations of one CT channel, with regions and an ignore label.

    Raises:
        ValueError: when training starts, for a 2-D configuration, a cascade's second stage, several
            input channels, or a normalisation that depends on the image.

    Examples:
        >>> class MyTrainer(TumorSynthMixin, nnUNetTrainer_250epochs): ...
    """

    synthesis: Adapter
    # set together with the data loaders, which nnU-Net 2.5 makes before it calls initialize
    _deferred = DeferredTransforms(())

    # -- nnU-Net's hooks ---------------------------------------------------------------------------

    def initialize(self: Any) -> None:
        """Read the settings and make the synthesis, then do as nnU-Net."""
        settings = read_settings(self.dataset_json, self.label_manager.ignore_label)
        check_configuration(self)
        for name, value in settings.pop("trainer").items():
            setattr(self, name, value)
        p = settings.pop("p")
        intensity = read_intensity(self)
        if "gate" in settings:
            settings["gate"] = read_gate(settings["gate"], self, settings["tumor_label"])
        self.synthesis = Adapter(**settings, intensity=intensity, device=self.device)
        self.synthesis.synth.p = p
        self._affine = read_affine(self.plans_manager, self.configuration_manager)
        # nnU-Net never seeds torch, whose draws would be equal in all processes; numpy's are not
        self._rng = np.random.default_rng([np.random.randint(2**31), self.local_rank])
        self._seen: Counter[str] = Counter()  # of an epoch: patches, tumours, skip codes
        self.print_to_log_file(
            f"tumorsynth: p={p:g}, {self.synthesis.described()}, spacing "
            f"{self.configuration_manager.spacing}"
        )
        super().initialize()  # type: ignore[misc]
        self.synthesis.score_with(self.network)

    def get_training_transforms(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the spatial part alone; the rest follows the synthesis."""
        pipeline = super().get_training_transforms(*args, **kwargs)  # type: ignore[misc]
        pipeline.transforms, rest = split_transforms(pipeline.transforms)
        self._deferred = DeferredTransforms(rest)
        return pipeline

    def configure_optimizers(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return nnU-Net's own; under a newer torch than nnU-Net 2.5 knows, mend its schedule."""
        of_nnunet = super().configure_optimizers  # type: ignore[misc]
        try:
            return of_nnunet(*args, **kwargs)
        except TypeError as error:
            if "positional argument" not in str(error):
                raise
        with mock.patch.dict(of_nnunet.__globals__, PolyLRScheduler=_PolyLRScheduler):
            return of_nnunet(*args, **kwargs)

    def train_step(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Add tumours, apply the rest of the augmentation, then do as nnU-Net."""
        image = batch["data"].to(self.device, non_blocking=True)
        label = batch["target"].to(self.device, non_blocking=True)
        image, label = self._synthesize(image, label)
        image, label = self._deferred(image, label, self._rng)
        return super().train_step({**batch, "data": image, "target": label})  # type: ignore[misc]

    def on_train_epoch_end(self: Any, *args: Any, **kwargs: Any) -> None:
        """Do as nnU-Net, then log how many tumours were made, and why others were not."""
        super().on_train_epoch_end(*args, **kwargs)  # type: ignore[misc]
        seen, self._seen = self._seen, Counter()
        tumors, patches = seen.pop("tumors", 0), seen.pop("patches", 0)
        skips = "".join(f"; {n} x {code}" for code, n in seen.most_common(4))
        self.print_to_log_file(f"tumorsynth: {tumors} tumours in {patches} patches{skips}")

    def _synthesize(self: Any, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Add tumours to a batch (B, 1, X, Y, Z) that is normalised as the plans say."""
        seeds = self._rng.integers(MAX_SEED, size=len(image)).tolist()
        new_image, new_label = self.synthesis(image, label, affine=self._affine, seed=seeds)
        self._seen["patches"] += len(image)
        for record in self.synthesis.report:
            self._seen["tumors" if record["applied"] else record["code"]] += 1
        # -1 marks voxels beyond the scan, which a tumour's feather may reach
        return torch.where(label < 0, image, new_image), new_label


class nnUNetTrainerTumorSynth(TumorSynthMixin, nnUNetTrainer):
    """nnU-Net's default trainer with synthetic tumours: ``-tr nnUNetTrainerTumorSynth``."""


class _TakesVerbose(_LRScheduler):
    """torch's base class of schedules with ``verbose``, which newer releases no longer take."""

    def __init__(self, optimizer: Any, last_epoch: int = -1, verbose: bool = False) -> None:
        super().__init__(optimizer, last_epoch)


class _PolyLRScheduler(PolyLRScheduler, _TakesVerbose):
    """nnU-Net's schedule on that base class."""
