"""The shape of one tumour: a deformed ellipsoid, as a level field in mm around its centre."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tumorsynth.arguments import is_bool

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MAX_LEVEL = 1.2  # a tumour cut by the organ's surface grows elsewhere by this factor at most
RINGS = 16  # of an outline's directions from pole to pole, twice as many around
WAVES = 16  # terms of the random surface function
DECAY = 1.25  # amplitude of a wave: its number to the power -DECAY
ROUND_OFF = 0.8  # the smaller, the rounder the bumps and the sharper the dents
_CHUNK = 1 << 13  # voxels whose surface function is evaluated at once: 16 waves of them fit a cache


@dataclass(frozen=True)
class TumorParams:
    """Everything random about one tumour; with the label and spacing it fixes every voxel."""

    centre: tuple[int, int, int]  # voxel in the sample's grid
    diameter_mm: float  # equivalent diameter asked for: volume = pi / 6 d^3
    axes: tuple[float, float, float]  # relative half-axes, product 1
    rotation: tuple[float, float, float, float]  # unit quaternion (w, x, y, z)
    roughness: float  # relative amplitude of the surface, standard deviation
    shape_seed: int  # seeds the surface and the centre's place within its voxel
    seed: int  # seeds the generator's noise
    sigma_mm: float  # feather
    drawn_mm: float  # diameter drawn, before any shrinking to fit
    contrast_hu: float | None = None  # that was asked for, None: as the generator has it
    displaced: float = 0.0  # share of its volume for which tissue is pushed aside
    fixed_capsule: bool = False  # of the organ, when tissue is pushed aside
    outline: str = ""  # of a real mask (`mask_shapes`), "": an ellipsoid's
    structure_hu: tuple[float, float] = (0.0, 0.0)  # of a rim and of a necrotic core
    bulge: float = 0.0  # share of its volume that is to lie beyond the organ

    def to_dict(self) -> dict[str, Any]:
        """A dict of numbers and tuples of numbers, ready for JSON."""
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TumorParams:
        """The inverse of `to_dict`, also after JSON made lists of the tuples.

        ValueError for what `to_dict` never gives: it would end in the middle, or not at all.
        """
        if not isinstance(values, dict) or not set(REQUIRED) <= set(values) <= set(NAMES):
            found = sorted(map(str, values)) if isinstance(values, dict) else repr(values)
            raise ValueError(
                f"a tumour's params must hold {', '.join(REQUIRED)}, got {found}; "
                "pass synth.params of an earlier call of this version"
            )
        for name, (number, low, high) in BOUNDS.items():
            value = values.get(name)
            if value is None and name not in REQUIRED:
                continue
            several = isinstance(value, list | tuple)
            parts: list[Any] = [*value] if isinstance(value, list | tuple) else [value]
            kind: Any = int if isinstance(low, int) else Real
            fine = all(isinstance(v, kind) and not is_bool(v) and low <= v <= high for v in parts)
            if not fine or len(parts) != number or several != (number > 1):
                raise ValueError(
                    f"a tumour's {name} must be {number} number(s) from {low:g} to {high:g}, "
                    f"got {value!r}; pass synth.params of an earlier call"
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


NAMES = tuple(f.name for f in fields(TumorParams))
REQUIRED = tuple(f.name for f in fields(TumorParams) if f.default is MISSING)
# how many numbers, from where to where; whole where the bounds are
BOUNDS: dict[str, tuple[int, float, float]] = {
    "centre": (3, 0, 2**31),
    "diameter_mm": (1, 0.001, 1000.0),
    "axes": (3, 0.01, 100.0),
    "rotation": (4, -1.001, 1.001),
    "roughness": (1, 0.0, 10.0),
    "shape_seed": (1, 0, 2**63 - 1),
    "seed": (1, 0, 2**63 - 1),
    "sigma_mm": (1, 0.0, 20.0),
    "drawn_mm": (1, 0.001, 1000.0),
    "contrast_hu": (1, -1500.0, 1500.0),
    "structure_hu": (2, -1500.0, 1500.0),
    "displaced": (1, 0.0, 0.9),
    "bulge": (1, 0.0, 0.9),
}


class Shape:
    """The surface of one tumour, on the CPU. Lengths in mm.

    sphere, ball, rim: points (N, 3) of the surface from the centre, in the directions of SPHERE,
    BALL and RIM. longest: the largest of its relative radii.
    """

    def __init__(self, params: TumorParams) -> None:
        rng = torch.Generator().manual_seed(params.shape_seed)
        f64 = torch.float64
        # Plane waves seen on the unit sphere: wave number k has features of about pi / k radians.
        # Few and long waves on small tumours, or they look like stars; a long tail on large ones,
        # whose outlines are lobed. Real masks have more short waves than this, but theirs are
        # steps from slice to slice, not shape.
        finest = min(max(0.5 * params.diameter_mm, 3.0), 16.0)
        if params.outline:
            finest = 4.0  # a real outline has its own short waves: it is only bent
        number = 2.0 * (finest / 2.0) ** torch.rand(WAVES, 1, generator=rng, dtype=f64).numpy()
        waves = torch.randn(WAVES, 3, generator=rng, dtype=f64).numpy()
        waves *= number / np.sqrt(np.square(waves).sum(1, keepdims=True))
        self.waves = torch.from_numpy(waves)
        self.phases = 2 * math.pi * torch.rand(WAVES, 1, generator=rng, dtype=f64)
        amplitudes = number[:, 0] ** -DECAY
        amplitudes *= params.roughness * math.sqrt(2 / float(np.square(amplitudes).sum()))
        self.amplitudes = torch.from_numpy(amplitudes)
        self.offset = torch.rand(3, generator=rng, dtype=f64) - 0.5  # of the centre, in voxels
        self.outline = _outline(params.outline) if params.outline else None
        if self.outline is not None and float(torch.rand((), generator=rng)) < 0.5:
            self.outline = self.outline.flip(0)  # a mirror image
        self.axes = torch.tensor(params.axes, dtype=f64)
        self.half_axes = self.axes * params.diameter_mm / 2
        self.diameter_mm = params.diameter_mm
        self.volume_mm3 = math.pi / 6 * params.diameter_mm**3
        self.turn = _rotation(params.rotation)
        self.scale = 1.0
        # all directions at once: each call costs more than its numbers
        radius = self.radius(_DIRECTIONS).numpy()
        cubes = radius[: len(SPHERE)] ** 3
        self.scale = float(cubes.mean()) ** (-1 / 3)  # so that level 1 encloses the volume
        radius *= self.scale
        self.longest = float(radius[: len(SPHERE)].max())
        surface = _DIRECTIONS.numpy() * radius[:, None] @ (self.half_axes * self.turn).numpy().T
        self.sphere, self.ball, self.rim = np.split(surface, _PARTS)

    def radius(self, unit: Tensor) -> Tensor:
        """Relative radius (N,) in unit directions (N, 3) of the ellipsoid's own frame.

        Bumps have the same height in mm all over: in proportion to the radius they would draw
        the ends of long tumours out to points.
        """
        return self._radius(unit.T, (unit * self.axes).norm(dim=1))

    def _radius(self, unit: Tensor, ellipsoid: Tensor) -> Tensor:
        """Relative radius (N,) in unit directions (3, N), where the ellipsoid's is (N,)."""
        parts = [
            self.amplitudes @ torch.addmm(self.phases, self.waves, part).cos_()
            for part in (unit.split(_CHUNK, dim=1) if unit.shape[1] > _CHUNK else [unit])
        ]
        bump = torch.cat(parts).div_(ellipsoid)
        found = bump.div_(-ROUND_OFF).expm1_().mul_(-ROUND_OFF).exp_().mul_(self.scale)
        return found if self.outline is None else found * self._outline_at(unit)

    def _outline_at(self, unit: Tensor) -> Tensor:
        """The outline's radius (N,) in unit directions (3, N), cubic between its own."""
        assert self.outline is not None
        x, y, z = unit.clamp(-1, 1)
        ring = z.acos() * (RINGS / math.pi) - 0.5
        around = (torch.atan2(y, x) + math.pi) * (RINGS / math.pi) - 0.5
        # two rings and two columns more on each side: beyond a pole lies the other side
        at = torch.stack(
            [2 * (around + 2) / (2 * RINGS + 3) - 1, 2 * (ring + 2) / (RINGS + 3) - 1], 1
        )
        table = self.outline.to(unit)[None, None]
        found = F.grid_sample(table, at[None, None], mode="bicubic", align_corners=True)
        return found.reshape(-1).clamp_min(0.1)

    def points(self, unit: Tensor, level: float) -> Tensor:
        """Points (N, 3) in mm from the centre, at a level, in given directions of the own frame."""
        return unit * self.radius(unit)[:, None] * self.half_axes * level @ self.turn.T

    def flatness(self) -> float:
        """Shortest over longest axis."""
        if self.outline is None:
            return float(self.axes[2] / self.axes[0])
        surface = SPHERE * self.radius(SPHERE)[:, None]
        weight = surface.norm(dim=1) ** 3  # of each direction's cone
        variance = torch.linalg.eigvalsh((surface * weight[:, None]).T @ surface)
        return float((variance[0] / variance[-1]).sqrt())

    def squares(self, millimetres: Sequence[Floats]) -> Floats:
        """Square (X, Y, Z) of the ellipsoid's own level at grid points, without bumps.

        millimetres: the grid's coordinate vectors, mm from the centre.
        """
        x, y, z = millimetres
        to_own = self.turn / self.half_axes  # own = x @ to_own, in which the ellipsoid is a ball
        form = (to_own @ to_own.T).numpy()
        plane = form[0, 0] * np.square(x)[:, None] + form[1, 1] * np.square(y)
        plane += 2 * form[0, 1] * x[:, None] * y
        slope = 2 * (form[0, 2] * x[:, None] + form[1, 2] * y)
        square = slope[:, :, None] * z
        square += plane[:, :, None]
        square += form[2, 2] * np.square(z)
        return square

    def may_reach(self, squares: Floats, level: float) -> Bools:
        """Where a level of this or less is possible, by `squares`."""
        return squares <= (1.03 * level * self.longest) ** 2

    def level(self, millimetres: Sequence[Floats], squares: Floats, where: Bools) -> Floats:
        """Level (N,) of the grid points ``where`` (X, Y, Z), in their order."""
        x, y, z = millimetres
        i, j, k = where.nonzero()
        points = torch.from_numpy(np.stack([x[i], y[j], z[k]]))
        length = torch.from_numpy(squares[where]).clamp_min_(1e-18).sqrt_()
        to_own = self.turn / self.half_axes
        radius = points.square().sum(0).sqrt_().div_(length).mul_(2 / self.diameter_mm)
        found = length / self._radius(to_own.T @ points / length, radius)
        return found.numpy()


