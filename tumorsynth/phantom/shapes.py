"""Signed distances (mm, negative inside) on coarse lattices fixed in world coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Point = tuple[float, float, float]
Corners = tuple[Sequence[float], Sequence[float]]  # lower and upper corner of a box, mm


class Waves:
    """Smooth random functions of position, mean 0, variance 1: sums of plane waves.

    Args:
        rng: draws directions, lengths and phases.
        shortest: wavelength, mm.
        longest: wavelength, mm.
        count: number of waves in a sum.
        functions: how many functions to draw.
    """

    def __init__(
        self,
        rng: torch.Generator,
        shortest: float,
        longest: float,
        count: int = 10,
        functions: int = 1,
    ):
        ks, phases = [], []
        for _ in range(functions):
            k = torch.randn(count, 3, generator=rng)
            length = shortest + (longest - shortest) * torch.rand(count, 1, generator=rng)
            ks.append(k / k.norm(dim=1, keepdim=True) * 2 * math.pi / length)
            phases.append(2 * math.pi * torch.rand(count, generator=rng))
        self.k, self.phase = torch.stack(ks, 1), torch.stack(phases, 1)  # (count, functions, ...)

    def __call__(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the functions' values at these positions along a new first axis."""
        one = [*self.phase.shape, *[1] * x.ndim]  # all waves at once, added in their order
        kx, ky, kz = (k.reshape(one) for k in self.k.unbind(2))
        waves = torch.sin(kx * x + ky * y + kz * z + self.phase.view(one))
        total = waves[0]
        for wave in waves[1:]:
            total = total + wave
        return total * math.sqrt(2 / len(self.phase))


