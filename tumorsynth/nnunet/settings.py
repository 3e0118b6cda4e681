"""The settings of a dataset for the nnU-Net trainer; imports nothing of nnU-Net."""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

from tumorsynth.adapter import SETTINGS
from tumorsynth.arguments import check_probability, suggestion
from tumorsynth.label_maps import LabelMap, matching_names, organ_values, read_label_map

ENTRY, VARIABLE = "tumorsynth", "TUMORSYNTH_NNUNET"
# of the core; the plans decide the intensity scale, and the trainer the device
_CORE = sorted(SETTINGS.keys() - {"intensity", "device"})
_OWN = ("p", "healthy_only", "trainer")


def read_settings(dataset_json: dict[str, Any], ignore_label: int | None = None) -> dict[str, Any]:
    """Return the checked settings of a dataset, with label values in place of names.

    They are an optional entry of dataset.json::

        "tumorsynth": {
            "organ_labels": ["liver"],      names or values of the dataset's labels; "kidney" is
                                            kidney_left with kidney_right
            "label_map": "amos",            where organ_labels are names of a public set instead
            "tumor_label": "tumor",
            "p": 0.5,                       probability that a patch gets tumours
            "healthy_only": false,          skip patches that hold a tumour already
            "generator": "liver-early", "count": [1, 3], "size_mm": [5, 20], ...
            "gate": true,                   or its limits, see `tumorsynth.nnunet.segmenter`
            "trainer": {"num_epochs": 250}  attributes of the trainer
        }

    The environment variable ``TUMORSYNTH_NNUNET`` may hold the same object as JSON; its keys win.

    Without ``tumor_label``, the one label is taken whose name contains tumour, lesion, cancer or
    the like. Without ``organ_labels``, the one other label is taken.

    Args:
        dataset_json: the content of dataset.json.
        ignore_label: nnU-Net's ignore label, if the dataset has one.

    Returns:
        The arguments of `tumorsynth.adapter.Adapter`, with ``p`` and ``trainer``.

    Raises:
        ValueError: for labels that are ambiguous or unknown, and for values out of range.
        TypeError: for an unknown key.

    Examples:
        >>> read_settings({"labels": {"background": 0, "liver": 1, "tumor": 2}})
        {'organ_labels': (1,), 'tumor_label': 2, 'p': 0.5, 'trainer': {}}
    """
    settings = {**dataset_json.get(ENTRY, {}), **_read_environment()}
    known = [*_OWN, *_CORE]
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise TypeError(
            f"unknown tumorsynth setting {', '.join(unknown)}; "
            f"{suggestion(unknown, known)}there are "
            f"{', '.join(known)}"
        )
    labels = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
    tumor_label = _find_tumor(settings.get("tumor_label"), labels)
    organs, label_map = settings.get("organ_labels"), settings.pop("label_map", None)
    if label_map is not None:
        organs = organ_values(organs, read_label_map(label_map))
    return {
        **settings,
        "organ_labels": _find_organs(organs, labels, tumor_label, ignore_label),
        "tumor_label": tumor_label,
        "p": check_probability("p", settings.get("p", 0.5)),
        "trainer": _check_trainer_attributes(settings.get("trainer", {})),
    }


def _find_tumor(given: Any, labels: dict[str, Any]) -> int:
    """Return the value of the tumour's label, given or found by its name."""
    if given is None:
        given = find_tumor_name(labels)
    values = _label_values("tumor_label", given, labels)
    if len(values) != 1:
        raise ValueError(
            f"tumor_label must be one value, but {given!r} stands for {values}; name a single "
            f"one of {labels}"
        )
    return values[0]


def find_tumor_name(labels: dict[str, Any]) -> str:
    """Return the name of the only label that is called a tumour.

    Raises:
        ValueError: if there is none, or more than one.
    """
    named = [name for name in labels if LabelMap.is_tumor(name)]
    if len(named) != 1:
        raise ValueError(
            f"tumor_label must be given unless exactly one label is named a tumour, got "
            f'{labels}; add "{ENTRY}": {{"tumor_label": ...}} to dataset.json or to {VARIABLE}'
        )
    return named[0]


def _find_organs(
    given: Any, labels: dict[str, Any], tumor_label: int, ignore_label: int | None
) -> tuple[int, ...]:
    """Return the values of the organ's labels, given or the one label beside the tumour's."""
    if given is None:
        others = set().union(*(_label_values("labels", name, labels) for name in labels)) - {
            0,
            tumor_label,
        }
        if len(others) != 1:
            raise ValueError(
                f"organ_labels must be given unless the dataset has one label beside the tumour's, "
                f'got {labels}; add "{ENTRY}": {{"organ_labels": [...]}} to dataset.json or to '
                f"{VARIABLE}"
            )
        given = sorted(others)
    values = _label_values("organ_labels", given, labels)
    organ_labels = tuple(value for value in values if value != tumor_label)
    if not organ_labels or ignore_label in organ_labels:
        raise ValueError(
            f"organ_labels must hold a label beside the tumour's ({tumor_label}) and none that is "
            f"ignored ({ignore_label}), got {given!r}; the dataset has {labels}"
        )
    return organ_labels


def _read_environment() -> dict[str, Any]:
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


def _check_trainer_attributes(wanted: dict[str, Any]) -> dict[str, Any]:
    known = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every")
    for name, value in wanted.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"trainer may set {', '.join(known)} to whole numbers of at least 1, got "
                f"{name}={value!r}; for anything else derive a trainer from TumorSynthMixin"
            )
    return dict(wanted)


def _label_values(setting: str, which: Any, labels: dict[str, Any]) -> list[int]:
    """Return the label values of a name, a value, or a list of either."""
    if isinstance(which, list | tuple):
        return sorted({value for one in which for value in _label_values(setting, one, labels)})
    if isinstance(which, str) and which in labels:
        value = labels[which]
        return sorted(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
    if isinstance(which, str) and setting == "organ_labels":
        named = {k: tuple(_label_values(setting, k, labels)) for k in labels if k != "background"}
        if not matching_names(which, named).names:
            _unknown(setting, which, labels)
        return list(LabelMap("dataset.json", named).find(which))
    held = {int(v) for x in labels.values() for v in (x if isinstance(x, list | tuple) else [x])}
    if isinstance(which, int) and not isinstance(which, bool) and which in held:
        return [which]
    return _unknown(setting, which, labels)


def _unknown(setting: str, which: Any, labels: dict[str, Any]) -> NoReturn:
    near = suggestion([str(which)], labels) if setting == "organ_labels" else ""
    raise ValueError(
        f"{setting} must be names or values of the dataset's labels, got {which!r}; {near}"
        f"it has {labels}"
    )
