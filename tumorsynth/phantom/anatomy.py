"""The phantom's patient: the shape of each structure as a signed distance (upright, RAS, mm)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tumorsynth.phantom.landmarks import CAVA, GALLBLADDER, LIVER_STEMS, MESENTERIC_STEMS, Path
from tumorsynth.phantom.shapes import Corners, Lattice, Warp, Waves, join, meet, spline


class Patient:
    """What the seed decides: warp, grain, subcutaneous fat, vessel trees, bowel.

    Args:
        rng: draws all of it.
    """

    def __init__(self, rng: torch.Generator):
        self.rng = rng
        self.warp = Warp(rng, (4.0, 4.0, 1.5))
        self._wobble, self._ripple = Waves(rng, 20.0, 45.0, 16), Waves(rng, 9.0, 16.0, 16)
        self.tile = torch.randn(64, 64, 64, generator=rng)
        self.fat = 12 + 9 * float(torch.rand((), generator=rng))  # thickness under the skin, mm
        upright = Lattice(((-130, -90, -110), (130, 100, 90)), 4.0)
        self.liver_trees = self._trees(LIVER_STEMS, upright, self.liver(upright) + 3, 1.0)
        self.mesentery = self._trees(MESENTERIC_STEMS, upright, self.cavity(upright) + 6, 1.2)
        self.bowel = self._bowel()

    def around(self, path: Path | Tensor) -> Corners:
        """Return the box around tubes in world coordinates, with a margin for rough surfaces."""
        p = torch.as_tensor(path, dtype=torch.float32)
        centre, margin = self.warp.to_world(p[:, :3]), p[:, 3:] + 5
        return (centre - margin).amin(0).tolist(), (centre + margin).amax(0).tolist()

    def wobble(self, p: Lattice) -> Tensor:
        """Return slow waves, 20 to 45 mm."""
        return p.waves(self._wobble, 6.0)

    def ripple(self, p: Lattice) -> Tensor:
        """Return fast waves, 9 to 16 mm."""
        return p.waves(self._ripple, 3.0)

    def _trees(self, stems: Sequence, p: Lattice, space: Tensor, thinnest: float) -> list[Tensor]:
        """Grow trees of forking tubes; forks share r^3 (Murray's law).

        Args:
            stems: (start, a point on the way, radius, first length) each.
            p: the lattice of ``space``.
            space: negative where a tree may grow.
            thinnest: radius at which trees end, mm.

        Returns:
            Points (N, 4) of each tube: x, y, z, radius.
        """
        paths: list[Tensor] = []
        low, high = torch.tensor(p.first), torch.tensor(p.last)

        def normal() -> Tensor:
            return torch.randn(3, generator=self.rng)

        def blocked(at: Tensor) -> bool:
            i, j, k = ((at / p.step).round().long().clamp(low, high) - low).tolist()
            return bool(space[i, j, k] > 0)

        def grow(at: Tensor, way: Tensor, radius: float, length: float, stem: bool = False) -> None:
            points = [(*at.tolist(), radius)]
            for third in range(3):
                for bend in (0.15, 0.4, 0.7, 1.0, 1.3):  # turn away from the surface
                    turned = way / way.norm() + bend * normal()
                    end = at + turned * (length / 3 / turned.norm())
                    if stem or not blocked(end):
                        break
                else:
                    break
                at, way = end, turned
                points.append((*at.tolist(), radius * (0.96 - 0.04 * third)))
            if len(points) > 1:
                paths.append(torch.tensor(points))
            if len(points) < 4 or radius < thinnest:
                return
            across = torch.linalg.cross(way, normal())
            across, way = across / across.norm(), way / way.norm()
            share = 0.25 + 0.35 * float(torch.rand((), generator=self.rng))
            for part, tilt in (
                (share, 1.0 - 0.5 * share),
                (1 - share, -0.5 - 0.5 * (share - 0.25)),
            ):
                grow(
                    at, way + tilt * across, radius * part ** (1 / 3), length * (0.6 + 0.35 * part)
                )

        for start, through, radius, length in stems:
            a = torch.tensor(start, dtype=torch.float32)
            grow(a, torch.tensor(through) - a, radius, float(length), stem=True)
        return paths

    def _bowel(self) -> Tensor:
        """Return the path of the small bowel: rows of upright coils."""
        points = []
        for middle, rows, right in (
            (-96, (10, 34, 56), 79),
            (-50, (4, 28, 50), 79),
            (-14, (4, 24), -20),
        ):
            for n, y in enumerate(rows):
                xs = range(-78, right, 21)
                for x in xs if n % 2 == 0 else xs[::-1]:
                    up = 16 if (x // 21) % 2 else -16
                    points += [(x, y, middle - up, 10.5), (x, y, middle + up, 10.5)]
        p = torch.tensor(points, dtype=torch.float32)
        p += torch.randn(p.shape, generator=self.rng) * torch.tensor([4.5, 4.5, 5.0, 1.5])
        return spline(p.tolist(), 4)

    # ------------------------------------------------------------------------ body wall

    def outline(self, p: Lattice, inset: float) -> Tensor:
        """Return the distance to the skin, moved inwards: a superellipse, flatter behind."""
        a, front, back = 144 - inset, 109 - inset, 98 - 0.7 * inset
        v = torch.where(p.y > 0, p.y / front, p.y / back).abs()
        k = ((p.x.abs() / a) ** 2.15 + v**2.15) ** (1 / 2.15)
        groove = torch.exp(-((p.x / 10) ** 2)) * torch.sigmoid(-p.y / 6)
        return (p.x**2 + p.y**2).sqrt() * (1 - 1 / (k + 1e-3)) + 4 * groove

    def cavity(self, p: Lattice) -> Tensor:
        """Return the distance to the inside of the muscle wall.

        The wall is thick at the recti and at the back, and thin between the recti.
        """
        rectus = 3.5 * torch.exp(-(((p.x.abs() - 30) / 20) ** 2)) - 2 * torch.exp(-((p.x / 8) ** 2))
        back = 10 * torch.exp(-((p.x / 65) ** 2))
        front = torch.sigmoid(p.y / 6)
        return self.outline(p, self.fat) + 9 + front * rectus + (1 - front) * back + self.wobble(p)

    def below_diaphragm(self, p: Lattice) -> Tensor:
        def dome(cx: float, cz: float, radii: Sequence[float]) -> Tensor:
            x, y, z = (
                (p.x - cx) / radii[0],
                (p.y - 2) / radii[1],
                (p.z - cz).clamp(min=0) / radii[2],
            )
            return ((x * x + y * y + z * z).sqrt() - 1) * 70

        return join(
            dome(56, -5, (78, 90, 78)), dome(-62, -8, (72, 88, 76)), 25
        ) + 0.4 * self.wobble(p)

    def heart(self, p: Lattice) -> Tensor:
        return p.ellipsoid((-22, 34, 102), (56, 44, 40), 0.3) + 1.5 * self.wobble(p)

    def lung(self, p: Lattice) -> Tensor:
        d = meet(self.cavity(p) + 3, 1.5 - self.below_diaphragm(p), 3)
        d = meet(d, 14 + 0.4 * p.y - p.z, 6)
        d = meet(d, 4 - self.heart(p), 6)
        return meet(d, -p.ellipsoid((-3, -22, 0), (27, 46, math.inf)), 6)

    def muscle(self, p: Lattice) -> Tensor:
        def mass(cx: float, cy: float, rx: float, ry: float) -> Tensor:
            u, v = (p.x.abs() - cx) / rx, (p.y - cy) / ry
            return ((u * u + v * v).sqrt() - 1) * min(rx, ry)

        psoas = mass(35, -38, 12, 13) + 0.09 * (p.z + 20).clamp(-60, 90)
        back = torch.minimum(mass(27, -70, 26, 16), mass(62, -62, 19, 8))
        back = meet(back, self.outline(p, self.fat) + 1.5, 4)
        return torch.minimum(psoas, back) + 0.8 * self.wobble(p)

    def ribs(self) -> list[Tensor]:
        """Return the paths of the ribs from the 12th upwards, right and left."""
        depth, paths = self.fat + 5, []
        for k in range(10):
            end = (1.0, 1.5, 2.0, 2.2, 2.35, 2.45, 2.5, 2.5, 2.5, 2.5)[k]
            angle = torch.linspace(0.25, end, 29)
            dx, dy = angle.sin(), -angle.cos()
            b = torch.where(dy > 0, 109 - depth, 98 - 0.7 * depth)
            k0 = ((dx / (144 - depth)) ** 2.15 + (dy.abs() / b) ** 2.15) ** (-1 / 2.15)
            z = -8 + 26 * k - 125 * torch.sin(angle * 0.55) ** 1.2
            r = torch.full_like(z, 4.0)
            paths += [torch.stack([side * dx * k0, dy * k0, z, r], 1) for side in (1, -1)]
        return paths

    # --------------------------------------------------------------------------- organs

    def kidney(self, p: Lattice, right: bool) -> Tensor:
        """Return the distance to a kidney without its sinus."""
        x, z, inwards = (60, -26, -1) if right else (-62, -10, 1)
        d = p.ellipsoid((x, -38, z), (28, 25, 54), 0.16 * inwards)
        sinus = p.ellipsoid((x + 19 * inwards, -31, z), (18, 7, 21), 0.16 * inwards)
        return meet(d + 0.8 * self.wobble(p), -sinus - 0.8 * self.ripple(p), 4)

    def liver(self, p: Lattice) -> Tensor:
        bumps = self.wobble(p)
        left = 12 - 0.65 * p.x - p.y  # the left lobe lies in front of this plane,
        right = 17 - 0.45 * (p.y - 2) - p.x  # the right one beside this
        floor = -62 + 0.5 * (112 - p.x) + 0.1 * p.y - p.z
        d = meet(
            meet(0.8 * join(left, right, 14), 0.85 * floor, 12) + 1.5 * bumps,
            p.ellipsoid((40, 0, 20), (104, math.inf, 150), 0.1),
            12,
        )
        for hole in (
            p.ellipsoid((60, -38, -26), (32, 29, 58), -0.16),  # right kidney
            p.ellipsoid((2, 62, -8), (4, 24, 26)),  # fissure of the round ligament
            p.tubes(spline(GALLBLADDER), reach=15) - 1.5,
            p.ellipsoid((-4, -24, 0), (24, 24, math.inf)),
            p.tubes(spline(CAVA), reach=15) - 0.5,
        ):
            d = meet(d, -hole, 5)
        return meet(d, meet(self.cavity(p) + 1.5, self.below_diaphragm(p), 4), 3)

    def spleen(self, p: Lattice) -> Tensor:
        d = p.ellipsoid((-92, -32, 30), (44, 50, 52), 0.15)
        d = meet(d, meet(self.cavity(p) + 1.5, self.below_diaphragm(p), 4), 3)
        d = meet(d, -p.ellipsoid((-56, -4, 26), (33, 38, 60)), 6)
        return meet(d, -p.ellipsoid((-62, -38, -10), (32, 29, 58), 0.16), 6) + self.wobble(p)

    # ---------------------------------------------------------------------------- spine

    def _vertebral(self, p: Lattice, slope: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return y from the vertebral body's centre, and z from the nearest vertebra's middle."""
        y = p.y + 34 + 0.0006 * (p.z + 30) ** 2
        return y, torch.remainder(p.z + slope * (y + 30) + 16, 33.0) - 16.5

    def disc(self, p: Lattice) -> Tensor:
        y, _ = self._vertebral(p)
        return ((p.x / 1.3) ** 2 + (y + 0.012 * p.x * p.x) ** 2).sqrt() - 16.5

    def canal(self, p: Lattice) -> Tensor:
        y, _ = self._vertebral(p)
        return ((p.x / 1.3) ** 2 + (y + 26) ** 2).sqrt() - 8

    def vertebrae(self, p: Lattice) -> Tensor:
        x, (y, z) = p.x, self._vertebral(p)
        zs = self._vertebral(p, 0.5)[1]  # spinous processes hang
        body = meet(self.disc(p) + 0.5 - 1.6 * (z / 13) ** 2, z.abs() - 13, 3)
        canal = self.canal(p)
        ring = meet(canal - 5.5, (z - 1).abs() - 11, 4)
        across = meet((y + 26 + 0.15 * x.abs()).abs() - 4.5, (z - 4).abs() - 6, 3)
        across = meet(across, x.abs() - 36, 3)
        spinous = x.abs() - 3 - 0.04 * (-30 - y).clamp(min=0)
        spinous = meet(meet(spinous, zs.abs() - 8, 3), (y + 42).abs() - 12, 3)
        arch = join(join(ring, across, 4), spinous, 5)
        return join(body, meet(arch, -canal, 2), 4)