class Warp:
    """A smooth displacement between world coordinates and the upright patient.

    Args:
        rng: draws the displacement.
        amplitude: along x, y, z, in mm.
    """

    def __init__(self, rng: torch.Generator, amplitude: Point):
        self.amplitude = amplitude
        self.bend = Waves(rng, 90.0, 220.0, functions=3)

    def shift(self, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        return [a * bend for a, bend in zip(self.amplitude, self.bend(x, y, z), strict=True)]

    def to_world(self, points: Tensor) -> Tensor:
        """Return world positions (N, 3) of upright positions, by fixed-point iteration."""
        found = points
        for _ in range(3):
            found = points - torch.stack(self.shift(*found.T), 1)
        return found


class Interpolated:
    """Lattice values, interpolated linearly at the points of three axes.

    Args:
        values: (x, y, z), on the lattice.
        first: index of the lattice's first point, which lies at ``first * step`` mm.
        step: of the lattice, mm.
        axes: positions along x, y and z, mm, in increasing order.
    """

    def __init__(self, values: Tensor, first: Sequence[int], step: float, axes: Sequence[Tensor]):
        self._at = axes[0] / step - first[0]  # in lattice planes
        to_x, to_y, to_z = (
            (1 - (axis[:, None] / step - first[i] - torch.arange(values.shape[i])).abs())
            .clamp_(min=0)
            .to(values)
            for i, axis in enumerate(axes)
        )
        self._to_x, self._planes = to_x, to_y @ (values @ to_z.T)

    @cached_property
    def _highest(self) -> list[float]:
        """The highest value of each plane."""
        return self._planes.flatten(1).amax(1).tolist()

    def exceeds(self, value: float, rows: slice) -> bool:
        """Return whether any of the planes that these rows lie between is higher somewhere."""
        return max(self._highest[self._near(rows)]) > value

    def rows(self, rows: slice) -> Tensor:
        """Return the values at some of the points along x, and all along y and z."""
        near = self._near(rows)
        values = self._to_x[rows, near] @ self._planes[near].flatten(1)
        return values.view(-1, *self._planes.shape[1:])

    def _near(self, rows: slice) -> slice:
        at = self._at[rows]
        return slice(math.floor(at[0]), math.ceil(at[-1]) + 1)


def resample(values: Tensor, first: Sequence[int], step: float, axes: Sequence[Tensor]) -> Tensor:
    """Return lattice values at the points of three axes; arguments as for `Interpolated`."""
    return Interpolated(values, first, step, axes).rows(slice(None))


def _span(box: Corners, step: float) -> tuple[list[int], list[int]]:
    first = [math.floor(lo / step) for lo in box[0]]
    return first, [max(math.ceil(hi / step), lo + 1) for hi, lo in zip(box[1], first, strict=True)]


class Lattice:
    """Points at multiples of a step that enclose a box.

    Args:
        box: corners in world coordinates, mm.
        step: mm.
        warp: from world coordinates to the upright patient; None is the identity.
        tile: random values (N, N, N) for `grain`.

    Attributes:
        x: coordinate of the points in the upright patient, mm; y and z likewise.
    """

    def __init__(
        self, box: Corners, step: float, warp: Warp | None = None, tile: Tensor | None = None
    ):
        self.step, self.warp, self.tile = step, warp, tile
        self.first, self.last = _span(box, step)
        self.axes = [
            torch.arange(a, b + 1) * step for a, b in zip(self.first, self.last, strict=True)
        ]
        self._numbers = [axis.numpy() for axis in self.axes]
        self.shape = [len(axis) for axis in self.axes]
        self.box = [a * step for a in self.first], [b * step for b in self.last]

    @cached_property
    def _upright(self) -> list[Tensor]:
        grid = [a.view([-1 if i == d else 1 for i in range(3)]) for d, a in enumerate(self.axes)]
        if self.warp is None:
            return [g.expand(self.shape) for g in grid]
        coarse = Lattice(self.box, 12.0)
        shift = self.warp.shift(*coarse._upright)
        return [
            g + resample(s, coarse.first, coarse.step, self.axes)
            for g, s in zip(grid, shift, strict=True)
        ]

    @property
    def x(self) -> Tensor:
        return self._upright[0]

    @property
    def y(self) -> Tensor:
        return self._upright[1]

    @property
    def z(self) -> Tensor:
        return self._upright[2]

    def waves(self, waves: Waves, step: float) -> Tensor:
        """Return waves at the lattice's world positions, computed on points ``step`` mm apart."""
        coarse = Lattice(self.box, step)
        return resample(waves(*coarse._upright)[0], coarse.first, step, self.axes)

    def grain(self, shift: int = 0) -> Tensor:
        """Return random values of unit variance that depend on the world position only."""
        assert self.tile is not None
        i, j, k = (
            (torch.arange(a, b + 1) + shift) % self.tile.shape[0]
            for a, b in zip(self.first, self.last, strict=True)
        )
        return self.tile[i][:, j][:, :, k]

    def ellipsoid(self, centre: Point, radii: Point, shear: float = 0.0) -> Tensor:
        """Return the distance to an ellipsoid.

        Args:
            centre: upright, mm.
            radii: mm, may be infinite.
            shear: mm of x for each mm of z.
        """
        z = self.z - centre[2]
        x, y = (self.x - centre[0] - shear * z) / radii[0], (self.y - centre[1]) / radii[1]
        z = z / radii[2]
        k0 = (x * x + y * y + z * z).sqrt()
        k1 = ((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2).sqrt()
        return k0 * (k0 - 1) / (k1 + 1e-6)

    def tubes(self, *paths: Tensor, reach: float = 5.0) -> Tensor:
        """Return the distance to tubes.

        Args:
            paths: upright points (N, 4) each: x, y, z, radius, in mm.
            reach: largest distance to compute, mm.
        """
        points = torch.cat(paths)
        if self.warp is not None:
            points = torch.cat([self.warp.to_world(points[:, :3]), points[:, 3:]], 1)
        ends = points.double().numpy()
        margin = np.maximum(ends[:-1, 3:], ends[1:, 3:]) + reach
        low = np.minimum(ends[:-1, :3], ends[1:, :3]) - margin
        high = np.maximum(ends[:-1, :3], ends[1:, :3]) + margin
        start = (np.floor(low / self.step) - self.first).clip(0).astype(int)
        stop = (np.ceil(high / self.step) - self.first + 1).clip(0, self.shape).astype(int)
        near = (start < stop).all(1)
        near[np.cumsum([len(path) for path in paths])[:-1] - 1] = False  # from path to path
        out = np.full(self.shape, reach, np.float32)
        points_list, starts, stops = ends.tolist(), start.tolist(), stop.tolist()
        for i in near.nonzero()[0].tolist():
            self._segment(out, points_list[i], points_list[i + 1], starts[i], stops[i])
        return torch.from_numpy(out)

    def _segment(
        self,
        out: np.ndarray,
        a: Sequence[float],
        b: Sequence[float],
        start: list[int],
        stop: list[int],
    ) -> None:
        """Lower out to the distance to one piece of a tube, from a to b, in a part of it."""
        x, y, z = (
            axis[n:m] - np.float32(c)
            for axis, n, m, c in zip(self._numbers, start, stop, a, strict=False)
        )
        x, y = x[:, None, None], y[:, None]
        u, v, w = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        dot = u * u + v * v + w * w + 1e-9
        f = np.float32
        t = x * f(u / dot) + y * f(v / dot) + z * f(w / dot)
        t.clip(0, 1, out=t)
        d = np.square(x - t * f(u))
        d += np.square(y - t * f(v))
        d += np.square(z - t * f(w))
        torch.from_numpy(d).sqrt_()  # rounds as torch does everywhere else here
        t *= f(b[3] - a[3])
        t += f(a[3])
        d -= t
        part = out[start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]]
        np.minimum(part, d, out=part)


def join(a: Tensor, b: Tensor, soft: float) -> Tensor:
    """Return the distance to the union of two shapes, rounded over about ``soft`` mm."""
    h = (soft - (a - b).abs()).clamp_(min=0)
    return torch.minimum(a, b) - h * h / (4 * soft)


def meet(a: Tensor, b: Tensor, soft: float) -> Tensor:
    """Return the distance to the intersection of two shapes, rounded over about ``soft`` mm."""
    return -join(-a, -b, soft)


def spline(points: Sequence[Sequence[float]], pieces: int = 5) -> Tensor:
    """Return a Catmull-Rom curve through points (x, y, z, radius).

    Args:
        points: in mm.
        pieces: of the curve between two points.
    """
    p = torch.tensor(points, dtype=torch.float32)
    p = torch.cat([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = torch.arange(pieces)[:, None, None] / pieces
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + 0.5 * t * ((c - a) + t * ((2 * a - 5 * b + 4 * c - d) + t * (3 * (b - c) + d - a)))
    return torch.cat([curve.transpose(0, 1).reshape(-1, 4), p[-2:-1]])
