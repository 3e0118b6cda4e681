"""The shape of one tumour: a deformed ellipsoid, as the level of each point around its centre.

The level of a point x, in mm from the centre, is |x| / r(direction): r is the radius of an
ellipsoid times a smooth random function of direction, or the radius of a real tumour's outline.
Level 1 encloses the requested volume. Sets of points up to some level are star-shaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.geometry import Rows3
from tumorsynth.placement.types import Bools, Floats, TumorParams

MAX_LEVEL = 1.2  # highest level that a tumour cut by the organ's surface may grow to elsewhere
OUTLINE_RINGS = 16  # directions of an outline from pole to pole, with twice as many around
WAVE_COUNT = 16  # plane waves in the random surface function
WAVE_DECAY = 1.25  # a wave's amplitude is its wave number to the power -WAVE_DECAY
BUMP_ROUNDING = 0.8  # smaller values make bumps rounder and dents sharper
MIN_OUTLINE_RADIUS = 0.1  # relative; cubic interpolation can undershoot
REACH_MARGIN = 1.03  # factor on the largest radius, which is known only in some directions
CHUNK_VOXELS = 1 << 13  # voxels whose surface function is evaluated together, to fit a cache


class Shape:
    """The surface of one tumour, on the CPU. Lengths are in mm unless named otherwise.

    Args:
        params: the tumour; its centre and bulge are not used.
        shear: of the axes of the grids it is asked about; see `tumorsynth.geometry.Frame`.

    Attributes:
        offset: of the true centre from the centre voxel's middle, in voxels (3,).
        axes, half_axes: of the ellipsoid, relative and in mm (3,).
        rotation: (3, 3), from the ellipsoid's own frame to the sample's axes.
        mirrored: whether an outline is mirrored, along its third axis.
        max_radius: largest relative radius.
        sphere, ball, rim: points (N, 3) at level 1 in the directions of SPHERE, BALL and RIM.
    """

    def __init__(self, params: TumorParams, shear: Rows3 | None = None) -> None:
        self._shear = None if shear is None else torch.tensor(shear, dtype=torch.float64)
        rng = torch.Generator().manual_seed(params.shape_seed)
        self._waves = _sample_waves(params, rng)
        self.offset = torch.rand(3, generator=rng, dtype=torch.float64) - 0.5
        self.outline = _decode_outline(params.outline) if params.outline else None
        self.mirrored = self.outline is not None and float(torch.rand((), generator=rng)) < 0.5
        if self.outline is not None and self.mirrored:
            self.outline = self.outline.flip(0)
        self.axes = torch.tensor(params.axes, dtype=torch.float64)
        self.half_axes = self.axes * params.diameter_mm / 2
        self.diameter_mm = params.diameter_mm
        self.volume_mm3 = math.pi / 6 * params.diameter_mm**3
        self.rotation = _rotation_matrix(params.rotation)
        self._scale = 1.0
        # all directions in one call: its overhead is larger than the computation
        radius = self.radius(_DIRECTIONS).numpy()
        cubes = radius[: len(SPHERE)] ** 3
        self._scale = float(cubes.mean()) ** (-1 / 3)  # level 1 encloses the volume
        radius *= self._scale
        self.max_radius = float(radius[: len(SPHERE)].max())
        points = _DIRECTIONS.numpy() * radius[:, None] @ (self.half_axes * self.rotation).numpy().T
        self.sphere, self.ball, self.rim = np.split(points, _SPLITS)

    def radius(self, unit: Tensor) -> Tensor:
        """Return the relative radius (N,) in unit directions (N, 3) of the ellipsoid's own frame.

        Bumps have the same height in mm all over. In proportion to the radius they would turn the
        ends of long tumours into points.
        """
        return self._radius(unit.T, (unit * self.axes).norm(dim=1))

    def _radius(self, unit: Tensor, ellipsoid: Tensor) -> Tensor:
        """Return the relative radius (N,) in unit directions (3, N).

        ellipsoid: the ellipsoid's own relative radius (N,) there.
        """
        vectors, phases, amplitudes = self._waves
        parts = [
            amplitudes @ torch.addmm(phases, vectors, part).cos_()
            for part in (
                unit.split(CHUNK_VOXELS, dim=1) if unit.shape[1] > CHUNK_VOXELS else [unit]
            )
        ]
        bump = torch.cat(parts).div_(ellipsoid)
        rounded = bump.div_(-BUMP_ROUNDING).expm1_().mul_(-BUMP_ROUNDING)
        radius = rounded.exp_().mul_(self._scale)
        return radius if self.outline is None else radius * self._outline_radius(unit)

    def _outline_radius(self, unit: Tensor) -> Tensor:
        """Interpolate the outline's radius (N,) in unit directions (3, N), bicubically."""
        assert self.outline is not None
        x, y, z = unit.clamp(-1, 1)
        rows = z.acos() * (OUTLINE_RINGS / math.pi) - 0.5
        columns = (torch.atan2(y, x) + math.pi) * (OUTLINE_RINGS / math.pi) - 0.5
        # the table is padded by two rows and two columns on each side
        at = torch.stack(
            [
                2 * (columns + 2) / (2 * OUTLINE_RINGS + 3) - 1,
                2 * (rows + 2) / (OUTLINE_RINGS + 3) - 1,
            ],
            1,
        )
        table = self.outline.to(unit)[None, None]
        radius = F.grid_sample(table, at[None, None], mode="bicubic", align_corners=True)
        return radius.reshape(-1).clamp_min(MIN_OUTLINE_RADIUS)

    def points(self, unit: Tensor, level: float) -> Tensor:
        """Return points (N, 3) of a level, in unit directions (N, 3) of the ellipsoid's frame."""
        return unit * self.radius(unit)[:, None] * self.half_axes * level @ self.rotation.T

    def flatness(self) -> float:
        """Return the shortest over the longest axis."""
        if self.outline is None:
            return float(self.axes[2] / self.axes[0])
        surface = SPHERE * self.radius(SPHERE)[:, None]
        cone_volume = surface.norm(dim=1) ** 3
        variance = torch.linalg.eigvalsh((surface * cone_volume[:, None]).T @ surface)
        return float((variance[0] / variance[-1]).sqrt())

    def ellipsoid_squares(self, grid_mm: Sequence[Floats]) -> Floats:
        """Return the squared level (X, Y, Z) of the plain ellipsoid at grid points.

        Args:
            grid_mm: coordinates along X, Y and Z, from the centre.
        """
        x, y, z = grid_mm
        to_own = self.rotation / self.half_axes  # x @ to_own turns the ellipsoid into a ball
        if self._shear is not None:
            to_own = self._shear @ to_own
        form = (to_own @ to_own.T).numpy()
        plane = form[0, 0] * np.square(x)[:, None] + form[1, 1] * np.square(y)
        plane += 2 * form[0, 1] * x[:, None] * y
        slope = 2 * (form[0, 2] * x[:, None] + form[1, 2] * y)
        square = slope[:, :, None] * z
        square += plane[:, :, None]
        square += form[2, 2] * np.square(z)
        return square

    def may_reach(self, squares: Floats, level: float) -> Bools:
        """Return where the level may be this low, judged by `ellipsoid_squares`."""
        return squares <= (REACH_MARGIN * level * self.max_radius) ** 2

    def level(self, grid_mm: Sequence[Floats], squares: Floats, where: Bools) -> Floats:
        """Return the level (N,) of the grid points where a mask (X, Y, Z) is True, in its order.

        Args:
            grid_mm: coordinates along X, Y and Z, from the centre.
            squares: `ellipsoid_squares` of this grid.
            where: bool (X, Y, Z).
        """
        x, y, z = grid_mm
        i, j, k = where.nonzero()
        points = torch.from_numpy(np.stack([x[i], y[j], z[k]]))
        if self._shear is not None:
            points = self._shear @ points
        length = torch.from_numpy(squares[where]).clamp_min_(1e-18).sqrt_()
        to_own = self.rotation / self.half_axes
        ellipsoid = points.square().sum(0).sqrt_().div_(length).mul_(2 / self.diameter_mm)
        level = length / self._radius(to_own.T @ points / length, ellipsoid)
        return level.numpy()


