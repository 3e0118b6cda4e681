"""What the adapters of all frameworks share.

An adapter takes the user's container apart, calls the core, and puts the result back into the types
that came in. It holds no science.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tumorsynth.appearance.segmenter import SegmenterScorer
from tumorsynth.arguments import check_flag, keywords_of
from tumorsynth.label_maps import organ_values, read_label_map
from tumorsynth.pipeline.call import Synthesis
from tumorsynth.pipeline.frames import Carried, check_spacing
from tumorsynth.pipeline.label_map_check import LabelMapCheck
from tumorsynth.pipeline.place_batch import PlacedSample, skip_sample
from tumorsynth.pipeline.requests import skip_records
from tumorsynth.pipeline.taken_label import TakenLabelCheck
from tumorsynth.pipeline.validation import (
    as_whole,
    check_input,
    plain,
)
from tumorsynth.placement import skip_reasons
from tumorsynth.placement.arguments import check_organ_labels, check_tumor_label
from tumorsynth.placement.organ import is_organ
from tumorsynth.placement.types import Skip, SkipCode
from tumorsynth.synthesizer import SynthesizeTumor
from tumorsynth.tracing import untraced

# the core's arguments with their defaults, without p, for which every framework has its own word
SETTINGS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(SynthesizeTumor).parameters.items()
    if name != "p"
}
MAX_SEED = 2**63 - 1  # exclusive
# torch has them since 2.3, with few operators
_WIDE = [getattr(torch, name, None) for name in ("uint16", "uint32", "uint64")]


@keywords_of(SynthesizeTumor, without=["p"])
class Adapter:
    """Calls the core with what a framework's container holds.

    Integer images (HU as read from a file) are computed in float32; changed voxels are rounded
    and clipped to the image's dtype. A label keeps its dtype, whichever it is. ``adapter.synth.p``
    is 1 unless the framework lets the core decide which samples get tumours.

    Args:
        separate_organ: whether every call brings a separate organ map. ``organ_labels`` are then
            values of that map and ``tumor_label`` is a value of the label, so that they may be
            equal. The map stays as it is; a tumour replaces any value of the label.
        healthy_only: skip samples whose label holds a tumour already. The paper synthesises on
            healthy scans alone.
        spacing: mm per voxel along X, Y, Z. None takes it, and the orientation, from the affine
            that comes with image, label or organ map. Without one, voxels count as 1 mm; there,
            and where it stems from one that libraries give to plain arrays, the transform
            warns once.
        override_affine: whether ``spacing`` wins over an affine that contradicts it, instead of an
            error.
        **settings: the arguments of `tumorsynth.SynthesizeTumor`, without p.

    Raises:
        ValueError: for an argument that is out of range or unknown.
        TypeError: for an argument of the wrong type or name.
    """

    def __init__(
        self,
        separate_organ: bool = False,
        healthy_only: bool = False,
        spacing: Any = None,
        override_affine: bool = False,
        **settings: Any,
    ) -> None:
        self.separate_organ = check_flag("separate_organ", separate_organ)
        self.healthy_only = check_flag("healthy_only", healthy_only)
        self.override_affine = check_flag("override_affine", override_affine)
        check_spacing(spacing)
        self.spacing = spacing
        own = {"healthy_only": healthy_only, "override_affine": override_affine}
        self.given = {**settings, **{name: value for name, value in own.items() if value}}
        if spacing is not None:
            self.given["spacing"] = spacing
        self.tumor_label: int = settings.get("tumor_label", SETTINGS["tumor_label"])
        if separate_organ:
            _check_separate_organ(settings)
            self.tumor_label = check_tumor_label(self.tumor_label, ())
            label_map = read_label_map(settings.get("label_map"))
            organs = settings.get("organ_labels", SETTINGS["organ_labels"])
            organs = check_organ_labels(organ_values(organs, label_map))
            # a free value of the map that is made for the core
            made = {"organ_labels": organs, "tumor_label": max(organs) + 1, "label_map": None}
            settings = {**settings, **made}
        self.synth = SynthesizeTumor(**settings)
        self.taken_label = self.synth.taken_label
        if separate_organ:
            self.label_map_check = LabelMapCheck(label_map, max(organs))
            self.taken_label = TakenLabelCheck(self.tumor_label, self.synth.organ_labels)
            self.synth.taken_label.close()

    def __repr__(self) -> str:
        return f"Adapter({self.described()})"

    def described(self) -> str:
        """Return the settings that the user gave as "name=value, ...", for a framework's repr."""
        source = self.synth.handle.source
        given = {
            name: source if name == "generator" and source is not None else value
            for name, value in self.given.items()
        }
        return ", ".join(f"{name}={value!r}" for name, value in given.items())

    def score_with(self, network: Any) -> None:
        """Let a gate's `tumorsynth.SegmenterScorer` without a model score with this network."""
        gate = self.synth.settings.gate
        if gate is not None and isinstance(gate.scorer, SegmenterScorer):
            gate.scorer.bind(network)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per tumour, or per reason for none, of the last call."""
        return self.synth.report

    @untraced
    def __call__(
        self,
        image: Tensor,
        label: Tensor,
        organ: Tensor | None = None,
        excluded: Sequence[bool] | None = None,
        names: Sequence[Any] = ("image", "label", "organ"),
        carried: Sequence[Carried] | None = None,
        **call: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return a new (image, label) of the same types, dtypes and metadata.

        If no sample gets a tumour, the inputs themselves come back, uncopied.

        Args:
            image: (B, 1, X, Y, Z) or (1, X, Y, Z), integer or floating point.
            label: the same shape, whole numbers.
            organ: the separate organ map, the same shape.
            excluded: for each sample, whether the framework excludes it.
            names: what the user calls the three, for messages.
            carried: affines that came along with the three, where they are no MetaTensors.
            **call: spacing, affine, seed, params, contrast_hu and first_phase, as for the core's
                ``forward``; the default of spacing is the constructor's.

        Raises:
            ValueError: for input that cannot work.
            TypeError: for input of the wrong type.
            RuntimeError: on CUDA in a forked worker process.
        """
        if organ is None and self.separate_organ:
            raise ValueError(
                "organ must be given: this synthesis was made for a separate organ map"
            )
        if carried is None:
            parts = zip(names, (image, label, organ), strict=False)
            carried = [Carried.of(name, part) for name, part in parts]
            if call.get("first_phase") is not None:
                carried.append(Carried.of("first_phase", call["first_phase"]))
        call.setdefault("spacing", None if "affine" in call else self.spacing)
        work_image = image.float() if _holds_integers(image) else image
        if _holds_integers(call.get("first_phase")):
            call["first_phase"] = call["first_phase"].float()
        if organ is not None or self.healthy_only or _is_wide(label):
            check_input(work_image, label, self.tumor_label)
            label = as_whole("label", label)
        if organ is not None:
            _check_organ_map(label, organ)
            organ = as_whole("the organ map", organ)
        skips = self._skips(image, label, organ, excluded)
        if skips and len(skips) == _batch_size(image):  # check nothing else and load no generator
            placed = [PlacedSample(skip_sample(skips[b]), []) for b in sorted(skips)]
            self._keep(Synthesis.of(image, label, skip_records(placed), placed))
            return image, label
        work_label = label
        if organ is not None:
            work_label = self._organ_and_tumor(label, organ)
        elif _is_wide(label):
            work_label = label.to(torch.int64)

        synthesis = self._synthesize(
            work_image,
            work_label,
            exclude=skips,
            carried=carried,
            override_affine=self.override_affine,
            **call,
        )

        self._keep(synthesis)
        if synthesis.image is work_image:  # no sample got a tumour
            return image, synthesis.label if work_label is label else label
        new_image, new_label = synthesis.image, synthesis.label
        if work_image is not image:
            changed = plain(new_image) != plain(work_image)
            new_image = _replace(image, changed, _round_to(plain(new_image), image.dtype))
        if work_label is not label:
            changed = plain(new_label) != plain(work_label)
            if organ is None:
                value = plain(new_label).to(label.dtype)
            else:
                value = torch.tensor(self.tumor_label, device=label.device).to(label.dtype)
            new_label = _replace(label, changed, value)
        return new_image, new_label

    def _keep(self, synthesis: Synthesis) -> None:
        self.synth.report, self.synth.params = synthesis.report, synthesis.params

    def _skips(
        self,
        image: Tensor,
        label: Tensor,
        organ: Tensor | None,
        excluded: Sequence[bool] | None,
    ) -> dict[int, Skip]:
        """Return why samples, by their number in the batch, are to be skipped."""
        skips: dict[int, Skip] = {}
        if self.healthy_only:
            labels = plain(label) if label.ndim == 5 else plain(label)[None]
            voxels = (labels == self.tumor_label).flatten(1).sum(1).tolist()
            skips = {
                b: Skip(SkipCode.HAS_TUMOR, skip_reasons.has_tumor(count, self.tumor_label))
                for b, count in enumerate(voxels)
                if count
            }
            if skips:
                self._judge_tumor_label(label, organ)
        if excluded is not None:
            if len(excluded) != _batch_size(image):
                raise ValueError(
                    f"there must be one answer for each of the {_batch_size(image)} samples, "
                    f"got {len(excluded)}; give one bool per sample of the batch"
                )
            skip = Skip(SkipCode.EXCLUDED, skip_reasons.EXCLUDED)
            skips |= {b: skip for b, is_excluded in enumerate(excluded) if is_excluded}
        return skips

    def _synthesize(self, image: Tensor, label: Tensor, **call: Any) -> Synthesis:
        """Call the core; explain torch's error about CUDA in a forked process."""
        try:
            return self.synth.synthesize(image, label, **call)
        except RuntimeError as error:
            if "forked subprocess" not in str(error):  # torch's own words
                raise
            raise RuntimeError(
                "the synthesis cannot use CUDA in a forked worker process; synthesise on the "
                "batch in the training process (BatchSynthesizeTumord, TumorSynthCallback, or "
                "ts.SynthesizeTumor itself), use MONAI's ThreadDataLoader, or start the workers "
                "with DataLoader(..., multiprocessing_context='spawn')"
            ) from error

    def _organ_and_tumor(self, label: Tensor, organ: Tensor) -> Tensor:
        """Return one map for the core: the map's organs and the label's tumours."""
        label, organ = plain(label), plain(organ)
        if self.label_map_check.is_open:
            self.label_map_check.check_all(organ if organ.ndim == 5 else [organ])
        both = torch.zeros(organ.shape, dtype=torch.int64, device=organ.device)
        for value in self.synth.organ_labels:
            both[is_organ(organ, (value,))] = value
        tumor = label == self.tumor_label
        both[tumor] = self.synth.tumor_label
        if self.taken_label.is_open and bool(tumor.any()):
            self._judge_tumor_label(label, organ)
        return both

    def _judge_tumor_label(self, label: Tensor, organ: Tensor | None) -> None:
        """Warn once if the label holds an organ of the tumours' value."""
        label = plain(label).to(torch.int64) if _is_wide(label) else plain(label)
        organs = None if organ is None else is_organ(plain(organ), self.synth.organ_labels)
        for b in range(_batch_size(label)):
            if self.taken_label.is_open:
                where = (b, 0) if label.ndim == 5 else (0,)
                self.taken_label.judge(
                    label[where], organ=None if organs is None else organs[where]
                )


