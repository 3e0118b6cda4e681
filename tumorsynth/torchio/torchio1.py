"""The TorchIO transforms for TorchIO 0.20 to 1.x; see `tumorsynth.torchio`."""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torchio import Image, Subject
from torchio.transforms import Transform
from torchio.transforms.augmentation import RandomTransform

from tumorsynth.adapter import MAX_SEED, SETTINGS, Adapter
from tumorsynth.arguments import keywords_of
from tumorsynth.pipeline.frames import Carried, check_grid
from tumorsynth.torchio.history import stems_from_default
from tumorsynth.torchio.shared import (
    GEOMETRY,
    RESAMPLE,
    check_names,
    check_record,
    check_subject,
    generator_for_history,
    is_left_out,
    random_repr,
    settings_for_history,
)
from tumorsynth.tracing import untraced

FILES_REMEMBERED = 4096

# TorchIO's own arguments, which the transform in the history repeats
_BASE = ("copy", "include", "exclude", "keep", "parse_input", "label_keys")


@keywords_of(Adapter, Transform, without=["separate_organ"])
class _Synthesis(Transform):
    """What the random and the replaying transform share."""

    def __init__(
        self,
        image: str = "image",
        label: str = "label",
        organ: str | None = None,
        healthy_only: bool = False,
        **kwargs: Any,
    ) -> None:
        check_names(image, label, organ)
        names = (*SETTINGS, *GEOMETRY)
        self.settings = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().__init__(**kwargs)
        self.adapter = Adapter(organ is not None, healthy_only, **self.settings)
        self.settings["generator"] = generator_for_history(
            self.settings.get("generator", SETTINGS["generator"]), self.adapter
        )
        self.image, self.label, self.organ = image, label, organ

    @untraced
    def __call__(self, data: Any) -> Any:
        """Return the transformed subject."""
        return super().__call__(data)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last call in this process."""
        return self.adapter.report

    def _synthesize(self, subject: Subject, **call: Any) -> bool:
        """Change the subject in place; return False if include or exclude leave it out."""
        names = [name for name in (self.image, self.label, self.organ) if name is not None]
        images = subject.get_images_dict(intensity_only=False)
        check_subject(self.name, names, images)
        if is_left_out((self.image, self.label), self.include, self.exclude):
            return False
        parts = [images[name] for name in names]
        carried = [
            Carried(name, part.affine, partial(_is_lost, part, subject))
            for name, part in zip(names, parts, strict=True)
        ]
        image, label = parts[:2]
        if self.adapter.spacing is None:
            check_grid(carried, image.spatial_shape, RESAMPLE)
        organ = parts[2].data if self.organ is not None else None
        new_image, new_label = self.adapter(
            image.data, label.data, organ, names=names, carried=carried, **call
        )
        image.set_data(new_image)
        label.set_data(new_label)
        return True


@keywords_of(Adapter, Transform)
class RandomSynthesizeTumor(_Synthesis, RandomTransform):
    """Adds synthetic tumours to a subject's CT and label map, of any spacing and orientation.

    Integer images and labels keep their dtype; values are rounded. The generator must be a name, a
    folder or a hand-crafted one: the history keeps it, so that it can be replayed elsewhere.

    Args:
        image: name of the subject's CT.
        label: name of the label map that gets the tumour.
        organ: name of a separate organ map, of which ``organ_labels`` are then values. By default
            the label marks the organ.
        healthy_only: whether to skip subjects whose label holds a tumour already.
        **kwargs: the arguments of `tumorsynth.SynthesizeTumor`, without p, and of TorchIO's
            own transforms (p, copy, include, exclude, keep, ...).

    Raises:
        ValueError: for a value that is out of range or unknown.
        TypeError: for a value of the wrong type, or an unknown argument.

    Examples:
        >>> transform = RandomSynthesizeTumor(image="ct", label="organs", organ_labels=1, p=0.5)
        >>> subject = transform(subject)
        >>> replay = subject.get_composed_history()
    """

    def __repr__(self) -> str:
        return random_repr(self, self.probability)

    def apply_transform(self, subject: Subject) -> Subject:
        """Add tumours, and put the transform that repeats them into the history."""
        seed = int(torch.randint(MAX_SEED, (1,)))
        if self._synthesize(subject, seed=seed) and self.parse_input:
            replay = self._replay()
            subject.add_transform(replay, replay._get_reproducing_arguments())
        return subject

    def _replay(self) -> SynthesizeTumor:
        """Return the transform that repeats the last call."""
        settings = settings_for_history(self.settings)
        return SynthesizeTumor(
            params=self.adapter.synth.params[0],
            image=self.image,
            label=self.label,
            organ=self.organ,
            **settings,
            **{name: getattr(self, name) for name in _BASE},
        )


@keywords_of(RandomSynthesizeTumor)
class SynthesizeTumor(_Synthesis):
    """Adds the tumours that ``params`` describe: a replay of the history, bit by bit.

    Args:
        params: one entry of ``tumorsynth.SynthesizeTumor.params``.
        **kwargs: as for `RandomSynthesizeTumor`. Those that decide what is drawn (count,
            size_mm, sigma_mm, contrast_hu, mass_effect, shapes, bulge, healthy_only) have no
            effect.

    Raises:
        ValueError: for params that are no such entry.
    """

    def __init__(self, params: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.params = copy.deepcopy(check_record(params))
        self.args_names = ["params", "image", "label", "organ", *self.settings]
        for name, value in self.settings.items():  # TorchIO looks the arguments up by name
            setattr(self, name, value)

    def apply_transform(self, subject: Subject) -> Subject:
        """Add the tumours."""
        self._synthesize(subject, params=[self.params])
        return subject


def _is_lost(image: Image, subject: Subject) -> list[bool]:
    """Return whether the affine stems from one that stands for none."""
    kind: Any = type(image)
    read = partial(_file_place, kind, image.path)
    history = subject.applied_transforms
    return [stems_from_default(image.affine, image.spatial_shape, history, read)]


@lru_cache(FILES_REMEMBERED)
def _file_place(kind: Any, path: Any) -> Any:
    """Return affine and shape of the file that an image comes from, None without one."""
    try:
        file = kind(path) if isinstance(path, Path) else None
        return None if file is None else (file.affine, file.spatial_shape)
    except Exception:  # the file is gone, or its reader raises an error of its own
        return None