def _outline(text: str) -> Tensor:
    """(RINGS + 4, 2 RINGS + 4) relative radii of an outline, its edges gone on with."""
    try:
        values = list(base64.b64decode(text, validate=True))
        table = torch.tensor(values, dtype=torch.float64).reshape(RINGS, 2 * RINGS)
        if not table.any():
            raise ValueError
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"a tumour's outline must be {2 * RINGS**2} radii in base64, got {text[:20]!r}..."
        ) from error
    table = table / table.mean()
    beyond = table.roll(RINGS, 1)  # over a pole one comes down on the other side
    table = torch.cat([beyond[:2].flip(0), table, beyond[-2:].flip(0)])
    return torch.cat([table[:, -2:], table, table[:, :2]], 1)


def _rotation(quaternion: tuple[float, float, float, float]) -> Tensor:
    """Rotation matrix (3, 3) of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


def fibonacci(n: int) -> Tensor:
    """n unit vectors (n, 3) spread evenly over the sphere."""
    k = torch.arange(n, dtype=torch.float64) + 0.5
    z = 1 - 2 * k / n
    turn = math.pi * (1 + 5**0.5) * k
    ring = (1 - z * z).sqrt()
    return torch.stack([ring * turn.cos(), ring * turn.sin(), z], dim=1)


SPHERE = fibonacci(256)
RIM = fibonacci(64)
BALL = fibonacci(160)
# Radii uniform in volume, in an order unrelated to the directions: those go by the golden ratio,
# with which the points of low level would all lie on one side.
BALL_LEVEL = MAX_LEVEL * ((torch.arange(160, dtype=torch.float64) * 3**0.5) % 1) ** (1 / 3)
_DIRECTIONS = torch.cat([SPHERE, BALL, RIM])
_PARTS = [len(SPHERE), len(SPHERE) + len(BALL)]
