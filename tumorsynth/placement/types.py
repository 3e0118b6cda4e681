"""The data that placement takes and returns: a tumour's params, its voxels, or why it has none."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.arguments import is_bool
from tumorsynth.geometry import Box, Ints3
from tumorsynth.subvoxels import ONE, average_subvoxels, refine_box

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class TumorParams:
    """Everything random about one tumour: with the label and the spacing it fixes every voxel.

    Args:
        centre: voxel of the sample's grid.
        diameter_mm: equivalent diameter d; the tumour's volume is pi / 6 d^3.
        axes: half-axes relative to d / 2, longest first, with product 1.
        rotation: unit quaternion (w, x, y, z).
        roughness: relative amplitude of the surface (standard deviation).
        shape_seed: seeds the surface and the centre's place within its voxel.
        seed: seeds the generator's noise.
        sigma_mm: feather.
        drawn_mm: sampled diameter, before placement made the tumour smaller to fit.
        contrast_hu: requested contrast; None leaves it to the generator.
        displaced: share of the volume that pushes tissue aside instead of replacing it.
        fixed_capsule: whether the organ's surface stays in place when tissue is pushed aside.
        outline: outline of a real mask (see `user_shapes`); "" for an ellipsoid.
        structure_hu: contrast of the rim and of the necrotic core.
        bulge: share of the volume that should lie beyond the organ.
        raised_hu: contrast instead of the generator's own, which the scan's noise would hide; None
            for all other tumours.
        retries: how often the gate had the tumour made again.
        first_mm: its diameter in the first phase, of a tumour that has grown or shrunk since; None
            for all others.
        first_displaced: ``displaced`` in the first phase.
        heterogeneity_hu: standard deviation of the lumps inside.
    """

    centre: tuple[int, int, int]
    diameter_mm: float
    axes: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    roughness: float
    shape_seed: int
    seed: int
    sigma_mm: float
    drawn_mm: float
    contrast_hu: float | None = None
    displaced: float = 0.0
    fixed_capsule: bool = False
    outline: str = ""
    structure_hu: tuple[float, float] = (0.0, 0.0)
    bulge: float = 0.0
    raised_hu: float | None = None
    retries: int = 0
    first_mm: float | None = None
    first_displaced: float = 0.0
    heterogeneity_hu: float = 0.0

    @property
    def first(self) -> TumorParams:
        """The tumour as it was in the first phase."""
        if self.first_mm is None:
            return self
        return replace(
            self,
            diameter_mm=self.first_mm,
            displaced=self.first_displaced,
            first_mm=None,
            first_displaced=0.0,
        )

    @property
    def growth_factor(self) -> float:
        """Diameter over that of the first phase."""
        return 1.0 if self.first_mm is None else self.diameter_mm / self.first_mm

    @property
    def displaces(self) -> bool:
        """Whether it pushes tissue aside, now or in the first phase."""
        return max(self.displaced, self.first_displaced) > 0

    @property
    def has_structure(self) -> bool:
        """Whether it has a rim, a necrotic core or lumps."""
        return self.structure_hu != (0.0, 0.0) or self.heterogeneity_hu > 0

    @property
    def asked_hu(self) -> float | None:
        """The contrast that the generator is asked for; None leaves it to the generator."""
        return self.contrast_hu if self.raised_hu is None else self.raised_hu

    @property
    def repainted(self) -> bool:
        """Whether the tumour was painted again by itself, after the batch it was first in."""
        return self.retries > 0 or self.raised_hu is not None

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of numbers, strings and tuples of numbers, ready for JSON."""
        values = {name: getattr(self, name) for name in PARAM_NAMES}
        for name in LATER_PARAMS:  # absent, so that earlier versions read most params
            if values[name] == OPTIONAL_PARAMS[name]:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TumorParams:
        """Return the params of a `to_dict`, also after JSON turned its tuples into lists.

        Raises:
            ValueError: for missing, unknown or out-of-range values, before a replay works on them.
        """
        if not isinstance(values, dict) or not (
            set(REQUIRED_PARAMS) <= set(values) <= set(PARAM_NAMES)
        ):
            found = sorted(map(str, values)) if isinstance(values, dict) else repr(values)
            raise ValueError(
                f"a tumour's params must hold {', '.join(REQUIRED_PARAMS)}, got {found}; "
                "pass synth.params of an earlier call of this version"
            )
        for name, bounds in PARAM_BOUNDS.items():
            value = values.get(name, OPTIONAL_PARAMS.get(name))
            absent = value is None and OPTIONAL_PARAMS.get(name, MISSING) is None
            if not absent and not bounds.allow(value):
                raise ValueError(
                    f"a tumour's {name} must be {bounds.length} number(s) from {bounds.low:g} to "
                    f"{bounds.high:g}, got {value!r}; pass synth.params of an earlier call"
                )
        for name, wanted in (("fixed_capsule", bool), ("outline", str)):
            if not isinstance(values.get(name, wanted()), wanted):
                raise ValueError(
                    f"a tumour's {name} must be of type {wanted.__name__}, got {values[name]!r}; "
                    "pass synth.params of an earlier call"
                )
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**known)


