"""A report read back: what is needed to make its tumours again, checked before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tumorsynth.pipeline.validation import check_params
from tumorsynth.scans.cases import digest

if TYPE_CHECKING:
    from tumorsynth.scans.nifti import Volume


def read_report(path: Path) -> dict[str, Any]:
    """A report of `tumorsynth synthesize`; ValueError where it is none, or lacks what is needed."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a report must be JSON, but {path.name} is not: {error}") from error
    kinds = {"tumorsynth": str, "seed": int, "generator": dict, "options": dict, "params": list}
    for key, kind in kinds.items():
        if not isinstance(told, dict) or not isinstance(told.get(key), kind):
            raise ValueError(
                f"a report must hold {key!r} ({kind.__name__}), but {path.name} does not; give the "
                "NAME_report.json that tumorsynth synthesize wrote"
            )
    if not isinstance(told["generator"].get("name"), str):
        raise ValueError(f"a report must name its generator, but {path.name} does not")
    hashes, threads = told.get("voxels_sha256", {}), told.get("threads", 1)
    if not isinstance(hashes, dict) or not isinstance(told.get("device", ""), str):
        raise ValueError(
            f"a report's voxels_sha256 must be an object and its device a name, but {path.name} "
            f"holds {str(hashes)[:40]} and {str(told.get('device'))[:40]}; restore it"
        )
    check_params(told["params"], 1)
    if told["params"][0].get("seed") not in (None, told["seed"]):
        raise ValueError(
            f"a report's seed must be its params', but {path.name} holds {told['seed']} and "
            f"{str(told['params'][0]['seed'])[:40]}; restore it"
        )
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(
            f"a report's threads must be 1 to 1024, but {path.name} holds {str(threads)[:40]}; "
            "restore it"
        )
    return told


def check_scan(told: dict[str, Any], image: Volume, label: Volume) -> None:
    """ValueError when these are not the scan and label that the report was made from."""
    known = told.get("voxels_sha256") or {}
    for key, volume in (("ct", image), ("label", label)):
        if key in known and known[key] != digest(volume.stored):
            raise ValueError(
                f"{volume.name} must have the voxels that the report was made from "
                f"({told.get(key)}), but has others; give that file"
            )


def bundled_generator(told: dict[str, Any]) -> str:
    """The generator's name, where it ships: a report cannot have anything read or downloaded."""
    from tumorsynth.generators.store import bundled_names

    name = told["generator"]["name"]
    if name not in bundled_names():
        raise ValueError(
            f"the report's generator {name!r} does not ship with the package; name its folder or "
            "hub id with --generator"
        )
    return name


def same_generator(told: dict[str, Any], card: dict[str, Any]) -> None:
    """ValueError when a generator of this card is not the report's."""
    for key in ("name", "sha256"):
        if told["generator"].get(key) != card.get(key):
            raise ValueError(
                f"the report's generator has {key} {told['generator'].get(key)}, this one has "
                f"{card.get(key)}; name its folder with --generator"
            )


def synthesizer_options(told: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `SynthesizeTumor`, from the report's JSON."""
    from tumorsynth.appearance.contrast_priors import ContrastPrior
    from tumorsynth.appearance.mass_effect import MassEffect
    from tumorsynth.intensity import HU, Scaled, ZScore

    options = dict(told["options"])
    scale = options.pop("intensity", {"kind": "HU"})
    known = {kind.__name__: kind for kind in (HU, Scaled, ZScore)}
    names = {"organ_labels", "tumor_label", "p", "count", "size_mm", "blend", "contrast_hu"}
    stray = options.keys() - names - {"sigma_mm", "gap_mm", "merge", "mass_effect", "bulge"}
    if stray or not isinstance(scale, dict) or str(scale.get("kind")) not in known:
        raise ValueError(
            f"the report's options must be those of this version, got {sorted(stray) or scale}; "
            f"install tumorsynth {told['tumorsynth']}"
        )
    try:
        if isinstance(options.get("mass_effect"), dict):
            options["mass_effect"] = MassEffect(**options["mass_effect"])
        if isinstance(options.get("contrast_hu"), dict):
            options["contrast_hu"] = ContrastPrior(**options["contrast_hu"])
        intensity = known[scale["kind"]](**{k: v for k, v in scale.items() if k != "kind"})
    except TypeError as error:  # other fields than this version's
        raise ValueError(
            "the report's mass_effect, contrast_hu and intensity must be this version's, got "
            f"{str(options.get('mass_effect'))[:80]} and {str(scale)[:80]}; install tumorsynth "
            f"{told['tumorsynth']}"
        ) from error
    return {**options, "intensity": intensity}
