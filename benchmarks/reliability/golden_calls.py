"""Record what a fixed set of calls gives, and compare it later, bit for bit.

    python -m benchmarks.reliability.golden_calls record before.json
    python -m benchmarks.reliability.golden_calls compare before.json

For a change that must not alter any result: record before it, compare after it. The calls use
public names and the command line only, so this file runs unchanged on both sides.

A record holds, for each call, the sha256, shape and dtype of image and label, the report, the
params, and for a command its exit code, texts and files. Beside FILE.json lies the folder
FILE.files with what later code must still read: scans, params, reports, a generator, checkpoints
of interrupted trainings.

``compare`` prints one line for each call that differs and exits with 1. A key that only the new
result has is listed as new and is no failure. ``--allow-words`` lists changed texts (reasons,
stdout, stderr) without failing. ``--only TEXT`` takes the calls whose name holds TEXT. Bits depend
on the processor, the thread count and the version of torch: compare on the machine that recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import tumorsynth as ts

LIVER, PANCREAS, KIDNEYS, SPLEEN, LUNGS = 1, 2, (3, 4), 5, 16  # label values of the phantom
TUMOR = 20
PHANTOMS: dict[str, dict[str, Any]] = {
    "whole": {"spacing": (3, 3, 3), "seed": 0},
    "liver": {"spacing": (2, 2, 2.5), "shape": (64, 56, 40), "seed": 1},
    "thick": {"spacing": (1.5, 1.5, 5), "shape": (72, 64, 16), "seed": 2},
    "training": {"spacing": (1.5, 1.5, 1.5), "shape": (44, 44, 44), "seed": 3},
}
WORDS = ("reason", "stdout", "stderr", "error", "warnings")  # keys whose values are prose


@dataclass
class Place:
    """Where a run reads and writes: ``kept`` stays with the record, ``work`` does not."""

    kept: Path
    work: Path
    recording: bool
    _phantoms: dict[str, ts.Phantom] = field(default_factory=dict)

    def phantom(self, name: str) -> ts.Phantom:
        """A phantom as it was when the record was taken."""
        if name not in self._phantoms:
            path = self.kept / f"phantom_{name}.npz"
            if self.recording and not path.exists():
                made = ts.make_phantom(**PHANTOMS[name])
                np.savez_compressed(path, image=made.image, label=made.label, affine=made.affine)
            with np.load(path) as held:
                self._phantoms[name] = ts.Phantom(
                    torch.from_numpy(held["image"]),
                    torch.from_numpy(held["label"]),
                    tuple(float(s) for s in PHANTOMS[name]["spacing"]),
                    held["affine"],
                )
        return self._phantoms[name]

    def folder(self, name: str) -> Path:
        """A new empty folder for one call's files."""
        folder = self.work / re.sub(r"\W+", "_", name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def scans(self) -> Path:
        """A folder of two scans as NIfTI, a and b, the second oblique; written once."""
        import nibabel

        folder = self.kept / "scans"
        if self.recording and not folder.exists():
            folder.mkdir()
            for name, phantom in (("a", self.phantom("liver")), ("b", self.phantom("thick"))):
                affine = phantom.affine if name == "a" else oblique(phantom.spacing)
                stored = phantom.image[0].round().short().numpy()
                nibabel.save(nibabel.Nifti1Image(stored, affine), folder / f"{name}_ct.nii.gz")
                label = nibabel.Nifti1Image(phantom.label[0].numpy(), affine)
                nibabel.save(label, folder / f"{name}_label.nii.gz")
        return folder

    def params(self, name: str, make: Callable[[], Any]) -> Any:
        """Params of the recorded run, through JSON; ``make`` gives them when recording."""
        path = self.kept / "params" / f"{name}.json"
        if self.recording:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())


Call = Callable[[Place], dict[str, Any]]
CALLS: dict[str, Call] = {}


def call(name: str) -> Callable[[Call], Call]:
    """Add a function to the calls."""

    def add(function: Call) -> Call:
        assert name not in CALLS, name
        CALLS[name] = function
        return function

    return add


# -- what is kept of a result ----------------------------------------------------------------------


def array(x: Any) -> dict[str, Any]:
    """The hash of an array's bytes in C order, its shape and its dtype."""
    kind, affine = type(x).__name__, getattr(x, "affine", None)
    if isinstance(x, torch.Tensor):
        plain = x.detach().as_subclass(torch.Tensor).cpu().contiguous()
        dtype, content = str(plain.dtype), plain.flatten().view(torch.uint8).numpy().tobytes()
    else:
        dtype, content = str(x.dtype), np.ascontiguousarray(x).tobytes()
    kept = {"sha256": hashlib.sha256(content).hexdigest(), "shape": list(x.shape)}
    kept |= {"dtype": dtype, "type": kind}
    return kept if affine is None else {**kept, "affine": as_json(affine)}


def as_json(value: Any) -> Any:
    """A record in JSON's own types; numbers stay exact, foreign types are named."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return {"type": type(value).__name__, "value": value.tolist()}
    return {"type": type(value).__name__, "value": str(value)}


def outcome(image: Any, label: Any, **records: Any) -> dict[str, Any]:
    return {"image": array(image), "label": array(label), **as_json(records)}


def refusals(cases: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The error that each case raises."""
    found = {}
    for name, case in cases.items():
        try:
            case()
        except Exception as error:
            found[name] = {"type": type(error).__name__, "error": str(error)}
        else:
            found[name] = {"type": "none", "error": ""}
    return found


def oblique(spacing: Iterable[float], degrees: float = 17.0) -> np.ndarray:
    """Voxel to RAS mm: turned about two axes, the first axis running to the left."""
    a, b = math.radians(degrees), math.radians(-degrees / 2)
    z = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = z @ x @ np.diag(np.array([-1.0, 1.0, 1.0]) * list(spacing))
    affine[:3, 3] = 12.5, -40.0, 3.25
    return affine


# -- SynthesizeTumor -------------------------------------------------------------------------------


def run_core(
    place: Place,
    settings: dict[str, Any],
    phantom: str = "liver",
    seed: Any = 7,
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    replay: bool = False,
    **geometry: Any,
) -> dict[str, Any]:
    """One call; ``change`` prepares image and label, ``replay`` repeats the call by its params."""
    scan = place.phantom(phantom)
    image, label = scan.image.clone(), scan.label.clone()
    if change is not None:
        image, label = change(image, label)
    before = array(image), array(label)
    synth = ts.SynthesizeTumor(**{"organ_labels": LIVER, "tumor_label": TUMOR, **settings})
    geometry = geometry or {"spacing": scan.spacing}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new_image, new_label = synth(image, label, seed=seed, **geometry)
    kept = outcome(new_image, new_label, report=synth.report, params=synth.params)
    kept["warnings"] = [str(w.message) for w in caught]
    kept["inputs_kept"] = (array(image), array(label)) == before
    kept["same_objects"] = [new_image is image, new_label is label]
    if replay:
        params = json.loads(json.dumps(synth.params))
        again, label_again = synth(image, label, params=params, **geometry)
        kept["replay"] = outcome(again, label_again, report=synth.report, params=synth.params)
    return kept