class ParamBounds(NamedTuple):
    """How many numbers a param holds, and their range; whole numbers where ``low`` is an int."""

    length: int
    low: float
    high: float

    def allow(self, value: object) -> bool:
        """Whether a value read from JSON is within these bounds."""
        several = isinstance(value, list | tuple)
        parts: list[Any] = [*value] if isinstance(value, list | tuple) else [value]
        kind: Any = int if isinstance(self.low, int) else Real
        return (
            several == (self.length > 1)
            and len(parts) == self.length
            and all(isinstance(v, kind) and not is_bool(v) for v in parts)
            and all(self.low <= v <= self.high for v in parts)
        )


MIN_REACHED_SHARE = 0.97  # of the volume that its size asks for; with less it lacks room
PARAM_NAMES = tuple(f.name for f in fields(TumorParams))
REQUIRED_PARAMS = tuple(f.name for f in fields(TumorParams) if f.default is MISSING)
OPTIONAL_PARAMS = {f.name: f.default for f in fields(TumorParams) if f.default is not MISSING}
LATER_PARAMS = (
    "raised_hu",
    "retries",
    "first_mm",
    "first_displaced",
    "heterogeneity_hu",
)  # which only some tumours have
PARAM_BOUNDS: dict[str, ParamBounds] = {
    "centre": ParamBounds(3, 0, 2**31),
    "diameter_mm": ParamBounds(1, 0.001, 1000.0),
    "axes": ParamBounds(3, 0.01, 100.0),
    "rotation": ParamBounds(4, -1.001, 1.001),
    "roughness": ParamBounds(1, 0.0, 10.0),
    "shape_seed": ParamBounds(1, 0, 2**63 - 1),
    "seed": ParamBounds(1, 0, 2**63 - 1),
    "sigma_mm": ParamBounds(1, 0.0, 20.0),
    "drawn_mm": ParamBounds(1, 0.001, 1000.0),
    "contrast_hu": ParamBounds(1, -1500.0, 1500.0),
    "structure_hu": ParamBounds(2, -1500.0, 1500.0),
    "displaced": ParamBounds(1, 0.0, 0.9),
    "bulge": ParamBounds(1, 0.0, 0.9),
    "raised_hu": ParamBounds(1, -1500.0, 1500.0),
    "retries": ParamBounds(1, 0, 99),
    "first_mm": ParamBounds(1, 0.001, 1000.0),
    "first_displaced": ParamBounds(1, 0.0, 0.9),
    "heterogeneity_hu": ParamBounds(1, 0.0, 500.0),
}


