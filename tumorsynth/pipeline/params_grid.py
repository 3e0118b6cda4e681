"""The grid that params were drawn on: the only one on which they repeat their tumours.

Centres are voxels, and rotations are relative to the tensor's axes. On another grid the same params
would make a tumour of another place, and of other voxels, without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tumorsynth.affines import MAX_SHIFT_VOXELS, largest_shift, sizes_agree
from tumorsynth.arguments import is_bool
from tumorsynth.geometry import Frame, Ints3, frame_from_affine, frame_from_spacing, ints3

MAX_SHEAR_DIFFERENCE = 0.01  # between entries of two shears that count as one


@dataclass(frozen=True)
class ParamsGrid:
    """The grid of a sample.

    Args:
        shape: voxels along the tensor's axes.
        frame: how these axes lie in the patient.
    """

    shape: Ints3
    frame: Frame

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of a sample's params: the affine, or the spacing where there is none."""
        if self.frame.affine is None:
            return {"shape": self.shape, "spacing": self.frame.spacing}
        return {"shape": self.shape, "affine": self.frame.affine}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ParamsGrid | None:
        """Return the grid of an entry of params; None for one of a version that did not keep it.

        Raises:
            ValueError: for an entry that is no grid.
        """
        entry = record.get("grid")
        if entry is None:
            return None
        try:
            shape = entry["shape"]
            if len(shape) != 3 or not all(_is_count(n) for n in shape) or len(entry) != 2:
                raise TypeError("no shape, or not one geometry")
            if "affine" in entry:
                return cls(ints3(shape), frame_from_affine(entry["affine"]))
            return cls(ints3(shape), frame_from_spacing(entry["spacing"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "a record's grid must hold a shape of three whole numbers and an affine or a "
                f"spacing, got {entry!r:.80}; pass synth.params of an earlier call"
            ) from error

    def difference(self, other: ParamsGrid) -> tuple[str, str] | None:
        """Return what another grid differs in, said of this one and of that; None for the same."""
        mine, theirs = self.frame, other.frame
        if self.shape != other.shape:
            return f"of {_by(self.shape)} voxels", f"of {_by(other.shape)}"
        if not sizes_agree(theirs.spacing, mine.spacing):
            return f"of voxels of {_by(mine.spacing)} mm", f"of {_by(theirs.spacing)} mm"
        if (mine.axes, mine.flips) != (theirs.axes, theirs.flips):
            return f"with axes {_letters(mine)}", f"with axes {_letters(theirs)}"
        if mine.affine is not None and theirs.affine is not None:
            first, second = np.asarray(mine.affine), np.asarray(theirs.affine)
            shift = largest_shift(first, second, self.shape)
            if shift > MAX_SHIFT_VOXELS:
                starts = [f"starting at ({_by(a[:3, 3], ', ')}) mm" for a in (first, second)]
                return starts[0], f"{starts[1]}, up to {shift:.3g} voxels away"
        elif np.abs(_shear(mine) - _shear(theirs)).max() > MAX_SHEAR_DIFFERENCE:
            axes = ["at right angles" if f.shear is None else "sheared" for f in (mine, theirs)]
            return f"with axes {axes[0]}", f"with axes {axes[1]}"
        return None


def replay_frames(
    params: Sequence[Mapping[str, Any]],
    shape: Sequence[int],
    frames: Sequence[Frame],
    without: Collection[int] = (),
) -> list[Frame]:
    """Return the frames for a replay: those that the params were drawn for.

    They differ from the call's by rounding at most, as where another program wrote the affine. Each
    voxel is thus as it was.

    Args:
        params: one entry a sample, as `validation.check_params` accepts them. An entry without a
            tumour or a grid, as earlier versions wrote it, fits any grid.
        shape: voxels of each sample.
        frames: of the call's samples.
        without: numbers of samples that get no tumour.

    Raises:
        ValueError: for another shape, voxel size, orientation or place in the patient.
    """
    found = list(frames)
    for number, (record, frame) in enumerate(zip(params, frames, strict=True)):
        drawn = ParamsGrid.of_record(record) if record["tumors"] else None
        if drawn is None or number in without:
            continue
        difference = drawn.difference(ParamsGrid(ints3(shape), frame))
        if difference is not None:
            which = f"params[{number}]" if len(frames) > 1 else "params"
            raise ValueError(
                f"{which} must be replayed on the grid that they were drawn on, {difference[0]}, "
                f"got one {difference[1]}; pass the image of that call with its spacing or affine, "
                "or one that is resampled to its grid, or seed= in place of params= for new tumours"
            )
        if (drawn.frame.affine is None) == (frame.affine is None):
            found[number] = drawn.frame
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not is_bool(value) and 1 <= value < 2**31


def _by(values: Iterable[float], separator: str = " x ") -> str:
    return separator.join(f"{v:.6g}" for v in values)


def _letters(frame: Frame) -> str:
    """Return the direction in the patient of each tensor axis, as "RAS"."""
    ras = [frame.axes.index(axis) for axis in range(3)]
    return "".join("LPI"[i] if frame.flips[i] else "RAS"[i] for i in ras)


def _shear(frame: Frame) -> np.ndarray:
    return np.eye(3) if frame.shear is None else np.asarray(frame.shear)
