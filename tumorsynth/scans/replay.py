"""Read a report back, and check everything its replay needs before anything is synthesised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tumorsynth.geometry import frame_from_affine, ints3
from tumorsynth.nifti_header import check_geometry
from tumorsynth.pipeline.params_grid import replay_frames
from tumorsynth.pipeline.validation import check_params
from tumorsynth.scans.follow_up import FollowUp
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.organ_masks import OrganMasks
from tumorsynth.scans.run_settings import option_names, voxels_sha256

if TYPE_CHECKING:
    from tumorsynth.scans.volume import Volume

MAX_THREADS = 1024
# These options decide what is sampled. A replay takes that from the report's params.
SAMPLING_ONLY = ("gate", "shapes")


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of `tumorsynth synthesize`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no report, or lacks something a replay needs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"a report must be JSON, but {path.name} is not ({error}); give the NAME_report.json "
            "that tumorsynth synthesize wrote"
        ) from error
    required = {"tumorsynth": str, "seed": int, "generator": dict, "options": dict, "params": list}
    for key, kind in required.items():
        if not isinstance(report, dict) or not isinstance(report.get(key), kind):
            raise ValueError(
                f"a report must hold {key!r} ({kind.__name__}), but {path.name} does not; give the "
                "NAME_report.json that tumorsynth synthesize wrote"
            )
    if not isinstance(report["generator"].get("name"), str):
        raise ValueError(f"a report must name its generator, but {path.name} does not; restore it")
    hashes, threads = report.get("voxels_sha256", {}), report.get("threads", 1)
    if not isinstance(hashes, dict) or not isinstance(report.get("device", ""), str):
        raise ValueError(
            f"a report's voxels_sha256 must be an object and its device a name, but {path.name} "
            f"holds {str(hashes)[:40]} and {str(report.get('device'))[:40]}; restore it"
        )
    check_geometry(report.get("geometry"))
    if "phase_of" in report:
        raise ValueError(
            f"a replay needs the report of the first phase, but {path.name} is of another phase "
            f"({str(report['phase_of'])[:120]}); give the first one's, with --other-phase"
        )
    check_params(report["params"], 1)
    if report["params"][0].get("seed") not in (None, report["seed"]):
        raise ValueError(
            f"a report's seed must equal its params' seed, but {path.name} holds {report['seed']} "
            f"and {str(report['params'][0]['seed'])[:40]}; restore it"
        )
    is_number = isinstance(threads, int) and not isinstance(threads, bool)
    if not is_number or not 1 <= threads <= MAX_THREADS:
        raise ValueError(
            f"a report's threads must be 1 to {MAX_THREADS}, but {path.name} holds "
            f"{str(threads)[:40]}; restore it"
        )
    return report


def follow_up_of(report: dict[str, Any]) -> FollowUp | None:
    """Return the point in time of a report of a series.

    Raises:
        ValueError: for an entry that cannot be one.
    """
    entry = report.get("follow_up")
    if entry is None:
        return None
    try:
        point = FollowUp(entry["scan"], entry["number"], entry["requested_factor"])
        valid = point.to_dict() == entry
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            f"a report's follow_up must say which point of a series it is, got {str(entry)[:80]}; "
            "restore it"
        )
    return point


def reading_of(report: dict[str, Any]) -> Reading:
    """Return how the report's files were read; `check_scan` makes sure that they are the same."""
    known = report.get("voxels_sha256") or {}
    return Reading(report.get("geometry"), same_grid="ct" in known and "label" in known)


def masks_of(report: dict[str, Any]) -> OrganMasks | None:
    """Return which files of one file per organ the report was made from; None for a label map."""
    known = report.get("masks")
    if known is None:
        return None
    try:
        return OrganMasks(**{**known, "organs": tuple(known["organs"])})
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"the report's masks must be those of this version, got {str(known)[:80]}; install "
            f"tumorsynth {report['tumorsynth']}"
        ) from error


def check_scan(report: dict[str, Any], image: Volume, label: Volume) -> None:
    """Raise ValueError if the report was made from another scan or label map."""
    known = report.get("voxels_sha256") or {}
    for key, volume in (("ct", image), ("label", label)):
        if key in known and known[key] != voxels_sha256(volume.stored):
            raise ValueError(
                f"{volume.name} must have the voxels that the report was made from "
                f"({report.get(key)}), but has others; give that file"
            )
    shape, frame = ints3(image.stored.shape), frame_from_affine(image.affine)
    replay_frames(report["params"], shape, [frame])


def bundled_generator(report: dict[str, Any]) -> str:
    """The name of the report's generator, which must ship with the package.

    A report may come from anybody: it cannot make a replay read or download another generator.
    """
    from tumorsynth.generators.store import bundled_names

    name = report["generator"]["name"]
    if name not in bundled_names():
        raise ValueError(
            f"the report's generator {name!r} does not ship with the package; give its folder or "
            "hub id with --generator"
        )
    return name


def check_generator(report: dict[str, Any], card: dict[str, Any]) -> None:
    """Raise ValueError if a generator's card is not that of the report's generator."""
    for key in ("name", "sha256"):
        if report["generator"].get(key) != card.get(key):
            raise ValueError(
                f"the report's generator has {key} {report['generator'].get(key)}, this one has "
                f"{card.get(key)}; give the report's with --generator"
            )


def synthesizer_options(report: dict[str, Any]) -> dict[str, Any]:
    """Turn a report's options into keyword arguments of `SynthesizeTumor`."""
    from tumorsynth.appearance.contrast_priors import ContrastPrior
    from tumorsynth.appearance.mass_effect import MassEffect
    from tumorsynth.intensity import HU, Scaled, ZScore

    options = dict(report["options"])
    scale = options.pop("intensity", {"kind": "HU"})
    scales = {kind.__name__: kind for kind in (HU, Scaled, ZScore)}
    unknown = options.keys() - set(option_names())
    if unknown or not isinstance(scale, dict) or str(scale.get("kind")) not in scales:
        raise ValueError(
            f"the report's options must be those of this version, got {sorted(unknown) or scale}; "
            f"install tumorsynth {report['tumorsynth']}"
        )
    for name in SAMPLING_ONLY:
        options.pop(name, None)
    try:
        if isinstance(options.get("mass_effect"), dict):
            options["mass_effect"] = MassEffect(**options["mass_effect"])
        if isinstance(options.get("contrast_hu"), dict):
            options["contrast_hu"] = ContrastPrior(**options["contrast_hu"])
        intensity = scales[scale["kind"]](**{k: v for k, v in scale.items() if k != "kind"})
    except TypeError as error:  # fields that this version does not have
        raise ValueError(
            "the report's mass_effect, contrast_hu and intensity must be those of this version, "
            f"got {str(options.get('mass_effect'))[:80]} and {str(scale)[:80]}; install tumorsynth "
            f"{report['tumorsynth']}"
        ) from error
    return {**options, "intensity": intensity}