@dataclass(frozen=True)
class LocalMask:
    """The voxels of one tumour, in the tight box around them.

    Args:
        params: what the voxels follow from.
        start: the box's first voxel in the sample.
        mask: bool (X, Y, Z), on the CPU: the voxels that are labelled. Every face of the box holds
            a voxel that the tumour fills in part.
        voxels: how many voxels of the mask are the tumour.
        diameter_mm: exact equivalent diameter of these voxels.
        factors: subvoxels along each axis of a voxel (`tumorsynth.subvoxels`).
        subvoxels: bool, the tumour on the box's subvoxels; None where voxels are fine.
        first: the same tumour in the first phase, of one that has grown or shrunk since.

    Examples:
        >>> label[tumor.slices][tumor.mask] = tumor_label
    """

    params: TumorParams
    start: tuple[int, int, int]
    mask: Tensor
    voxels: int
    diameter_mm: float
    factors: Ints3 = ONE
    subvoxels: Tensor | None = None
    first: LocalMask | None = None

    @property
    def fine_mask(self) -> Tensor:
        """The tumour on the finest grid that there is: subvoxels, or else voxels."""
        return self.mask if self.subvoxels is None else self.subvoxels

    @property
    def fine_voxels(self) -> int:
        """How many voxels of ``fine_mask`` are the tumour."""
        return self.voxels if self.subvoxels is None else int(self.subvoxels.sum())

    @property
    def fine_box(self) -> Box:
        """The part of the sample's subvoxels that ``fine_mask`` covers."""
        return refine_box(self.box, self.factors)

    @property
    def reached_factor(self) -> float:
        """Diameter of the labelled voxels over that in the first phase."""
        return 1.0 if self.first is None else self.diameter_mm / self.first.diameter_mm

    @property
    def has_room(self) -> bool:
        """Whether a tumour that has grown found the room that its size asks for."""
        if self.first is None:
            return True
        wanted = self.first.fine_voxels * self.params.growth_factor**3
        return self.fine_voxels >= MIN_REACHED_SHARE * wanted - 1

    @property
    def share(self) -> Tensor:
        """Share of each voxel of the box that the tumour fills, float32."""
        return average_subvoxels(self.fine_mask.float(), self.factors)

    @property
    def mean_share(self) -> float:
        """Mean share of a labelled voxel that the tumour fills."""
        return 1.0 if self.factors == ONE else float(self.share[self.mask].mean())

    @property
    def box(self) -> Box:
        """The part of the sample that ``mask`` covers."""
        return Box.at(self.start, self.mask.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of ``mask`` in the sample."""
        return self.box.slices


class SkipCode(str, Enum):
    """Why a tumour, or a whole sample, was skipped."""

    NOT_SELECTED = "not_selected"  # the probability p left the sample out
    HAS_TUMOR = "has_tumor"  # the label holds a tumour, and healthy_only is on
    EXCLUDED = "excluded"  # the caller excluded the sample
    REPLAYED = "replayed"  # the params skip it; an earlier version wrote them without a code
    NO_ORGAN = "no_organ"  # the label has no voxel of the organ
    NO_ROOM = "no_room"  # the tumour does not fit into the allowed voxels
    NOT_FINITE = "not_finite"  # the image is NaN or infinite in most of the organ
    TISSUE = "tissue"  # the generator is not for the tissue around the tumour
    OUTSIDE_WINDOW = "outside_window"  # the generator's HU window misses the organ
    GATE = "gate"  # the gate rejected every attempt
    IMPLAUSIBLE = "implausible"  # the generator gave NaN, or values that no tissue has
    FAINT = "faint"  # the scan's noise would hide a tumour of any contrast that is likely
    NO_VISIBLE_CHANGE = "no_visible_change"  # the tumour would change too few of its voxels


@dataclass(frozen=True)
class Skip:
    """A tumour that was not made.

    Args:
        code: why, for programs.
        reason: why, for people.
        drawn_mm: sampled diameter; None if none was sampled.
    """

    code: SkipCode
    reason: str
    drawn_mm: float | None = None


class GrowthRegion(Protocol):
    """Where a tumour may grow beyond its organ."""

    def likely_at(self, index: Tensor) -> Tensor:
        """Return a quick estimate of which voxels (3, ...) a tumour may take: bool (...)."""

    def mask_in(self, box: Box) -> Tensor:
        """Return exactly which voxels of a box inside the sample a tumour may take: bool."""
