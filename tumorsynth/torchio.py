"""Tumour synthesis as TorchIO transforms.

    tio.Compose([
        tio.ToCanonical(), tio.Resample(1),
        RandomSynthesizeTumor(image="ct", label="organs", p=0.5),   # on HU: before any rescaling,
        tio.RescaleIntensity((0, 1), in_min_max=(-175, 250)),       # or after, intensity=Scaled()
    ])

:class:`RandomSynthesizeTumor` draws from torch's global generator, as TorchIO does, and enters the
subject's history as :class:`SynthesizeTumor`, whose arguments are a few numbers and names.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

try:
    from torchio import Subject
    from torchio.transforms import Transform
    from torchio.transforms.augmentation import RandomTransform
except ImportError as error:
    raise ImportError(
        'tumorsynth.torchio needs TorchIO: pip install "tumorsynth[torchio]"'
    ) from error

from tumorsynth.adapter import SETTINGS, Adapter
from tumorsynth.handcrafted import HandcraftedGenerator

__all__ = ["RandomSynthesizeTumor", "SynthesizeTumor"]

AFFINE_TOLERANCE = 1e-3  # mm; files store float32 affines, and tools round them
# TorchIO's own arguments, which a transform and what it leaves in the history have in common
_BASE = ("copy", "include", "exclude", "keep", "parse_input", "label_keys")
_DRAWN = ("count", "size_mm", "sigma_mm", "contrast_hu")  # what they led to is in params


class _Synthesis(Transform):
    """What the random and the deterministic transform share."""

    def __init__(
        self,
        image: str = "image",
        label: str = "label",
        organ: str | None = None,
        healthy_only: bool = False,
        **kwargs: Any,
    ) -> None:
        self.settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        super().__init__(**kwargs)
        self.adapter = Adapter(organ is not None, healthy_only, **self.settings)
        self.settings["generator"] = _nameable(
            self.settings.get("generator", SETTINGS["generator"]), self.adapter
        )
        self.image, self.label, self.organ = image, label, organ

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last call in this process."""
        return self.adapter.report

    def _synthesize(self, subject: Subject, **call: Any) -> bool:
        """Change the subject; False when include or exclude spare its image or its label."""
        names = [name for name in (self.image, self.label, self.organ) if name is not None]
        images = subject.get_images_dict(intensity_only=False)
        missing = [name for name in names if name not in images]
        if missing:
            raise ValueError(
                f"{self.name} needs the image {', '.join(missing)}, but the subject has "
                f"{', '.join(images)}; pass image=..., label=... with the names it has"
            )
        for name in names[:2]:
            if self.exclude is not None and name in self.exclude:
                return False
            if self.include is not None and name not in self.include:
                return False
        image, label, *organ = (images[name] for name in names)
        for other in (label, *organ):
            if np.abs(other.affine - image.affine).max() > AFFINE_TOLERANCE:
                raise ValueError(
                    f"the images {', '.join(names)} must share one grid, but their affines "
                    "differ; put tio.Resample or tio.ToReferenceSpace in front"
                )
        new_image, new_label = self.adapter(
            image.data, label.data, *(part.data for part in organ), affine=image.affine, **call
        )
        image.set_data(new_image)
        label.set_data(new_label)
        return True


class RandomSynthesizeTumor(_Synthesis, RandomTransform):
    """Adds synthetic tumours to a subject's CT and label map, of any spacing and orientation.

    image, label: names of the subject's images.
    organ: name of a separate map of organs, of which ``organ_labels`` are then values; by default
        the label marks the organ.
    healthy_only: leave subjects alone whose label holds a tumour already.
    kwargs: keyword arguments of :class:`tumorsynth.SynthesizeTumor` (generator, organ_labels,
        tumor_label, count, size_mm, contrast_hu, intensity, blend, sigma_mm, gap_mm, merge, device)
        and of :class:`torchio.Transform` (p, copy, include, exclude, keep, ...).

    Integer images and labels keep their dtype; values are rounded. A generator must be named, in a
    folder or hand-crafted: the history holds its name and can be replayed elsewhere.
    """

    def __repr__(self) -> str:
        names = f"image={self.image!r}, label={self.label!r}"
        names += "" if self.organ is None else f", organ={self.organ!r}"
        given = self.adapter.described()
        return f"{self.name}({names}, p={self.probability:g}{', ' if given else ''}{given})"

    def apply_transform(self, subject: Subject) -> Subject:
        seed = int(torch.randint(2**63 - 1, (1,)))
        if self._synthesize(subject, seed=seed) and self.parse_input:
            # what was just done, in the form that does it again
            again = self._again()
            subject.add_transform(again, again._get_reproducing_arguments())
        return subject

    def _again(self) -> SynthesizeTumor:
        settings = {k: v for k, v in self.settings.items() if k not in _DRAWN}
        return SynthesizeTumor(
            params=self.adapter.synth.params[0],
            image=self.image,
            label=self.label,
            organ=self.organ,
            **settings,
            **{name: getattr(self, name) for name in _BASE},
        )


class SynthesizeTumor(_Synthesis):
    """Adds the very tumours that ``params`` describe: what the history replays, bit by bit.

    params: one record of ``tumorsynth.SynthesizeTumor.params``. The others: as for
        :class:`RandomSynthesizeTumor`; those that say what to draw (count, size_mm, sigma_mm,
        contrast_hu, healthy_only) do nothing here.
    """

    def __init__(self, params: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.params = copy.deepcopy(params)
        self.args_names = ["params", "image", "label", "organ", *self.settings]
        for name, value in self.settings.items():  # TorchIO looks the arguments up by name
            setattr(self, name, value)

    def apply_transform(self, subject: Subject) -> Subject:
        self._synthesize(subject, params=[self.params])
        return subject


def _nameable(generator: Any, adapter: Adapter) -> Any:
    """The generator as the history may hold it: a name, or a hand-crafted one's few numbers."""
    source = adapter.synth.handle.source
    if source is None and not isinstance(generator, HandcraftedGenerator):
        raise ValueError(
            "generator must have a name or a folder, since TorchIO's history keeps it, but this "
            "one is in memory alone; save it with generator.save(folder) and pass the folder"
        )
    return generator if source is None else source
