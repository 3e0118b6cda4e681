"""Make a procedural abdominal CT in the portal-venous phase, as a healthy stand-in for a scan.

Every structure is a signed distance on a coarse lattice fixed in world coordinates. It is
interpolated to the voxels of the structure's box and painted with a soft edge, the scanner's blur,
over earlier structures. The anatomy therefore depends on the position in mm and the seed only: any
spacing and any field show the same patient. Only the noise depends on the voxels.

Axes are RAS: x grows to the patient's right, y to the front, z to the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tumorsynth.arguments import any_bool, is_bool, keywords_of, known_keywords
from tumorsynth.devices import plain_defaults
from tumorsynth.phantom.anatomy import Patient
from tumorsynth.phantom.landmarks import LABELS
from tumorsynth.phantom.painting import paint_patient
from tumorsynth.phantom.shapes import Corners, Interpolated, Lattice
from tumorsynth.threads import one_thread

__all__ = ["LABELS", "Phantom", "make_phantom"]

FIELD_MM = (320.0, 260.0, 160.0)  # the default field of view, centred on 0
FOCUS_MM = (62.0, 12.0, 22.0)  # a point in the liver, towards which smaller fields shift
HALF_EDGE_MM = 0.8  # half the width of a painted edge
NOISE_HU = 15.0  # standard deviation at the body's centre; two thirds of it far from there

SLAB_VOXELS = 2**19  # painted at a time


@keywords_of()
@dataclass(frozen=True)
class Phantom:
    """A healthy abdomen.

    Args:
        image: HU, float32, (1, X, Y, Z).
        label: uint8, same shape; values of `LABELS`, 0 elsewhere.
        spacing: mm per voxel along X, Y, Z.
        affine: (4, 4) float64, from voxels to RAS mm, with a positive diagonal.
    """

    image: Tensor
    label: Tensor
    spacing: tuple[float, float, float]
    affine: np.ndarray


@known_keywords
@plain_defaults()
@one_thread()
def make_phantom(
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    shape: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Phantom:
    """Make one healthy abdomen.

    Args:
        spacing: mm per voxel along X, Y, Z.
        shape: voxels along X, Y, Z; None covers 320 x 260 x 160 mm of the upper abdomen. Smaller
            fields shift towards the liver.
        seed: decides patient and noise, from 0 to 2**63 - 1. The patient does not depend on spacing
            or shape.
        device: where to make it; None is the CPU.

    Returns:
        Image, label, spacing and affine.

    Raises:
        ValueError: if spacing, shape or seed is invalid.

    Examples:
        >>> phantom = ts.make_phantom(spacing=(2.0, 2.0, 2.0), seed=1)
        >>> phantom.image.shape
        torch.Size([1, 160, 130, 80])
    """
    dx, dy, dz = spacing = _three(spacing, float, "spacing", "positive numbers in mm")
    if shape is None:
        shape = [max(1, round(f / s)) for f, s in zip(FIELD_MM, spacing, strict=True)]
    shape = _three(shape, int, "shape", "positive whole numbers of voxels")
    if is_bool(seed) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ValueError(
            f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}; pass for example 0"
        )

    affine = np.diag([dx, dy, dz, 1.0])
    for i in range(3):
        centre = FOCUS_MM[i] * max(0.0, 1 - shape[i] * spacing[i] / FIELD_MM[i])
        affine[i, 3] = centre - (shape[i] - 1) / 2 * spacing[i]

    patient, state = _patient(int(seed))
    rng = torch.Generator()
    rng.set_state(state)
    canvas = _Canvas(patient, affine, shape, torch.device(device or "cpu"))
    paint_patient(canvas.paint, patient)
    image = canvas.image
    image += _noise(shape, spacing, rng, image.device).mul_(canvas.noise_level())
    return Phantom(image.clamp_(min=-1024.0)[None], canvas.label[None], spacing, affine)


@lru_cache(maxsize=4)
def _patient(seed: int) -> tuple[Patient, Tensor]:
    """Return the patient of a seed, and the state of the random numbers after it was drawn.

    Kept, since to grow its vessels takes nearly half of the time of a small field.
    """
    with torch.inference_mode(False):  # a caller's may end before the patient is used again
        rng = torch.Generator().manual_seed(seed)
        return Patient(rng), rng.get_state()


def _three(values: Sequence, kind: type, name: str, rule: str) -> tuple:
    """Convert to three positive numbers of a kind, or raise ValueError."""
    try:
        numbers = tuple(kind(v) for v in values)
        valid = (
            len(numbers) == 3
            and not any_bool(list(values))
            and all(
                math.isfinite(n) and n > 0 and n == v for n, v in zip(numbers, values, strict=True)
            )
        )
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        example = "(1.0, 1.0, 1.0)" if kind is float else "(96, 96, 96)"
        raise ValueError(f"{name} must be three {rule}, got {values!r}; pass for example {example}")
    return numbers


class _Canvas:
    """The image and label to paint on.

    Args:
        patient: whose warp and grain to use.
        affine: (4, 4), from voxels to RAS mm.
        shape: voxels along X, Y, Z.
        device: where image and label are.
    """

    def __init__(
        self, patient: Patient, affine: np.ndarray, shape: Sequence[int], device: torch.device
    ):
        self.patient = patient
        self.axes = [
            affine[i, 3] + affine[i, i] * torch.arange(shape[i], dtype=torch.float64)
            for i in range(3)
        ]
        self.image = torch.full(tuple(shape), -1000.0, device=device)
        self.label = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)

    def paint(
        self,
        box: Corners,
        step: float,
        shape: Callable[[Lattice], Tensor],
        *layers: tuple[float, float | Callable[[Lattice], Tensor], int | None],
        only: int | None = None,
    ) -> None:
        """Paint a structure over what is there.

        Args:
            box: that encloses the structure, in mm.
            step: of the lattice, in mm.
            shape: signed distance to the surface on a lattice, in mm.
            layers: (depth in mm below the surface, HU, label) each; a label of None keeps labels.
            only: paint over this label only; None paints over everything.
        """
        cut, axes = [], []
        for lo, hi, axis in zip(*box, self.axes, strict=True):
            inside = slice(*torch.searchsorted(axis, torch.tensor([lo, hi]).to(axis)).tolist())
            if inside.start == inside.stop:
                return
            cut.append(inside)
            axes.append(axis[inside])
        ends = [a[0].item() for a in axes], [a[-1].item() for a in axes]
        lattice = Lattice(ends, step, self.patient.warp, self.patient.tile)

        def voxels(values: Tensor) -> Interpolated:
            return Interpolated(values.to(self.image.device), lattice.first, step, axes)

        # 0.5 on the surface, 1 from half an edge's width inside
        cover = voxels(0.5 - shape(lattice) * (0.5 / HALF_EDGE_MM))
        paints = [voxels(hu(lattice)) if callable(hu) else hu for _, hu, _ in layers]
        image, label = self.image[tuple(cut)], self.label[tuple(cut)]
        for rows in _slabs(image.shape):
            if not cover.exceeds(0.0, rows):
                continue
            covered, at, values = cover.rows(rows), image[rows], label[rows]
            if only is not None:
                covered.masked_fill_(values != only, 0)
            for (depth, _, value), paint in zip(layers, paints, strict=True):
                deep = depth * 0.5 / HALF_EDGE_MM
                if not cover.exceeds(deep, rows):
                    continue
                hu = paint.rows(rows) if isinstance(paint, Interpolated) else paint
                at.lerp_(torch.as_tensor(hu).to(at), (covered - deep).clamp_(0, 1))
                if value is not None:
                    values.masked_fill_(covered > 0.5 + deep, value)

    def noise_level(self) -> Tensor:
        """Return the standard deviation of the noise in HU, (X, Y, 1)."""
        x, y, _ = (axis.float().to(self.image.device) for axis in self.axes)
        far = (x[:, None] / 150) ** 2 + (y / 110) ** 2
        return (NOISE_HU * (0.65 + 0.35 * torch.exp(-0.8 * far)))[:, :, None]


def _slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Yield the rows along x in parts small enough for a processor's cache."""
    rows = max(1, SLAB_VOXELS // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _noise(
    shape: Sequence[int], spacing: Sequence[float], rng: torch.Generator, device: torch.device
) -> Tensor:
    """Return noise of unit variance with the spectrum of filtered back-projection.

    In the plane that is a ramp, rolled off by the kernel; neighbours 1 mm apart correlate by about
    0.3.
    """
    white = torch.randn(*shape, generator=rng).to(device)
    fx, fy, fz = (
        torch.fft.fftfreq(n, s, device=device) for n, s in zip(shape, spacing, strict=True)
    )
    plane = (fx[:, None] ** 2 + fy**2).sqrt()  # cycles per mm
    power = (0.3 + plane) * torch.exp(-((plane / 0.32) ** 2))
    axial = torch.exp(-((fz / 0.36) ** 2))
    power, axial = power / power.mean(), (axial / axial.mean())[: shape[2] // 2 + 1]
    gain = (power[:, :, None] * axial).sqrt()
    return torch.fft.irfftn(torch.fft.rfftn(white).mul_(gain), s=tuple(shape))
