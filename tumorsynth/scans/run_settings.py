"""What decides the result of a scan: recorded in its report, compared before a run resumes."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tumorsynth

if TYPE_CHECKING:
    from tumorsynth.scans.follow_up import FollowUp
    from tumorsynth.scans.organ_masks import OrganMasks
    from tumorsynth.synthesizer import SynthesizeTumor

# Every report holds these options, in this order. All other parameters of `SynthesizeTumor` are
# recorded where they differ from their default, so that earlier reports still match.
ALWAYS_RECORDED = (
    "organ_labels",
    "tumor_label",
    "p",
    "count",
    "size_mm",
    "blend",
    "contrast_hu",
    "sigma_mm",
    "gap_mm",
    "merge",
    "mass_effect",
    "bulge",
    "intensity",
)
# Entries of their own in the report, beside the options.
NOT_OPTIONS = ("generator", "device", "label_map")  # for names, organ_labels hold the values


def run_settings(
    synth: SynthesizeTumor,
    *,
    ct: str,
    label: str,
    seed: int,
    geometry: str | None = None,
    masks: OrganMasks | None = None,
    follow_up: FollowUp | None = None,
) -> dict[str, Any]:
    """Collect what decides the result of a scan, in JSON's own types.

    Args:
        synth: the transform.
        ct: file name of the CT.
        label: file name of its label map.
        seed: of the scan.
        geometry: the source of the files' headers that was chosen.
        masks: which files of a folder of one file per organ matter.
        follow_up: the point in time, in a series.
    """
    import torch

    card = synth.handle.get(synth.device or "cpu").card
    settings = {
        "tumorsynth": tumorsynth.__version__,
        "ct": ct,
        "label": label,
        "seed": seed,
        **({} if geometry is None else {"geometry": geometry}),
        **({} if masks is None else {"masks": asdict(masks)}),
        **({} if follow_up is None else {"follow_up": follow_up.to_dict()}),
        "generator": {key: card[key] for key in ("name", "sha256", "licence") if key in card},
        "options": _options(synth),
        # the last bit of a convolution depends on these two
        "device": (synth.device or torch.device("cpu")).type,
        "threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(settings, default=to_json_types))


def option_names() -> list[str]:
    """The names that a report's options may have: the parameters of `SynthesizeTumor`."""
    from tumorsynth.synthesizer import SynthesizeTumor

    parameters = inspect.signature(SynthesizeTumor).parameters
    rest = (name for name in parameters if name not in (*ALWAYS_RECORDED, *NOT_OPTIONS))
    return [*ALWAYS_RECORDED, *rest]


def _options(synth: SynthesizeTumor) -> dict[str, Any]:
    from tumorsynth.synthesizer import SynthesizeTumor

    parameters = inspect.signature(SynthesizeTumor).parameters
    values = {name: _option(synth, name) for name in option_names()}
    return {
        name: value
        for name, value in values.items()
        if name in ALWAYS_RECORDED or value != parameters[name].default
    }


def _option(synth: SynthesizeTumor, name: str) -> Any:
    from tumorsynth.appearance.gate import LIMITS, Gate

    if name == "intensity":
        scale = synth.intensity
        fields: dict[str, Any] = asdict(scale) if is_dataclass(scale) else {}
        return {"kind": type(scale).__name__, **fields}
    if name == "shapes":  # too long to record
        outlines = json.dumps(synth.options["shapes"]).encode()
        return hashlib.sha256(outlines).hexdigest() if synth.options["shapes"] else None
    value = synth.options[name]
    if isinstance(value, Gate):  # JSON has no infinity; None is no limit
        limits = {limit: getattr(value, limit) for limit in LIMITS}
        finite = {
            limit: pair and [v if math.isfinite(v) else None for v in pair]
            for limit, pair in limits.items()
        }
        given = {k: v for k, v in vars(value).items() if (k, v) != ("most", None)}
        return {**given, **finite}
    return value


def explain_mismatch(report: Path, settings: dict[str, Any]) -> str | None:
    """Say why a report does not belong to a run of these `run_settings`; None if it does."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "cannot be read"
    if not isinstance(found, dict):
        return "is no report"
    for key, value in {"geometry": None, "masks": None, "follow_up": None, **settings}.items():
        old = found.get(key)
        if old != value:
            if isinstance(old, dict) and isinstance(value, dict):
                key, old, value = next(
                    (f"{key} {k}", old.get(k), value.get(k))
                    for k in {**value, **old}
                    if old.get(k) != value.get(k)
                )
            return f"made with {key} {old}, now {value}"
    return None


def voxels_sha256(stored: np.ndarray) -> str:
    """Hash the numbers as stored, in C order, without header or compression."""
    return hashlib.sha256(np.ascontiguousarray(stored).data).hexdigest()


def to_json_types(value: Any) -> Any:
    """Convert what `json.dumps` cannot write: for its ``default=``."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return value.tolist()
    if hasattr(value, "__qualname__"):  # a function; its repr differs between processes
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)