class _Waves(NamedTuple):
    """Plane waves whose sum on the unit sphere is the surface function."""

    vectors: Tensor  # (WAVE_COUNT, 3)
    phases: Tensor  # (WAVE_COUNT, 1)
    amplitudes: Tensor  # (WAVE_COUNT,)


def _sample_waves(params: TumorParams, rng: torch.Generator) -> _Waves:
    """Sample the surface function. Wave number k makes features of about pi / k radians.

    Small tumours get few, long waves, or they would look like stars. Large ones also get short
    waves, since their outlines are lobed. Real masks have more short waves than this, but those are
    steps from slice to slice.
    """
    finest = min(max(0.5 * params.first.diameter_mm, 3.0), 16.0)  # a growing one keeps its waves
    if params.outline:
        finest = 4.0  # a real outline has its own short waves
    number = (
        2.0
        * (finest / 2.0) ** torch.rand(WAVE_COUNT, 1, generator=rng, dtype=torch.float64).numpy()
    )
    vectors = torch.randn(WAVE_COUNT, 3, generator=rng, dtype=torch.float64).numpy()
    vectors *= number / np.sqrt(np.square(vectors).sum(1, keepdims=True))
    phases = 2 * math.pi * torch.rand(WAVE_COUNT, 1, generator=rng, dtype=torch.float64)
    amplitudes = number[:, 0] ** -WAVE_DECAY
    amplitudes *= params.roughness * math.sqrt(2 / float(np.square(amplitudes).sum()))
    return _Waves(torch.from_numpy(vectors), phases, torch.from_numpy(amplitudes))