def batch_of(*phantoms: tuple[float, int]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A batch of the scan, each sample with HU added and rolled by some voxels."""

    def change(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = [(image + hu).roll(shift, 1) for hu, shift in phantoms]
        return torch.stack(images), torch.stack([label.roll(shift, 1) for _, shift in phantoms])

    return change


def as_types(image_type: torch.dtype, label_type: torch.dtype) -> Callable[..., Any]:
    return lambda image, label: (image.to(image_type), label.to(label_type))


def with_nan(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    image[:, 10:32, 10:46, 5:35] = math.nan
    return image, label


def all_nan(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full_like(image, math.nan), label


def with_tumors(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    liver = (label[0] == LIVER).nonzero()
    for k in (len(liver) // 3, len(liver) // 2):
        x, y, z = liver[k].tolist()
        label[0, x - 3 : x + 3, y - 3 : y + 3, z - 2 : z + 2] = TUMOR
    return image, label


def little_organ(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y, z = (label[0] == LIVER).nonzero()[2000].tolist()
    only = torch.zeros_like(label)
    only[0, x : x + 3, y : y + 3, z : z + 2] = LIVER
    return image, only


def noncontiguous(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return image.transpose(1, 3), label.transpose(1, 3)


def scaled(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ((image + 175) / 425).clamp(0, 1), label


def zscored(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (image.clamp(-60, 230) - 90) / 40, label


def masks() -> list[tuple[np.ndarray, tuple[float, float, float]]]:
    """Two tumour masks for ``shapes``: an ellipsoid and two balls grown together."""
    grid = np.stack(np.meshgrid(*[np.arange(24.0)] * 3, indexing="ij"), -1) - 12
    ellipsoid = ((grid / (9, 5, 7)) ** 2).sum(-1) < 1
    balls = (np.linalg.norm(grid - 3, axis=-1) < 6) | (np.linalg.norm(grid + 2, axis=-1) < 5)
    return [(ellipsoid, (1.0, 1.0, 1.5)), (balls, (0.8, 0.8, 0.8))]


SMALL = {"count": 1, "size_mm": (10, 14)}
RULE = {"generator": "hu2023", "count": 2, "size_mm": (8, 16)}
CORE: dict[str, dict[str, Any]] = {
    # diffusion
    "liver-early, change": {"settings": {**SMALL, "count": 2}, "replay": True},
    "liver-early, difftumor": {"settings": {**SMALL, "blend": "difftumor"}, "seed": 8},
    "liver-early, gate": {"settings": {**SMALL, "gate": True}, "seed": 9},
    "liver-early, mass effect": {"settings": {**SMALL, "mass_effect": 0.4}, "seed": 10},
    "liver-early, bulge": {
        "settings": {
            "organ_labels": KIDNEYS,
            "count": 1,
            "size_mm": "kidney",
            "bulge": True,
        },
        "phantom": "whole",
        "seed": 11,
    },
    "liver-early, contrast number": {"settings": {**SMALL, "contrast_hu": -35}, "seed": 12},
    "liver-early, contrast prior": {
        "settings": {**SMALL, "contrast_hu": "liver-arterial"},
        "seed": 13,
    },
    "liver-early, thick slices, oblique, half": {
        "settings": SMALL,
        "phantom": "thick",
        "change": as_types(torch.float16, torch.int64),
        "affine": oblique((1.5, 1.5, 5)),
    },
    "liver-early, batch": {
        "settings": {**SMALL, "intensity": ts.Scaled(-175, 250, 0, 1)},
        "change": lambda *scan: scaled(*batch_of((0, 0), (-10, 3))(*scan)),
        "spacing": [(2, 2, 2.5), (1.5, 1.5, 3)],
        "seed": [3, 4],
    },
    "liver-early, two organs, late": {
        "settings": {"organ_labels": (LIVER, SPLEEN), "count": 1, "size_mm": 45},
        "phantom": "whole",
        "seed": 14,
    },
    "lung, change": {
        "settings": {**SMALL, "generator": "lung", "organ_labels": LUNGS},
        "phantom": "whole",
    },
    "lung, difftumor, gate": {
        "settings": {
            **SMALL,
            "generator": "lung",
            "organ_labels": LUNGS,
            "blend": "difftumor",
            "gate": True,
        },
        "phantom": "whole",
        "seed": 15,
    },
    "lung, sizes": {
        "settings": {"generator": "lung", "organ_labels": LUNGS, "count": 1, "size_mm": "lung"},
        "phantom": "whole",
        "seed": 20,
    },
    "lung, in the liver": {"settings": {**SMALL, "generator": "lung"}, "seed": 16},
    # by rule
    "hu2023, change": {"settings": RULE, "replay": True},
    "hu2023, difftumor": {"settings": {**RULE, "blend": "difftumor"}, "replay": True},
    "hu2023, gate": {"settings": {**RULE, "gate": True, "count": 4}, "replay": True},
    "hu2023, own gate": {
        "settings": {**RULE, "gate": ts.Gate(tries=2), "count": 3},
        "seed": 17,
    },
    "hu2023, mass effect": {"settings": {**RULE, "mass_effect": 0.4}, "replay": True},
    "hu2023, mass effect auto, large": {
        "settings": {**RULE, "mass_effect": "auto", "size_mm": (22, 40), "gate": True},
        "phantom": "whole",
        "replay": True,
    },
    "hu2023, bulge": {
        "settings": {
            **RULE,
            "organ_labels": KIDNEYS,
            "count": None,
            "size_mm": "kidney",
            "bulge": True,
        },
        "phantom": "whole",
        "replay": True,
    },
    "hu2023, bulge, shares, mass effect": {
        "settings": {
            **RULE,
            "organ_labels": KIDNEYS,
            "bulge": (0.2, 0.5),
            "size_mm": (14, 20),
            "mass_effect": 0.3,
        },
        "phantom": "whole",
        "seed": 18,
    },
    "hu2023, contrast number": {"settings": {**RULE, "contrast_hu": (-60, -20)}, "replay": True},
    "hu2023, bright contrast": {"settings": {**RULE, "contrast_hu": 40}},
    "hu2023, liver-portal": {"settings": {**RULE, "contrast_hu": "liver-portal"}},
    "hu2023, kidney-arterial": {
        "settings": {
            **RULE,
            "organ_labels": KIDNEYS,
            "contrast_hu": "kidney-arterial",
            "size_mm": (18, 30),
        },
        "phantom": "whole",
        "replay": True,
    },
    "hu2023, pancreas-unenhanced": {
        "settings": {
            **RULE,
            "organ_labels": PANCREAS,
            "contrast_hu": "pancreas-unenhanced",
            "size_mm": "pancreas",
        },
        "phantom": "whole",
    },
    "hu2023, liver sizes": {"settings": {**RULE, "size_mm": "liver", "count": None}},
    "hu2023, cyst sizes": {
        "settings": {**RULE, "organ_labels": KIDNEYS, "size_mm": "cyst", "bulge": True},
        "phantom": "whole",
    },
    "hu2023, shapes": {"settings": {**RULE, "shapes": masks()}, "replay": True},
    "hu2023, feather and gap": {
        "settings": {**RULE, "sigma_mm": (1, 3), "gap_mm": 8, "count": (2, 5)}
    },
    "hu2023, merge": {"settings": {**RULE, "merge": True, "count": 9, "size_mm": 18}},
    "hu2023, merge, mass effect": {
        "settings": {**RULE, "merge": True, "count": 3, "size_mm": 16, "mass_effect": 0.3}
    },
    "hu2023, batch of spacings": {
        "settings": {**RULE, "p": 0.6},
        "change": batch_of((0, 0), (15, 2), (-20, 5), (0, 9)),
        "spacing": [(2, 2, 2.5), (1, 1, 1), (0.8, 0.8, 5), (3, 2, 1)],
        "seed": 21,
        "replay": True,
    },
    "hu2023, batch of affines, mass effect": {
        "settings": {**RULE, "mass_effect": 0.4},
        "change": batch_of((0, 0), (15, 2)),
        "affine": np.stack([oblique((2, 2, 2.5)), oblique((2.5, 2, 2), 50)]),
        "seed": [5, 2**63 - 1],
        "replay": True,
    },
    "hu2023, oblique": {
        "settings": RULE,
        "phantom": "thick",
        "affine": oblique((1.5, 1.5, 5)),
        "replay": True,
    },
    "hu2023, half and int64": {
        "settings": RULE,
        "change": as_types(torch.float16, torch.int64),
        "replay": True,
    },
    "hu2023, bfloat16 and int16": {
        "settings": RULE,
        "change": as_types(torch.bfloat16, torch.int16),
    },
    "hu2023, double and float label": {
        "settings": RULE,
        "change": as_types(torch.float64, torch.float32),
    },
    "hu2023, noncontiguous": {"settings": RULE, "change": noncontiguous, "spacing": (2.5, 2, 2)},
    "hu2023, Scaled": {
        "settings": {**RULE, "intensity": ts.Scaled(-175, 250, 0, 1)},
        "change": scaled,
        "replay": True,
    },
    "hu2023, ZScore": {
        "settings": {**RULE, "intensity": ts.ZScore(90, 40, -60, 230)},
        "change": zscored,
        "replay": True,
    },
    # reasons for none
    "skip, no organ": {"settings": {**RULE, "organ_labels": 77}, "replay": True},
    "skip, p=0": {"settings": {**RULE, "p": 0}},
    "skip, count=0": {"settings": {**RULE, "count": (0, 0)}},
    "skip, no room": {"settings": {**RULE, "size_mm": 40}, "change": little_organ, "replay": True},
    "skip, tissue that the generator does not know": {
        "settings": {**RULE, "organ_labels": LUNGS},
        "phantom": "whole",
        "replay": True,
    },
    "skip, some do not fit": {
        "settings": {**RULE, "organ_labels": PANCREAS, "count": 8, "size_mm": 18}
    },
    "NaN in a part of the image": {"settings": {**RULE, "count": 6}, "change": with_nan},
    "skip, NaN everywhere": {"settings": RULE, "change": all_nan},
    "skip, NaN everywhere, liver-early": {"settings": SMALL, "change": all_nan},
    "tumours there already": {"settings": {**RULE, "count": 4}, "change": with_tumors},
    "tumours there already, merge": {
        "settings": {**RULE, "count": 4, "merge": True},
        "change": with_tumors,
    },
    "skip, the gate": {
        "settings": {**RULE, "contrast_hu": 0, "gate": True, "count": 2},
        "replay": True,
    },
    "organs of several labels": {
        "settings": {**RULE, "organ_labels": (*KIDNEYS, SPLEEN), "count": 5},
        "phantom": "whole",
        "replay": True,
    },
}


def _add_core() -> None:
    for name, arguments in CORE.items():
        CALLS[f"core: {name}"] = lambda place, arguments=arguments: run_core(place, **arguments)


_add_core()


@call("phantom")
def _phantom(place: Place) -> dict[str, Any]:
    made = ts.make_phantom((4, 4, 4), (40, 36, 24), seed=5)
    kept = outcome(made.image, made.label, spacing=made.spacing, affine=made.affine.tolist())
    for name in ("liver", "thick"):  # the rest of what `phantom` kept
        made = ts.make_phantom(**PHANTOMS[name])
        kept[name] = outcome(made.image, made.label)
    return kept


@call("core: a seed of torch's stream")
def _stream(place: Place) -> dict[str, Any]:
    torch.manual_seed(11)
    kept = run_core(place, RULE, seed=None)
    return {**kept, "next_random": torch.rand(()).item()}


@call("core: 1 mm where nothing is said")
def _no_spacing(place: Place) -> dict[str, Any]:
    return run_core(place, RULE, spacing=None)


@call("core: shapes from a folder")
def _shape_folder(place: Place) -> dict[str, Any]:
    import nibabel

    folder = place.folder("shapes")
    for k, (mask, spacing) in enumerate(masks()):
        stored = nibabel.Nifti1Image(mask.astype(np.uint8), np.diag([*spacing, 1.0]))
        nibabel.save(stored, folder / f"mask_{k}.nii.gz")
    return run_core(place, {**RULE, "shapes": str(folder)}, seed=19)


@call("core: params of the recorded run")
def _old_params(place: Place) -> dict[str, Any]:
    """Params that the recording code wrote, replayed by this code."""
    kept: dict[str, Any] = {}
    for name in (
        "liver-early, gate",
        "liver-early, contrast prior",
        "hu2023, gate",
        "hu2023, mass effect auto, large",
        "hu2023, bulge",
        "hu2023, kidney-arterial",
        "hu2023, shapes",
        "hu2023, batch of spacings",
        "skip, no organ",
    ):
        arguments = CORE[name]

        def make(arguments: dict[str, Any] = arguments) -> Any:
            return run_core(place, **{**arguments, "replay": False})["params"]

        scan = place.phantom(arguments.get("phantom", "liver"))
        image, label = scan.image.clone(), scan.label.clone()
        if "change" in arguments:
            image, label = arguments["change"](image, label)
        settings = {"organ_labels": LIVER, "tumor_label": TUMOR, **arguments["settings"]}
        synth = ts.SynthesizeTumor(**settings)
        params = place.params(re.sub(r"\W+", "_", name), make)
        spacing = arguments.get("spacing", scan.spacing)
        image, label = synth(image, label, spacing=spacing, params=params)
        kept[name] = outcome(image, label, report=synth.report, params=synth.params)
    return kept


@call("generator: card, encode, sample, inpaint")
def _generator(place: Place) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name in ("liver-early", "lung"):
        generator = ts.load_generator(name)
        crop, far = torch.full((1, 1, 32, 32, 32), 0.6), torch.arange(32) - 16
        crop += 0.05 * torch.randn(crop.shape, generator=torch.Generator().manual_seed(1))
        ball = (far[:, None, None] ** 2 + far[:, None] ** 2 + far**2 <= 30)[None, None]
        latent = generator.autoencoder.encode(crop * 2 - 1)
        painted = generator.inpaint(crop, ball, seed=3)
        folder = place.folder(f"saved {name}")
        generator.save(folder / "one")
        again = ts.load_generator(str(folder / "one")).inpaint(crop, ball, seed=3)
        kept[name] = {
            "card": as_json(generator.card),
            "latent": array(latent),
            "normalized": array(generator.autoencoder.normalize(latent)),
            "decoded": array(generator.autoencoder.decode(latent)),
            "inpainted": array(painted),
            "inpainted_after_save": array(again),
            "saved_card": as_json(json.loads((folder / "one" / "card.json").read_text())),
            "saved": sorted(path.name for path in (folder / "one").iterdir()),
        }
    kept["hu2023"] = as_json(ts.load_generator("hu2023").card)
    return kept


@call("core: wrong arguments")
def _wrong_arguments(place: Place) -> dict[str, Any]:
    scan = place.phantom("liver")
    image, label = scan.image, scan.label
    synth = ts.SynthesizeTumor("hu2023", LIVER, TUMOR)
    make = ts.SynthesizeTumor
    return refusals(
        {
            "generator": lambda: make("no-such-generator")(image, label, spacing=1),
            "organ_labels": lambda: make(organ_labels=()),
            "tumor_label": lambda: make(organ_labels=(1, 2), tumor_label=2),
            "p": lambda: make(p=1.5),
            "count": lambda: make(count=(3, 1)),
            "size_mm": lambda: make(size_mm=(0, 5)),
            "size prior": lambda: make(size_mm="heart"),
            "intensity": lambda: make(intensity="hu"),
            "blend": lambda: make(blend="paste"),
            "contrast_hu": lambda: make(contrast_hu="heart-portal"),
            "sigma_mm": lambda: make(sigma_mm=-1),
            "gate": lambda: make(gate="yes"),
            "mass_effect": lambda: make(mass_effect=2),
            "bulge": lambda: make(bulge=True),
            "shapes": lambda: make(shapes=[]),
            "shape of the image": lambda: synth(image[0], label[0]),
            "shapes differ": lambda: synth(image, label[:, :-1]),
            "integers": lambda: synth(image.short(), label),
            "half labels": lambda: synth(image, label + 0.5),
            "label cannot hold": lambda: make("hu2023", 1, 300)(image, label),
            "spacing": lambda: synth(image, label, spacing=(1, 1)),
            "affine": lambda: synth(image, label, affine=np.zeros((4, 4))),
            "spacing and affine": lambda: synth(image, label, spacing=1, affine=np.eye(4)),
            "seed": lambda: synth(image, label, spacing=1, seed=-1),
            "params": lambda: synth(image, label, spacing=1, params=[{"seed": 1}]),
            "phantom": lambda: ts.make_phantom(spacing=(0, 1, 1)),
            "Scaled": lambda: ts.Scaled(250, -175, 0, 1),
            "ZScore": lambda: ts.ZScore(90, 0),
        }
    )


# -- adapters --------------------------------------------------------------------------------------


@call("monai: array, of numpy and of MetaTensor")
def _monai_array(place: Place) -> dict[str, Any]:
    from monai.data import MetaTensor

    from tumorsynth.monai import RandSynthesizeTumor

    scan = place.phantom("liver")
    kept: dict[str, Any] = {}
    numbers = scan.image.numpy().round().astype(np.int16), scan.label.numpy()
    meta = MetaTensor(scan.image, affine=scan.affine), MetaTensor(scan.label, affine=scan.affine)
    for name, inputs, spacing in (("numpy", numbers, scan.spacing), ("meta", meta, None)):
        transform = RandSynthesizeTumor(
            0.7, spacing=spacing, organ_labels=LIVER, tumor_label=TUMOR, **RULE
        )
        transform.set_random_state(3)
        for k in range(4):
            image, label = transform(*inputs)
            kept[f"{name} {k}"] = outcome(image, label, report=transform.report)
    organ = RandSynthesizeTumor(spacing=scan.spacing, separate_organ=True, **RULE)
    organ.set_random_state(4)
    none = np.zeros(numbers[1].shape, np.uint16)
    image, label = organ(numbers[0], none, numbers[1])
    kept["organ"] = outcome(image, label, report=organ.report)
    return kept


@call("monai: dictionary")
def _monai_dict(place: Place) -> dict[str, Any]:
    from monai.data import MetaTensor

    from tumorsynth.monai import RandSynthesizeTumord

    scan, kept = place.phantom("thick"), {}
    affine = oblique(scan.spacing)
    data = {
        "ct": MetaTensor(scan.image, affine=affine, meta={"name": "thick"}),
        "seg": MetaTensor(scan.label, affine=affine),
        "none": torch.zeros_like(scan.label),
        "healthy": True,
    }
    common = {"organ_labels": LIVER, "tumor_label": TUMOR, **RULE}
    for name, more in {
        "plain": {},
        "healthy only": {"healthy_only": True},
        "when": {"when": lambda data: not data["healthy"]},
        "bulge, mass effect": {"bulge": 0.3, "mass_effect": 0.4, "organ_labels": SPLEEN},
        "organ": {"label_key": "none", "organ_key": "seg", "contrast_hu": "liver-portal"},
    }.items():
        transform = RandSynthesizeTumord("ct", **{"label_key": "seg", **common, **more})
        transform.set_random_state(5)
        made = transform(data)
        kept[name] = outcome(made["ct"], made[more.get("label_key", "seg")], keys=sorted(made))
        kept[name] |= {"report": as_json(transform.report)}
    wrong = {
        "missing key": lambda: RandSynthesizeTumord("x", "seg", **common)(data),
        "unknown setting": lambda: RandSynthesizeTumord("ct", "seg", colour=1),
        "no dictionary": lambda: RandSynthesizeTumord("ct", "seg", **common)([1]),
    }
    return {**kept, "wrong": refusals(wrong)}


@call("monai: batch")
def _monai_batch(place: Place) -> dict[str, Any]:
    from tumorsynth.monai import BatchSynthesizeTumord, PrepareBatchTumorSynth

    scan, kept = place.phantom("liver"), {}
    images, labels = batch_of((0, 0), (10, 2), (-10, 4))(scan.image, scan.label)
    with_tumors(images[1], labels[1])
    data = {"image": images, "label": labels, "healthy": torch.tensor([True, False, True])}
    common = {"organ_labels": LIVER, "tumor_label": TUMOR, "spacing": scan.spacing, **RULE}
    for name, more in {
        "plain": {},
        "prob": {"prob": 0.5},
        "healthy only": {"healthy_only": True},
        "when": {"when": lambda data: data["healthy"], "mass_effect": 0.3},
        "none": {"when": lambda data: False},
    }.items():
        transform = BatchSynthesizeTumord("image", **{**common, **more})
        transform.set_random_state(6)
        made = transform(data)
        kept[name] = outcome(made["image"], made["label"], report=transform.report)
    prepare = PrepareBatchTumorSynth(**common).set_random_state(7)
    kept["prepare_batch"] = outcome(*prepare(data, "cpu"), report=prepare.report)
    return kept


@call("torchio: a subject and its history")
def _torchio(place: Place) -> dict[str, Any]:
    import torchio as tio

    from tumorsynth.torchio import RandomSynthesizeTumor

    scan, kept = place.phantom("liver"), {}
    common = {"organ_labels": LIVER, "tumor_label": TUMOR, **RULE, "image": "ct", "label": "organs"}
    for name, more in {
        "plain": {},
        "healthy only": {"healthy_only": True},
        "mass effect, contrast prior": {"mass_effect": 0.4, "contrast_hu": "liver-portal"},
        "excluded": {"exclude": ["ct"]},
        "never": {"p": 0.0},
    }.items():
        affine = oblique(scan.spacing)
        subject = tio.Subject(
            ct=tio.ScalarImage(tensor=scan.image.round().short(), affine=affine),
            organs=tio.LabelMap(tensor=scan.label, affine=affine),
        )
        torch.manual_seed(8)
        transform = RandomSynthesizeTumor(**{**common, **more})
        made = transform(subject)
        parts = made["ct"].data, made["organs"].data
        kept[name] = outcome(*parts, report=transform.report)
        kept[name]["next_random"] = torch.rand(()).item()
        if name in ("plain", "mass effect, contrast prior"):
            history = made.get_applied_transforms()
            kept[name]["params"] = [as_json(one.params) for one in history]
            again = made.get_composed_history()(subject)
            kept[name]["again"] = outcome(again["ct"].data, again["organs"].data)
    return kept


@call("lightning: a batch")
def _lightning(place: Place) -> dict[str, Any]:
    from tumorsynth.lightning import TumorSynthCallback

    scan, kept = place.phantom("liver"), {}
    images, labels = batch_of((0, 0), (10, 2), (-10, 4))(scan.image, scan.label)
    with_tumors(images[2], labels[2])
    spacing = torch.tensor([(2, 2, 2.5), (1, 1, 1), (3, 2, 2)])
    common = {"organ_labels": LIVER, "tumor_label": TUMOR, **RULE}
    for name, more in {
        "dictionary": {"p": 0.7, "spacing": "mm", "seed": 3},
        "healthy only": {"spacing": (2, 2, 2.5), "seed": 4, "healthy_only": True},
        "organ": {"organ": "organ", "spacing": (2, 2, 2.5), "seed": 5},
        "seed of torch": {"spacing": (2, 2, 2.5)},
    }.items():
        callback = TumorSynthCallback(**{**common, **more})
        strategy = SimpleNamespace(broadcast=lambda seed: seed)
        trainer = SimpleNamespace(current_epoch=2, global_rank=1, strategy=strategy)
        torch.manual_seed(12)
        callback.on_train_start(trainer, None)
        for index in range(2):
            batch = {"image": images, "label": labels, "mm": spacing, "organ": labels}
            if "organ" in more:
                batch["label"] = torch.zeros_like(labels, dtype=torch.int32)
            callback.on_train_batch_start(trainer, None, batch, index)
            made = outcome(batch["image"], batch["label"], report=callback.report)
            kept[f"{name} {index}"] = made
        kept[f"{name}, state"] = as_json(callback.state_dict())
    return kept


@call("nnunet: a training step's batch")
def _nnunet(place: Place) -> dict[str, Any]:
    """What reaches nnU-Net's own training step, with and without its augmentation."""
    folder = place.folder("nnunet")
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    given = {**{name: str(folder / name) for name in names}, "nnUNet_n_proc_DA": "0"}
    before = {name: os.environ.get(name) for name in (*given, "TUMORSYNTH_NNUNET")}
    os.environ.update(given)
    os.environ.pop("TUMORSYNTH_NNUNET", None)
    try:
        try:
            from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

            import tumorsynth.nnunet as adapter
        except ImportError as error:
            if error.name == "tumorsynth" or "nnU-Net" not in str(error):
                raise
            return {"absent": True}

        class Records:
            def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
                self.batch = batch
                return {"loss": 0.0}

        class Trainer(adapter.TumorSynthMixin, Records, nnUNetTrainer):
            def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
                pass

        kept = {}
        for name, settings in {
            "plain": {"p": 1.0},
            "p, healthy only": {"p": 0.7, "healthy_only": True},
        }.items():
            trainer = _nnunet_trainer(Trainer, folder, settings)
            np.random.seed(0)
            torch.manual_seed(0)
            trainer.initialize()
            train, _ = trainer.get_dataloaders()
            batch = next(train)
            batch["target"][0, 0, 10:14, 10:14, 10:14] = 2 if "healthy" in name else 0
            for k in range(2):
                trainer.train_step(batch)
                levels = trainer.batch["target"]
                made = outcome(trainer.batch["data"], levels[0], report=trainer.synthesis.report)
                kept[f"{name} {k}"] = {**made, "levels": [array(level) for level in levels]}
        return kept
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _nnunet_trainer(kind: type, folder: Path, settings: dict[str, Any]) -> Any:
    """A trainer over five small preprocessed cases with a liver."""
    import pickle

    patch, spacing = (24, 32, 32), (3.0, 2.0, 2.0)
    mean, std, low, high = 95.0, 22.0, -20.0, 210.0
    cases = folder / "nnUNet_preprocessed" / "Dataset900_Toy" / "toy"
    cases.mkdir(parents=True, exist_ok=True)
    (folder / "nnUNet_results").mkdir(exist_ok=True)
    for i in range(5):  # the folds
        rng, shape = np.random.default_rng(i), (26, 34, 36)
        grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        seg = (sum(g**2 for g in grid) < 0.75).astype(np.int8)
        hu = 20 + 80 * seg + rng.normal(0, 8, shape)
        data = ((hu.clip(low, high) - mean) / std).astype(np.float32)
        np.savez(cases / f"case_{i}.npz", data=data[None], seg=seg[None])
        where: dict[Any, Any] = {v: np.argwhere(seg[None] == v)[:50] for v in (1, 2)}
        for key in ((-1, 0, 1, 2), (0, 1, 2)):  # later and earlier releases
            where[key] = np.argwhere(seg[None] >= 0)[::500]
        (cases / f"case_{i}.pkl").write_bytes(pickle.dumps({"class_locations": where}))
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3] * 3] * 3,
            "strides": [[1] * 3, [2] * 3, [2] * 3],
            "n_conv_per_stage": [1] * 3,
            "n_conv_per_stage_decoder": [1] * 2,
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    full = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "data_identifier": "toy",
        "patch_size": list(patch),
        "spacing": list(spacing),
        "median_image_size_in_voxels": list(patch),
        "architecture": network,
    }
    intensities = {"mean": mean, "std": std, "percentile_00_5": low, "percentile_99_5": high}
    plans = {
        "continue_training": False,
        "dataset_name": "Dataset900_Toy",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {"3d_fullres": full},
    }
    dataset = {
        "channel_names": {0: "CT"},
        "labels": {"background": 0, "liver": 1, "tumor": 2},
        "file_ending": ".nii.gz",
        "tumorsynth": {"generator": "hu2023", "count": 1, "size_mm": 14, **settings},
    }
    module = sys.modules[next(c for c in kind.__mro__ if c.__name__ == "nnUNetTrainer").__module__]
    for name in ("nnUNet_preprocessed", "nnUNet_results"):  # read on import until 2.7
        if isinstance(getattr(module, name, ""), str | None):
            setattr(module, name, str(folder / name))
    return kind(plans, "3d_fullres", 0, dataset, device=torch.device("cpu"))


