"""What the transforms for TorchIO 1 and 2 share; it imports nothing of TorchIO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tumorsynth.adapter import Adapter
from tumorsynth.appearance.gate import Gate
from tumorsynth.appearance.segmenter import SegmenterScorer
from tumorsynth.generators.store import bundled_names
from tumorsynth.pipeline.validation import is_record

RESAMPLE = "put tio.ToReferenceSpace or tio.Resample in front"
# the name that TorchIO gives to a tensor, an array or an image outside of a subject
_DEFAULT_NAMES = ("default_image_name", "tio_default_image")

# arguments of `Adapter` that say where voxels lie
GEOMETRY = ("spacing", "override_affine")

# settings whose draws params hold, so that a replay does not need them
DRAWN = ("count", "size_mm", "sigma_mm", "contrast_hu", "mass_effect", "shapes", "bulge")


def generator_for_history(generator: Any, adapter: Adapter) -> Any:
    """Return the generator as the history may keep it: a name, or an object without weights.

    Raises:
        ValueError: for a generator with weights that exists in memory alone.
    """
    source = adapter.synth.handle.source
    if source is None and hasattr(generator, "save"):
        raise ValueError(
            "generator must have a name or a folder, since TorchIO's history keeps it, but this "
            "one is in memory alone; save it with generator.save(folder) and pass the folder"
        )
    return generator if source is None else source


def settings_for_history(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as the history keeps them: what a replay needs, and no network."""
    kept = {name: value for name, value in settings.items() if name not in DRAWN}
    gate = kept.get("gate")
    if isinstance(gate, Gate) and isinstance(gate.scorer, SegmenterScorer):
        kept["gate"] = gate.without_scorer()
    return kept


def check_names(image: Any, label: Any, organ: Any) -> None:
    """Raise ValueError unless image, label and organ are different names.

    A generator in the first place, where ts.SynthesizeTumor has it, gets a message of its own.
    """
    names = [name for name in (image, label, organ) if name is not None]
    if not isinstance(image, str) or image in bundled_names():
        found = repr(image) if isinstance(image, str | list) else type(image).__name__
        raise ValueError(
            f"image must be the name of one of the subject's images, got {found}; the first "
            "argument is the image's name, a generator goes to generator=..."
        )
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"image, label and organ must be different names, got {names}")


def check_subject(transform: str, names: Sequence[str], images: Iterable[str]) -> None:
    """Raise an error unless the subject has images of all these names.

    Args:
        transform: name of the transform, for the message.
        names: that the transform needs.
        images: names that the subject has.
    """
    present = list(images)
    missing = [name for name in names if name not in present]
    if missing and set(present) <= set(_DEFAULT_NAMES):
        raise TypeError(
            f"{transform} needs an image and its label, but got one image alone; pass a subject: "
            "tio.Subject(image=tio.ScalarImage(...), label=tio.LabelMap(...))"
        )
    if missing:
        raise ValueError(
            f"{transform} needs the image {', '.join(missing)}, but the subject has "
            f"{', '.join(present)}; pass image=..., label=... with the names it has"
        )


def check_record(params: Any) -> dict[str, Any]:
    """Return one entry of ``synth.params``, given as it is or in a list of one.

    Raises:
        ValueError: for anything else.
    """
    record = params[0] if isinstance(params, list | tuple) and len(params) == 1 else params
    if not is_record(record):
        several = isinstance(params, list | tuple)
        found = f"a list of {len(params)}" if several else f"{params!r:.60}"
        raise ValueError(
            "params must be the record of one sample, a dict with applied and tumors, got "
            f"{found}; pass synth.params[0] of an earlier call, or what the history holds"
        )
    return record


def is_left_out(names: Iterable[str], include: Any, exclude: Any) -> bool:
    """Return whether TorchIO's include or exclude leave out one of the images."""
    return any(
        (exclude is not None and name in exclude) or (include is not None and name not in include)
        for name in names
    )


def random_repr(transform: Any, p: float) -> str:
    """Return the repr of a random transform, with the arguments that were given."""
    names = f"image={transform.image!r}, label={transform.label!r}"
    names += "" if transform.organ is None else f", organ={transform.organ!r}"
    given = transform.adapter.described()
    return f"{type(transform).__name__}({names}, p={p:g}{', ' if given else ''}{given})"
