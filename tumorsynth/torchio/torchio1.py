"""The TorchIO transforms for TorchIO 0.20 to 1.x; see `tumorsynth.torchio`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torchio import Subject
from torchio.transforms import Transform
from torchio.transforms.augmentation import RandomTransform

from tumorsynth.adapter import SETTINGS, Adapter
from tumorsynth.arguments import check_keywords
from tumorsynth.pipeline.validation import check_grid
from tumorsynth.torchio.shared import (
    DRAWN,
    RESAMPLE,
    check_asked,
    check_names,
    check_record,
    nameable,
    random_repr,
    spared,
)

# TorchIO's own arguments, which a transform and what it leaves in the history have in common
_BASE = ("copy", "include", "exclude", "keep", "parse_input", "label_keys")


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
        check_keywords(self, kwargs, SETTINGS, Transform)
        check_asked(image, label, organ)
        self.settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        super().__init__(**kwargs)
        self.adapter = Adapter(organ is not None, healthy_only, **self.settings)
        self.settings["generator"] = nameable(
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
        check_names(self.name, names, images)
        if spared(names[:2], self.include, self.exclude):
            return False
        image, label, *organ = (images[name] for name in names)
        check_grid(names, [part.affine for part in (image, label, *organ)], RESAMPLE)
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
        tumor_label, count, size_mm, contrast_hu, intensity, blend, sigma_mm, gap_mm, merge, device,
        gate, mass_effect, shapes, bulge) and of :class:`torchio.Transform` (p, copy, include,
        exclude, keep, ...).

    Integer images and labels keep their dtype; values are rounded. A generator must be named, in a
    folder or hand-crafted: the history holds its name and can be replayed elsewhere.
    """

    def __repr__(self) -> str:
        return random_repr(self, self.probability)

    def apply_transform(self, subject: Subject) -> Subject:
        seed = int(torch.randint(2**63 - 1, (1,)))
        if self._synthesize(subject, seed=seed) and self.parse_input:
            # what was just done, in the form that does it again
            again = self._again()
            subject.add_transform(again, again._get_reproducing_arguments())
        return subject

    def _again(self) -> SynthesizeTumor:
        settings = {k: v for k, v in self.settings.items() if k not in DRAWN}
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
        contrast_hu, mass_effect, shapes, bulge, healthy_only) do nothing here.
    """

    def __init__(self, params: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.params = copy.deepcopy(check_record(params))
        self.args_names = ["params", "image", "label", "organ", *self.settings]
        for name, value in self.settings.items():  # TorchIO looks the arguments up by name
            setattr(self, name, value)

    def apply_transform(self, subject: Subject) -> Subject:
        self._synthesize(subject, params=[self.params])
        return subject