def _decode_outline(text: str) -> Tensor:
    """Return an outline's relative radii, padded by two rows and columns on each side."""
    try:
        values = list(base64.b64decode(text, validate=True))
        table = torch.tensor(values, dtype=torch.float64).reshape(OUTLINE_RINGS, 2 * OUTLINE_RINGS)
        if not table.any():
            raise ValueError
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"a tumour's outline must be {2 * OUTLINE_RINGS**2} radii in base64, got "
            f"{text[:20]!r}...; pass synth.params of an earlier call"
        ) from error
    table = table / table.mean()
    beyond = table.roll(OUTLINE_RINGS, 1)  # across a pole lies the opposite longitude
    table = torch.cat([beyond[:2].flip(0), table, beyond[-2:].flip(0)])
    return torch.cat([table[:, -2:], table, table[:, :2]], 1)


def _rotation_matrix(quaternion: tuple[float, float, float, float]) -> Tensor:
    """Return the rotation matrix (3, 3) of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


def fibonacci_sphere(n: int) -> Tensor:
    """Return n unit vectors (n, 3) spread evenly over the sphere."""
    k = torch.arange(n, dtype=torch.float64) + 0.5
    z = 1 - 2 * k / n
    turn = math.pi * (1 + 5**0.5) * k
    ring = (1 - z * z).sqrt()
    return torch.stack([ring * turn.cos(), ring * turn.sin(), z], dim=1)


SPHERE = fibonacci_sphere(256)
RIM = fibonacci_sphere(64)
BALL = fibonacci_sphere(160)
# Levels for BALL's directions, uniform in volume. Steps of sqrt(3) are unrelated to the golden
# ratio of the directions; with that, all points of low level would lie on one side.
BALL_LEVEL = MAX_LEVEL * ((torch.arange(160, dtype=torch.float64) * 3**0.5) % 1) ** (1 / 3)
_DIRECTIONS = torch.cat([SPHERE, BALL, RIM])
_SPLITS = [len(SPHERE), len(SPHERE) + len(BALL)]