# -- the command line ------------------------------------------------------------------------------


def environment_of_commands() -> dict[str, str]:
    root = str(Path(ts.__file__).resolve().parents[1])
    rest = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, rest] if rest else [root]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }


def command(place: Place, *words: Any) -> dict[str, Any]:
    """Exit code and texts of ``python -m tumorsynth WORDS``, without paths, times and versions."""
    done = subprocess.run(
        [sys.executable, "-m", "tumorsynth", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=place.work,
        env=environment_of_commands(),
    )

    def plain(text: str) -> str:
        for folder, name in ((place.kept, "KEPT"), (place.work, "WORK")):
            text = text.replace(str(folder), name)
        text = re.sub(r" \[\d[^\]\n]*\]$", "", text, flags=re.M)  # the pace of a collection
        return re.sub(r"tumorsynth: note: made by version.*\n", "", text)

    return {"exit": done.returncode, "stdout": plain(done.stdout), "stderr": plain(done.stderr)}


def files(folder: Path) -> dict[str, Any]:
    """What a folder holds: arrays and headers of NIfTI, JSON as read, the names of the rest."""
    import nibabel

    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.endswith((".nii", ".nii.gz")):
            image = nibabel.load(path)
            header = hashlib.sha256(image.header.binaryblock).hexdigest()
            found[name] = {**array(np.asarray(image.dataobj)), "header_sha256": header}
        elif name.endswith(".json"):
            found[name] = json.loads(path.read_text())
            if isinstance(found[name], dict):
                found[name].pop("tumorsynth", None)  # the version
        else:
            found[name] = "there"
    return found


PAIR = ("a_ct.nii.gz", "a_label.nii.gz")
COMMANDS: dict[str, tuple[Any, ...]] = {
    "liver-early": ("--generator", "liver-early", "--count", 1, "--size-mm", 8, 14, "--seed", 3),
    "hu2023": ("--generator", "hu2023", "--count", "1-3", "--seed", 4),
    "prior, contrast prior, mass effect": (
        "--generator hu2023 --size-prior liver --contrast-prior liver-arterial --mass-effect 0.3"
    ).split(),
    "several organs, bulge, contrast": (
        "--generator hu2023 --organ-label 1 --organ-label 3 --organ-label 4 --bulge 0.1-0.4 "
        "--count 4 --size-mm 8 12 --contrast-hu -60 -30 --blend difftumor"
    ).split(),
    "mass effect auto": (
        "--generator hu2023 --count 1 --size-mm 25 28 --mass-effect auto --seed 6"
    ).split(),
    "p=0": ("--generator", "hu2023", "--p", 0),
    "no room": ("--generator", "hu2023", "--size-mm", 150, 160, "--count", 1),
}


def _add_commands() -> None:
    for name, words in COMMANDS.items():

        def run(place: Place, name: str = name, words: tuple[Any, ...] = words) -> dict[str, Any]:
            out, scans = place.folder(f"command {name}") / "out", place.scans()
            pair = [scans / file for file in PAIR]
            said = command(place, "synthesize", *pair, "-o", out, "--tumor-label", TUMOR, *words)
            return {**said, "files": files(out) if out.exists() else {}}

        CALLS[f"command: synthesize, {name}"] = run


_add_commands()


@call("command: a collection, by two processes, and resumed")
def _collection(place: Place) -> dict[str, Any]:
    folder, scans = place.folder("collection"), place.scans()
    words = ("--tumor-label", TUMOR, "--generator", "hu2023", "--seed", 9, "--size-mm", 8, 12)
    kept = {}
    for name, more in (("one", ()), ("two", ("--workers", 2))):
        said = command(place, "synthesize", scans, "-o", folder / name, *words, *more)
        if name == "two":  # the scans end in any order
            said["stdout"] = "\n".join(sorted(said["stdout"].splitlines()))
        kept[name] = {**said, "files": files(folder / name)}
    for path in (folder / "one").glob("b_*"):
        path.unlink()
    said = command(place, "synthesize", scans, "-o", folder / "one", *words)
    kept["resumed"] = {**said, "files": files(folder / "one")}
    said = command(place, "synthesize", scans, "-o", folder / "one", *words)
    kept["all there"] = {**said, "files": files(folder / "one")}
    kept["another seed"] = command(
        place, "synthesize", scans, "-o", folder / "one", *words, "--seed", 10
    )
    half_done = place.kept / "half_done"  # as the recording code left it, resumed by this code
    if place.recording:
        shutil.copytree(folder / "one", half_done)
        for path in half_done.glob("b_*"):
            path.unlink()
    shutil.copytree(half_done, folder / "half_done")
    said = command(place, "synthesize", scans, "-o", folder / "half_done", *words)
    kept["of the recorded run"] = {**said, "files": files(folder / "half_done")}
    return kept


@call("command: replay of recorded reports")
def _replay(place: Place) -> dict[str, Any]:
    """Reports that the recording code wrote, replayed by this code."""
    folder, scans = place.folder("replay"), place.scans()
    pair = [scans / file for file in PAIR]
    kept = {}
    chosen = ("liver-early", "several organs, bulge, contrast")
    for name in chosen:
        report = place.kept / "reports" / f"{re.sub(r'[^a-z0-9]+', '_', name)}.json"
        if place.recording:
            report.parent.mkdir(exist_ok=True)
            words = ("-o", folder / "first", "--overwrite", "--tumor-label", TUMOR, *COMMANDS[name])
            command(place, "synthesize", *pair, *words)
            shutil.copy(folder / "first" / "a_report.json", report)
        said = command(place, "replay", report, *pair, "-o", folder / "again", "--overwrite")
        kept[name] = {**said, "files": files(folder / "again")}
    other = [scans / file.replace("a_", "b_") for file in PAIR]
    kept["another scan"] = command(place, "replay", report, *other, "-o", folder / "other")
    changed = json.loads(report.read_text())
    changed["voxels_sha256"]["new_ct"] = "0" * 64
    (folder / "changed.json").write_text(json.dumps(changed))
    kept["other voxels"] = command(
        place, "replay", folder / "changed.json", *pair, "-o", folder / "changed"
    )
    (folder / "broken.json").write_text("{")
    kept["no report"] = command(
        place, "replay", folder / "broken.json", *pair, "-o", folder / "broken"
    )
    return kept


@call("command: demo")
def _demo(place: Place) -> dict[str, Any]:
    out = place.folder("demo") / "out"
    said = command(place, "demo", "-o", out, "--generator", "hu2023", "--count", 2, "--seed", 2)
    return {**said, "files": files(out)}


@call("command: info and help")
def _info(place: Place) -> dict[str, Any]:
    return {
        "liver-early": command(place, "info", "liver-early"),
        "all": command(place, "info"),
        "version": {"exit": command(place, "--version")["exit"]},
        "help": {"exit": command(place, "--help")["exit"]},
        "synthesize --help": {"exit": command(place, "synthesize", "--help")["exit"]},
    }


@call("command: wrong input")
def _wrong_commands(place: Place) -> dict[str, Any]:
    import nibabel

    folder, scans = place.folder("wrong"), place.scans()
    ct, label = (scans / file for file in PAIR)
    scan = place.phantom("liver")
    zero_one = nibabel.Nifti1Image(((scan.image[0] + 1000) / 3000).numpy(), scan.affine)
    nibabel.save(zero_one, folder / "scaled.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"this is no NIfTI file")
    out = ("-o", folder / "out", "--generator", "hu2023")
    synth = ("synthesize", ct, label, *out)
    cases: dict[str, tuple[Any, ...]] = {
        "no such file": ("synthesize", folder / "no.nii.gz", label, *out),
        "no label": ("synthesize", ct, *out),
        "another grid": ("synthesize", ct, scans / "b_label.nii.gz", *out),
        "broken file": ("synthesize", folder / "broken.nii.gz", label, *out),
        "not HU": ("synthesize", folder / "scaled.nii.gz", label, *out),
        "organ missing": (*synth, "--organ-label", 99),
        "labels equal": (*synth, "--tumor-label", 1),
        "size twice": (*synth, "--size-mm", 8, 20, "--size-prior", "liver"),
        "size prior": (*synth, "--size-prior", "heart"),
        "contrast as a name": (*synth, "--contrast-hu", "liver-portal"),
        "bulge": (*synth, "--bulge", "much"),
        "mass effect": (*synth, "--mass-effect", 3),
        "generator": (*synth, "--generator", "no-such-generator"),
        "device": (*synth, "--device", "abacus"),
        "unknown option": (*synth, "--nope"),
        "unknown command": ("synthesise",),
        "out is an input": ("synthesize", ct, label, "-o", scans, "--generator", "hu2023"),
        "empty folder": ("synthesize", place.folder("empty"), *out),
        "training without data": (
            *("train", "denoiser", folder / "no.npz", "-o", folder / "x"),
            *("--autoencoder", "liver-early"),
        ),
    }
    kept: dict[str, Any] = {name: command(place, *words) for name, words in cases.items()}
    return {**kept, "left behind": sorted(p.name for p in folder.iterdir())}


# -- training --------------------------------------------------------------------------------------

TINY = (
    "--preset tiny --picture-every 0 --log-every 1 --warmup 2 --save-every 2 --batch-size 2 "
    "--precision 32-true --accelerator cpu --workers 1"
).split()
STAGES: dict[str, tuple[Any, ...]] = {
    "autoencoder": ("--patch-size", 16, "--steps", 30),
    "denoiser": (
        "--patch-size 32 --steps 30 --pool 4 --reuse 3 --autoencoder liver-early --tumor-label 20"
    ).split(),
}


@call("training: resume of recorded checkpoints")
def _training(place: Place) -> dict[str, Any]:
    """Trainings that the recording code began and lost, ended by this code."""
    folder = place.folder("training")
    pack = place.kept / "pack.npz"
    if place.recording:
        _write_pack(place, folder, pack)
    kept: dict[str, Any] = {}
    for stage, flags in STAGES.items():
        killed = place.kept / f"killed_{stage}"
        words = ("train", stage, pack, "-o", folder / stage, *TINY, *flags)
        if place.recording:
            _killed(place, folder / stage, words)
            shutil.move(folder / stage, killed)
        shutil.copytree(killed, folder / stage)
        kept[stage] = _trained(folder / stage, command(place, *words, "--resume"))
    generator = place.kept / "generator"  # what the recording code trained, used by this code
    if place.recording:
        shutil.copytree(folder / "denoiser", generator)
        (generator / "checkpoint.pt").unlink()
    kept["used"] = run_core(place, {**SMALL, "generator": str(generator)}, phantom="training")
    kept["used"].pop("report")  # it names the generator's folder
    kept["info"] = command(place, "info", generator)
    return kept


def _write_pack(place: Place, folder: Path, pack: Path) -> None:
    import nibabel

    scan = place.phantom("training")
    synth = ts.SynthesizeTumor("hu2023", LIVER, TUMOR, count=2, size_mm=(9, 12), contrast_hu=-50)
    image, label = synth(scan.image, scan.label, spacing=scan.spacing, seed=1)
    assert bool((label == TUMOR).any()), synth.report
    for name, values in (("ct", image[0].round().short()), ("label", label[0])):
        stored = nibabel.Nifti1Image(values.numpy(), scan.affine)
        nibabel.save(stored, folder / f"{name}.nii.gz")
    entry = {"image": "ct.nii.gz", "label": "label.nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({"training": [entry]}))
    said = command(place, "train", "pack", folder / "dataset.json", "-o", pack)
    assert said["exit"] == 0, said


def _killed(place: Place, run: Path, words: tuple[Any, ...]) -> None:
    """Begin a training and kill it after its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tumorsynth", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=place.work,
        env=environment_of_commands(),
    )
    while not (run / "checkpoint.pt").exists():
        if process.poll() is not None:
            raise RuntimeError(f"the training ended: {process.communicate()[0]}")
        time.sleep(0.005)
    process.kill()
    process.communicate()
    if (run / "card.json").exists():
        raise RuntimeError("the training was over before it could be killed; give it more steps")


def _trained(run: Path, said: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    assert said["exit"] == 0, said
    weights = load_file(run / "model.safetensors")
    card = json.loads((run / "card.json").read_text())
    card["training"].pop("seconds")
    return {
        "exit": said["exit"],
        "weights": {name: array(tensor) for name, tensor in sorted(weights.items())},
        "card": as_json(card),
        "files": sorted(p.name for p in run.iterdir() if p.is_file()),
    }


# -- timing ----------------------------------------------------------------------------------------


def timings(place: Place, repeats: int = 5) -> dict[str, float]:
    """CPU seconds, medians: imports, a call of each kind, the search for places."""
    start = "import time; t = time.process_time(); "
    end = "; print(time.process_time() - t)"
    imports = {
        "import tumorsynth": start + "import tumorsynth" + end,
        "SynthesizeTumor, torch loaded": (
            "import torch; " + start + "import tumorsynth; tumorsynth.SynthesizeTumor" + end
        ),
        "command line --help": None,
    }
    found: dict[str, list[float]] = {}
    for name, code in imports.items():
        words = ["-m", "tumorsynth", "synthesize", "--help"] if code is None else ["-c", code]
        for _ in range(repeats):
            before = os.times()
            text = subprocess.run(
                [sys.executable, *words],
                capture_output=True,
                text=True,
                check=True,
                env=environment_of_commands(),
            ).stdout
            after = os.times()
            spent = after.children_user - before.children_user
            found.setdefault(name, []).append(spent if code is None else float(text))
    scan, little = place.phantom("liver"), little_organ(*_copies(place))
    calls: dict[str, tuple[dict[str, Any], Any, Any, Any]] = {
        "liver-early, 1 tumour": (SMALL, scan.image, scan.label, scan.spacing),
        "hu2023, 2 tumours": (RULE, scan.image, scan.label, scan.spacing),
        "hu2023, 20 small tumours": (
            {**RULE, "count": 20, "size_mm": (5, 6)},
            scan.image,
            scan.label,
            scan.spacing,
        ),
        "p=1e-9, left alone": ({**RULE, "p": 1e-9}, scan.image, scan.label, scan.spacing),
        "no room, placing alone": ({**RULE, "size_mm": 40}, *little, scan.spacing),
        "crowded, mostly placing": (
            {**RULE, "organ_labels": PANCREAS, "count": 8, "size_mm": 18},
            scan.image,
            scan.label,
            scan.spacing,
        ),
    }
    for name, (settings, image, label, spacing) in calls.items():
        synth = ts.SynthesizeTumor(**{"organ_labels": LIVER, "tumor_label": TUMOR, **settings})
        synth(image, label, spacing=spacing, seed=0)  # loads the generator
        for k in range(repeats):
            began = time.process_time()
            synth(image, label, spacing=spacing, seed=k)
            found.setdefault(name, []).append(time.process_time() - began)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def _copies(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    scan = place.phantom("liver")
    return scan.image.clone(), scan.label.clone()


# -- record and compare ----------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What the bits of a result may depend on."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "threads": torch.get_num_threads(),
    }


def run_calls(names: Iterable[str], place: Place, quiet: bool = True) -> dict[str, Any]:
    """The results of some calls, as they are kept; an error that no call expects is a result."""
    results = {}
    for name in names:
        began = time.time()
        try:
            result = CALLS[name](place)
        except Exception as error:
            if place.recording:
                raise
            result = {"raised": f"{type(error).__name__}: {error}"}
        results[name] = json.loads(json.dumps(result))
        if not quiet:
            print(f"  {name}: {time.time() - began:.1f} s", file=sys.stderr, flush=True)
    return results


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, str, str]]:
    """(kind, path, words) of each difference; kind is changed, words, missing or new."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{path}.{key}" if path else key
            if key not in new:
                found.append(("missing", where, "missing"))
            elif key not in old:
                found.append(("new", where, ""))
            else:
                found += differences(old[key], new[key], where)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [one for k, (a, b) in pairs for one in differences(a, b, f"{path}[{k}]")]
    a, b = json.dumps(old), json.dumps(new)  # tells 1 from 1.0 and from true, and NaN is itself
    if a == b:
        return []
    prose = re.sub(r"\[\d+\]$", "", path).rpartition(".")[2] in WORDS
    prose = prose and isinstance(old, str) and isinstance(new, str)
    return [("words" if prose else "changed", path, f"{_short(a)} -> {_short(b)}")]


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def line(name: str, found: list[tuple[str, str, str]], most: int = 6) -> str:
    """What differs in one call, in one line."""
    arrays = [path.removesuffix(".sha256") for _, path, _ in found if path.endswith(".sha256")]
    rest = [
        f"{path} {words}"
        for kind, path, words in found
        if kind != "new" and not path.endswith(".sha256")
    ]
    new = sorted({re.sub(r"\[\d+\]", "", path) for kind, path, _ in found if kind == "new"})
    parts = [", ".join(arrays)] if arrays else []
    parts += rest[:most] + ([f"and {len(rest) - most} more"] if len(rest) > most else [])
    parts += [f"new key {', '.join(new)}"] if new else []
    return f"{name}: {'; '.join(parts)}"


def compare_results(
    old: dict[str, Any], new: dict[str, Any], allow_words: bool = False
) -> tuple[list[str], bool]:
    """A line for each call that differs, and whether any difference is a failure."""
    lines, failed = [], False
    for name in [*old, *(n for n in new if n not in old)]:
        if name not in new or name not in old:
            lines.append(f"{name}: only in the {'record' if name in old else 'new run'}")
            failed = True
            continue
        found = differences(old[name], new[name])
        if found:
            lines.append(line(name, found))
        harmless = ("new", "words") if allow_words else ("new",)
        failed |= any(kind not in harmless for kind, _, _ in found)
    return lines, failed


def kept_folder(file: Path) -> Path:
    return file.with_suffix(".files").resolve()


def record(file: Path, names: Iterable[str], timed: bool = True, quiet: bool = True) -> None:
    """Write FILE.json and the folder FILE.files, whole or not at all."""
    kept, part = kept_folder(file), kept_folder(file).with_suffix(".files.part")
    if file.exists() or kept.exists():
        raise SystemExit(f"{file} or {kept.name} exists; remove it or choose another name")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        place = Place(part, Path(work).resolve(), recording=True)
        document = {
            "environment": environment(),
            "calls": run_calls(names, place, quiet),
            "cpu_seconds": timings(place) if timed else {},
        }
    temporary = file.with_suffix(".json.part")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    part.rename(kept)
    temporary.rename(file)


def compare(
    file: Path, names: Iterable[str] | None = None, timed: bool = True, allow_words: bool = False
) -> int:
    """Run the calls of a record again; print what differs; the exit code."""
    document = json.loads(file.read_text())
    old = document["calls"]
    chosen = [name for name in old if names is None or name in set(names)]
    chosen_new = [name for name in (CALLS if names is None else names) if name in CALLS]
    if names is None and len(old) < len(CALLS):
        chosen_new = [name for name in chosen_new if name in old]  # a record of some calls
    now = environment()
    for key, value in document["environment"].items():
        if now.get(key) != value:
            print(f"note: {key} was {value!r}, is {now.get(key)!r}; bits may depend on it")
    with tempfile.TemporaryDirectory() as work:
        place = Place(kept_folder(file), Path(work).resolve(), recording=False)
        new = run_calls(chosen_new, place)
        times = timings(place) if timed and document["cpu_seconds"] else {}
    lines, failed = compare_results({n: old[n] for n in chosen}, new, allow_words)
    print("\n".join(lines + [f"{len(new)} calls, {len(lines)} differ or have new keys"]))
    if times:
        print(f"{'CPU seconds, median of 5':36}{'recorded':>10}{'now':>10}")
        for name, value in times.items():
            was = document["cpu_seconds"].get(name, math.nan)
            print(f"{name:36}{was:10.4f}{value:10.4f}")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="FILE.json; FILE.files lies beside it")
    parser.add_argument("--only", metavar="TEXT", help="calls whose name holds TEXT")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--allow-words", action="store_true", help="changed texts are no failure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = None if args.only is None else [name for name in CALLS if args.only in name]
    if args.what == "compare":
        return compare(args.file, names, not args.no_timing, args.allow_words)
    record(args.file, CALLS if names is None else names, not args.no_timing, quiet=False)
    print(f"{args.file}: {len(CALLS if names is None else names)} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
