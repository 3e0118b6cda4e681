"""One image of a file: its numbers as stored, and what is needed to write them back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tumorsynth.label_values import ROUNDING, round_labels

MAX_COUNTED = 1 << 16  # values of a label that are counted one by one
LABEL_DTYPES = ("uint8", "int16", "int32")  # of a map whose own dtype cannot hold its values


@dataclass(frozen=True)
class Volume:
    """The image of one file: the numbers as stored, and what is needed to write them back.

    Attributes:
        name: of the file, for messages.
        stored: (X, Y, Z), any real dtype, in the file's own orientation.
        slope: value = stored * slope + inter.
        inter: see ``slope``.
        affine: (4, 4) float64, voxel to mm (RAS).
        header: nibabel's of a NIfTI; further entries (a dict) of NRRD and MetaImage; None of DICOM.
    """

    name: str
    stored: np.ndarray
    slope: float
    inter: float
    affine: np.ndarray
    header: Any

    @property
    def is_scaled(self) -> bool:
        """Whether the stored numbers are not the values."""
        return (self.slope, self.inter) != (1.0, 0.0)

    def values(self) -> np.ndarray:
        """The values, (X, Y, Z) float32: HU for a CT."""
        if not self.is_scaled:
            return self.stored.astype(np.float32)
        return (self.stored * self.slope + self.inter).astype(np.float32)

    def integers(self) -> np.ndarray:
        """The values of a label map, (X, Y, Z) int32; do not change them in place.

        Values that the file's own scale quantised count as the whole numbers they were.

        Raises:
            ValueError: if a value is not whole, is below -1 (nnU-Net's value for voxels beyond the
                scan) or does not fit.
        """
        return self._integers

    @cached_property
    def _integers(self) -> np.ndarray:
        if self.stored.dtype.kind in "iu" and not self.is_scaled:
            whole = self.stored
        else:
            values = self.stored.astype(np.float64) * self.slope + self.inter
            try:
                whole = round_labels(values, self._rounding())
            except ValueError as error:
                raise ValueError(
                    f"a label must hold whole numbers, but {self.name} holds {error}; give a label "
                    "map, not an image or a probability map, and resample it with the nearest "
                    "neighbour"
                ) from None
        low, high = int(whole.min()), int(whole.max())
        if low < np.iinfo(np.int32).min or high > np.iinfo(np.int32).max:
            raise ValueError(
                f"a label must fit 32-bit integers, but {self.name} holds values from {low} to "
                f"{high}; renumber its labels"
            )
        if low < -1:
            raise ValueError(
                f"a label must hold whole numbers from 0 up, but {self.name} holds {low}; give the "
                "label map, not the CT"
            )
        return whole.astype(np.int32)

    def held_values(self) -> list[int]:
        """The values that a label map holds, ascending."""
        whole = self.integers()
        low, high = int(whole.min()), int(whole.max())
        if high - low < MAX_COUNTED:  # much faster than sorting
            counts = np.bincount((whole - low).ravel())
            return [int(v) + low for v in np.flatnonzero(counts)]
        return [int(v) for v in np.unique(whole)]

    def _rounding(self) -> float:
        """How far from a whole number a quantised label may lie: half a step of the scale.

        From a step of 1 on, several labels would become one.
        """
        step = abs(self.slope)
        quantised = self.stored.dtype.kind in "iu" and step < 1
        return max(ROUNDING, step / 2 * (1 + 1e-6)) if quantised else ROUNDING

    def as_label(self) -> Volume:
        """This label map with its values stored as whole numbers, without a scale.

        It is the same object where they are stored so already. The dtype stays if it can hold them.

        Raises:
            ValueError: as for `integers`.
        """
        return self._as_label

    @cached_property
    def _as_label(self) -> Volume:
        if self.stored.dtype.kind in "iu" and not self.is_scaled:
            return self
        whole = self.integers()
        low, high = int(whole.min()), int(whole.max())
        dtypes = [self.stored.dtype, *map(np.dtype, LABEL_DTYPES)]
        dtype = next(dtype for dtype in dtypes if _holds(dtype, low) and _holds(dtype, high))
        stored = whole.astype(dtype)
        if not self.is_scaled and np.array_equal(stored, self.stored):
            return self
        return replace(self, stored=stored, slope=1.0, inter=0.0)

    def store(self, value: np.ndarray) -> np.ndarray:
        """Convert values to this file's stored numbers: unscaled, rounded to nearest, clipped."""
        raw = (np.asarray(value, np.float64) - self.inter) / self.slope
        dtype = self.stored.dtype
        if dtype.kind in "iu":
            info = np.iinfo(dtype)
            raw = np.clip(np.rint(raw), info.min, info.max)
        return raw.astype(dtype)

    def with_changes(self, changed: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Copy the stored numbers and put values into the changed voxels.

        Args:
            changed: (X, Y, Z) bool.
            values: (N,), N = changed.sum(), in C order.
        """
        out = self.stored.copy()
        out[changed] = self.store(values)
        return out

    def check_label_fits(self, value: int) -> None:
        """Raise ValueError if this label file, as `as_label` writes it, cannot store ``value``."""
        dtype = self.as_label().stored.dtype
        if not _holds(dtype, value):
            limits = ""
            if dtype.kind in "iu":
                info = np.iinfo(dtype)
                limits = f" ({info.min} to {info.max})"
            raise ValueError(
                f"the tumour label must fit the label file, but {self.name} holds {dtype}"
                f"{limits} and the tumour label is {value}; choose a value that fits or convert "
                "the label file"
            )


def _holds(dtype: np.dtype, value: int) -> bool:
    """Whether a dtype can hold a label value, in floating point up to a relative 1e-6."""
    if dtype.kind not in "iu":
        return abs(float(dtype.type(value)) - value) <= 1e-6 * max(1, abs(value))
    info = np.iinfo(dtype)
    return info.min <= value <= info.max