def _check_organ_map(label: Tensor, organ: Tensor) -> None:
    """Raise ValueError unless a separate organ map goes with the label."""
    if not isinstance(organ, Tensor) or organ.shape != label.shape:
        found = tuple(organ.shape) if isinstance(organ, Tensor) else type(organ).__name__
        raise ValueError(
            f"the organ map must have the label's shape {tuple(label.shape)}, got {found}; "
            "resample it onto the label's grid"
        )
    if organ.device != label.device:
        raise ValueError(
            f"organ map and label must be on one device, got {organ.device} and {label.device}"
        )


def _check_separate_organ(settings: dict[str, Any]) -> None:
    """Refuse settings that need the organ and its surroundings in one label."""
    if settings.get("bulge"):
        raise ValueError(
            "bulge must be off where the organ is in a map of its own, which does not tell "
            f"what lies around it, got {settings['bulge']!r}; put the organ into the label"
        )
    if settings.get("mass_effect"):
        raise ValueError(
            "mass_effect must be 0 where the organ is in a map of its own, which would not "
            f"move with the label, got {settings['mass_effect']!r}; put the organ into the "
            "label"
        )


def _batch_size(image: Tensor) -> int:
    return len(image) if image.ndim == 5 else 1


def _is_wide(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in _WIDE


def _holds_integers(x: object) -> bool:
    if not isinstance(x, Tensor):
        return False
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded and clipped to an integer dtype."""
    limits = torch.iinfo(dtype)
    return x.round().clamp(limits.min, limits.max).to(dtype)


def _replace(x: Tensor, changed: Tensor, value: Tensor) -> Tensor:
    """Return a clone of x, with its subclass and metadata, that is ``value`` where ``changed``."""
    clone = x.clone()
    voxels = plain(clone)
    if _is_wide(voxels):  # torch before 2.4 has few operators for unsigned integers
        wide = torch.where(changed, value.to(torch.int64), voxels.to(torch.int64))
        voxels.copy_(wide.to(voxels.dtype))
    else:
        voxels.copy_(torch.where(changed, value, voxels))
    return clone
