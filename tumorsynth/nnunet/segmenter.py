"""nnU-Net's networks as scorers of the quality gate; imports nothing of nnU-Net."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tumorsynth.appearance.gate import LIMITS, Gate
from tumorsynth.appearance.segmenter import SegmenterScorer
from tumorsynth.arguments import suggestion
from tumorsynth.nnunet.plans import read_intensity
from tumorsynth.nnunet.settings import find_tumor_name

ENDS = {0: "S", 1: "P", 2: "L"}  # where nnU-Net's z, y and x run to, as `read_affine` assumes
NETWORK = "network"  # the value of "scorer" in the settings: the network in training
GATE_SETTINGS = ("tries", *LIMITS, "scorer", "least", "most")


def segmenter_scorer(predictor: Any, tumor_label: str | None = None) -> SegmenterScorer:
    """Return a scorer that runs a trained nnU-Net on scans in HU.

    It normalises as the plans say and resamples to their spacing. It assumes the axes of DICOM, x
    to the left and y to the back. Of several folds it runs the one whose weights the predictor's
    network holds, the first unless it has predicted.

    Args:
        predictor: an ``nnUNetPredictor`` after ``initialize_from_trained_model_folder``, or a
            trainer after ``initialize``.
        tumor_label: name of the tumour's label or region in dataset.json. None takes the only one
            that is called tumor, lesion, cancer or the like.

    Raises:
        ValueError: for a predictor without a network, a configuration that is not 3-D, a
            normalisation other than CTNormalization, or an unknown label.

    Examples:
        >>> predictor.initialize_from_trained_model_folder(folder, use_folds=(0,))
        >>> gate = ts.Gate(scorer=segmenter_scorer(predictor), least=0.7)
    """
    if getattr(predictor, "network", None) is None:
        raise ValueError(
            f"predictor must hold a network, got {type(predictor).__name__} without; call "
            "initialize_from_trained_model_folder first"
        )
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    if len(configuration.patch_size) != 3:
        raise ValueError(
            "the predictor must have a 3-D configuration, got patches of "
            f"{tuple(configuration.patch_size)}; load 3d_fullres or 3d_lowres"
        )
    channel, activation = _find_channel(predictor, _label_value(predictor, tumor_label))
    return SegmenterScorer(
        predictor.network,
        channel,
        [int(n) for n in configuration.patch_size],
        preprocess=read_intensity(predictor),
        spacing=[float(s) for s in configuration.spacing],
        orientation="".join(ENDS[axis] for axis in plans.transpose_forward),
        activation=activation,
    )


def _label_value(owner: Any, tumor_label: str | None) -> Any:
    """Return the value of a label, or the values of a region, by its name."""
    labels = {k: v for k, v in owner.dataset_json["labels"].items() if k != "ignore"}
    name = find_tumor_name(labels) if tumor_label is None else tumor_label
    if name not in labels:
        raise ValueError(
            f"tumor_label must be a label of the dataset, got {name!r}; "
            f"{suggestion([str(name)], labels)}it has {', '.join(labels)}"
        )
    return labels[name]


def _find_channel(owner: Any, value: Any) -> tuple[int, str]:
    """Return the output channel of a label's value or values, and the activation of nnU-Net.

    With regions it is the smallest region that holds the value.
    """
    values = {int(one) for one in (value if isinstance(value, list | tuple) else [value])}
    manager = owner.label_manager
    if not manager.has_regions:
        return [int(one) for one in manager.all_labels].index(min(values)), "softmax"
    regions = [{int(v) for v in np.atleast_1d(region)} for region in manager.all_regions]
    holding = [number for number, region in enumerate(regions) if values <= region]
    return min(holding, key=lambda number: len(regions[number])), "sigmoid"


def read_gate(given: Any, trainer: Any, tumor_label: int) -> bool | Gate:
    """Return the gate of the setting "gate" of a dataset.

    Args:
        given: true, false, or an object with the arguments of `tumorsynth.Gate`: limits as
            [low, high] with null for none, and "scorer": "network" for the network in training.
        trainer: of nnU-Net.
        tumor_label: value of the tumour.

    Raises:
        ValueError: for a value out of range.
        TypeError: for an unknown key, or another type.
    """
    if given is None or isinstance(given, bool):
        return bool(given)
    if not isinstance(given, dict):
        raise TypeError(
            f'gate must be true, false or an object, got {given!r}; give for example {{"tries": 5}}'
        )
    unknown = sorted(given.keys() - set(GATE_SETTINGS))
    if unknown:
        raise TypeError(
            f"unknown setting {', '.join(unknown)} of gate; {suggestion(unknown, GATE_SETTINGS)}"
            f"there are {', '.join(GATE_SETTINGS)}"
        )
    settings = {name: _limits(value) for name, value in given.items()}
    scorer = settings.get("scorer")
    if scorer not in (None, NETWORK):
        raise ValueError(
            f'gate\'s scorer must be "{NETWORK}", the network in training, got {scorer!r}; for '
            "another one derive a trainer from TumorSynthMixin"
        )
    if scorer == NETWORK:
        channel, activation = _find_channel(trainer, tumor_label)
        patch_size = [int(n) for n in trainer.configuration_manager.patch_size]
        settings["scorer"] = SegmenterScorer(None, channel, patch_size, activation=activation)
    return Gate(**settings)


def _limits(value: Any) -> Any:
    """Return [low, high] of JSON with infinity in place of null."""
    if not isinstance(value, list) or len(value) != 2:
        return value
    low, high = value
    return (-math.inf if low is None else low, math.inf if high is None else high)
