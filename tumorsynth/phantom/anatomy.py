"""The patient of the phantom: where its organs lie (upright mm, RAS) and how they are painted.

Sizes, positions and HU are those of textbook anatomy in the portal-venous phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tumorsynth.phantom.shapes import Box, Lattice, Warp, Waves, join, meet, spline

_INF = math.inf
Path = Sequence[Sequence[float]]  # points x, y, z, radius
# fmt: off
LABELS = {
    "liver": 1, "pancreas": 2, "left_kidney": 3, "right_kidney": 4, "spleen": 5, "stomach": 6,
    "gallbladder": 7, "aorta": 8, "vena_cava": 9, "colon": 10, "duodenum": 11, "small_bowel": 12,
    "portal_vein": 13, "spine": 14, "ribs": 15, "lungs": 16,
}
_STOMACH = [(-50, -34, 50, 18), (-58, -12, 42, 27), (-60, 20, 22, 25), (-44, 48, 0, 21),
            (-14, 58, -14, 16), (12, 48, -14, 12), (29, 36, -12, 8)]
_DUODENUM = [(29, 36, -12, 10), (46, 22, -16, 12), (52, 8, -34, 12), (40, 2, -54, 12),
             (8, 8, -60, 11), (-22, 10, -52, 11)]
_PANCREAS = [(30, 6, -44, 7), (29, 12, -28, 15), (14, 22, -10, 11), (-14, 27, -2, 12),
             (-42, 8, 4, 12), (-68, -16, 16, 9)]
_COLON = [(100, -14, -110, 24), (97, 0, -70, 24), (86, 34, -54, 19), (50, 60, -60, 18),
          (0, 64, -68, 19), (-52, 58, -48, 19), (-88, 36, -14, 18), (-102, 10, 0, 17),
          (-104, -22, -30, 15), (-104, -30, -110, 15)]
_AORTA = [(-8, -8, 120, 11), (-6, -6, 40, 10), (-4, -6, -20, 9), (-4, -10, -120, 8)]
_CAVA = [(20, 2, 90, 12), (20, -2, 62, 13), (20, -8, 30, 12), (18, -8, -10, 11),
         (18, -12, -120, 10)]
_PORTAL = [(36, 14, 14, 6.5), (24, 14, 6, 7), (10, 14, -10, 7)]
_GALLBLADDER = [(40, 30, -12, 4), (47, 42, -24, 13), (51, 50, -40, 15)]
_VESSELS: list[Path] = [
    [(10, 14, -10, 5), (-14, 16, -4, 4.5), (-44, -2, 8, 4), (-72, -24, 22, 4), (-86, -28, 28, 3)],
    [(10, 14, -10, 6), (8, 18, -40, 5), (6, 26, -100, 4)],  # superior mesenteric vein
    [(-5, 2, 4, 4), (-6, 12, -8, 3.5), (-6, 16, -40, 3.5), (-4, 24, -100, 3)],  # and artery
    [(-5, 3, 14, 4), (-4, 16, 16, 3.5), (16, 18, 14, 3), (30, 18, 14, 2.5)],  # to the liver
    [(-4, 16, 16, 3), (-24, 10, 14, 2.5), (-50, -6, 18, 2.5), (-80, -24, 28, 2)],  # to the spleen
    [(-44, -32, -8, 4), (-24, -4, -8, 4.5), (0, 3, -10, 4), (14, -6, -10, 5)],  # renal veins
    [(44, -34, -22, 4), (32, -20, -20, 5), (18, -10, -18, 5)],
]
_CRURA: list[Path] = [[(17, -20, 70, 3), (12, -14, 20, 5), (14, -24, -40, 4)],
          [(-19, -18, 70, 3), (-18, -14, 20, 5), (-15, -24, -40, 4)]]
_ADRENALS: list[Path] = [[(-42, -32, 30, 2), (-36, -20, 34, 3), (-34, -34, 32, 2)],
             [(30, -24, 34, 2.5), (36, -42, 34, 1.8)]]
_LIVER_STEMS = [  # start, a point on the way, radius, first length
    ((36, 14, 14), (70, 22, 14), 5.2, 22),  # portal: right anterior
    ((38, 12, 15), (75, -30, 18), 5.0, 26),  # right posterior
    ((34, 15, 15), (0, 44, 30), 4.6, 30),  # left
    ((26, 0, 58), (95, -12, 30), 4.6, 30),  # hepatic veins: right
    ((22, 4, 58), (55, 60, 30), 4.4, 30),  # middle
    ((18, 4, 58), (-30, 50, 40), 3.8, 28),  # left
]
_MESENTERIC_STEMS = [
    ((8, 20, -40), (50, 30, -60), 2.8, 20), ((7, 24, -64), (50, 40, -80), 2.8, 20),
    ((-5, 18, -30), (-60, 20, -30), 2.8, 22), ((-5, 18, -46), (-60, 30, -60), 2.8, 22),
    ((-4, 20, -70), (-50, 40, -90), 2.8, 22), ((-20, 60, -20), (-30, 74, -44), 2.0, 20),
    ((30, 40, -14), (0, 70, -40), 2.0, 22), ((-66, -10, 30), (-84, 20, 40), 2.0, 18),
]
# fmt: on


class Patient:
    """What the seed decides: the warp, grain, fatness, vessel trees, bowel."""

    def __init__(self, rng: torch.Generator):
        self.rng = rng
        self.warp = Warp(rng, (4.0, 4.0, 1.5))
        self._wobble, self._ripple = Waves(rng, 20.0, 45.0, 16), Waves(rng, 9.0, 16.0, 16)
        self.tile = torch.randn(64, 64, 64, generator=rng)
        self.fat = 12 + 9 * float(torch.rand((), generator=rng))  # under the skin, mm
        upright = Lattice(((-130, -90, -110), (130, 100, 90)), 4.0)
        self.liver_trees = self._trees(_LIVER_STEMS, upright, self.liver(upright) + 3, 1.0)
        self.mesentery = self._trees(_MESENTERIC_STEMS, upright, self.cavity(upright) + 6, 1.2)
        self.bowel = self._bowel()

    def around(self, path: Path | Tensor) -> Box:
        """The world's box around tubes, with room for their rough surface."""
        p = torch.as_tensor(path, dtype=torch.float32)
        at, room = self.warp.to_world(p[:, :3]), p[:, 3:] + 5
        return (at - room).amin(0).tolist(), (at + room).amax(0).tolist()

    def wobble(self, p: Lattice) -> Tensor:
        return p.waves(self._wobble, 6.0)

    def ripple(self, p: Lattice) -> Tensor:
        return p.waves(self._ripple, 3.0)

    def _trees(self, stems: Sequence, p: Lattice, room: Tensor, thinnest: float) -> list[Tensor]:
        """Trees of tubes that fork, r^3 shared between the forks (Murray), down to about thinnest
        mm, where room, on p, is negative."""
        paths: list[Tensor] = []
        low, high = torch.tensor(p.first), torch.tensor(p.last)

        def normal() -> Tensor:
            return torch.randn(3, generator=self.rng)

        def blocked(at: Tensor) -> bool:
            i, j, k = ((at / p.step).round().long().clamp(low, high) - low).tolist()
            return bool(room[i, j, k] > 0)

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
        """Small bowel: rows of upright coils."""
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
        """Distance to the skin moved in by inset mm: a superellipse, flatter behind."""
        a, front, back = 144 - inset, 109 - inset, 98 - 0.7 * inset
        v = torch.where(p.y > 0, p.y / front, p.y / back).abs()
        k = ((p.x.abs() / a) ** 2.15 + v**2.15) ** (1 / 2.15)
        groove = torch.exp(-((p.x / 10) ** 2)) * torch.sigmoid(-p.y / 6)
        return (p.x**2 + p.y**2).sqrt() * (1 - 1 / (k + 1e-3)) + 4 * groove

    def cavity(self, p: Lattice) -> Tensor:
        """Inside of the muscle wall: thick at the recti and at the back, thin between the recti."""
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
        return meet(d, -p.ellipsoid((-3, -22, 0), (27, 46, _INF)), 6)

    def muscle(self, p: Lattice) -> Tensor:
        def mass(cx: float, cy: float, rx: float, ry: float) -> Tensor:
            u, v = (p.x.abs() - cx) / rx, (p.y - cy) / ry
            return ((u * u + v * v).sqrt() - 1) * min(rx, ry)

        psoas = mass(35, -38, 12, 13) + 0.09 * (p.z + 20).clamp(-60, 90)
        back = torch.minimum(mass(27, -70, 26, 16), mass(62, -62, 19, 8))
        back = meet(back, self.outline(p, self.fat) + 1.5, 4)
        return torch.minimum(psoas, back) + 0.8 * self.wobble(p)

    def ribs(self) -> list[Tensor]:
        """Ribs from the 12th up, right and left: round the wall from the spine, sinking."""
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
        """Without the sinus."""
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
            p.ellipsoid((40, 0, 20), (104, _INF, 150), 0.1),
            12,
        )
        for hole in (
            p.ellipsoid((60, -38, -26), (32, 29, 58), -0.16),  # right kidney
            p.ellipsoid((2, 62, -8), (4, 24, 26)),  # fissure of the round ligament
            p.tubes(spline(_GALLBLADDER), reach=15) - 1.5,
            p.ellipsoid((-4, -24, 0), (24, 24, _INF)),
            p.tubes(spline(_CAVA), reach=15) - 0.5,
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
        """y from the vertebral body's centre, z from the middle of the nearest vertebra."""
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


def _haustra(points: Path) -> Tensor:
    path = spline(points, 10)
    path[:, 3] *= 1 + 0.13 * torch.sin(0.9 * torch.arange(len(path)))
    return path


def paint_patient(paint: Callable, patient: Patient) -> None:
    """Call paint(box, step, distance, (depth, HU, label), ...) from the outside inwards: what is
    painted later covers what lies below."""
    around = patient.around
    trunk: Box = ((-168, -115, -_INF), (168, 125, _INF))

    def tubes(
        *paths: Tensor,
        rough: float = 0.0,
        inset: float = 0.0,
        level: float | None = None,
        reach: float = 5.0,
    ) -> Callable[[Lattice], Tensor]:
        def distance(p: Lattice) -> Tensor:
            d = p.tubes(*paths, reach=reach) + inset
            d = d + rough * patient.ripple(p) if rough else d
            return d if level is None else meet(d, level - p.y, 1)  # air rises

        return distance

    def fat(p: Lattice) -> Tensor:  # with strands
        return -104 + 7 * p.grain(4) + 25 * (p.grain(11) - 1.3).clamp(min=0)

    def muscle(p: Lattice) -> Tensor:  # marbled
        return 62 - 70 * (patient.ripple(p) - 1.1).clamp(min=0)

    def fluid(p: Lattice) -> Tensor:
        return 30 + 12 * p.grain(1)

    def stool(p: Lattice) -> Tensor:
        return 40 - 260 * (p.grain(7) - 0.2).clamp(min=0) * (0.4 + 0.4 * patient.wobble(p)).clamp(
            0.02
        )

    def lung(p: Lattice) -> Tensor:
        return -860 + 45 * p.grain(2)

    def spongy(p: Lattice) -> Tensor:
        return 200 + 45 * p.grain(3)

    def lobules(p: Lattice) -> Tensor:  # of the pancreas, in fat
        return 98 - 40 * (p.grain(5) - 0.8).clamp(min=0)

    def pyramids(p: Lattice) -> Tensor:
        return 160 - 25 * torch.tanh(2 * patient.ripple(p))

    def parenchyma(p: Lattice) -> Tensor:
        return 108 + 3 * patient.wobble(p)

    def chyme(p: Lattice) -> Tensor:
        state = patient.wobble(p)
        return torch.where(state > 1.6, -850.0, 32 + 15 * state + 12 * p.grain(1))

    def wall(p: Lattice) -> Tensor:
        return meet(patient.outline(p, patient.fat), -patient.cavity(p), 2)

    paint(((-190, -130, -_INF), (190, -90, _INF)), 3.0, _table, (0, -60, None), (1.5, -960, None))
    paint(trunk, 5.0, lambda p: patient.outline(p, 0), (0, 15, None), (2, fat, None))
    paint(trunk, 3.5, wall, (0, muscle, None), (3.8, -40, None), (4.5, 58, None))
    chest: Box = ((-150, -110, -50), (150, 110, _INF))
    paint(
        ((-100, -30, 40), (60, 105, _INF)),
        3.0,
        patient.heart,
        (-2, -70, None),
        (2, 110, None),
        (11, 150, None),
    )
    paint(chest, 3.0, patient.lung, (-2.2, 55, None), (0, lung, LABELS["lungs"]))
    paint(
        ((-100, -115, -_INF), (100, -5, _INF)),
        2.5,
        patient.muscle,
        (-1.2, -60, None),
        (0, muscle, 0),
    )
    for crus in _CRURA:
        paint(around(spline(crus)), 2.0, tubes(spline(crus)), (0, 60, 0))
    back: Box = ((-48, -110, -_INF), (48, 0, _INF))
    bone = LABELS["spine"]
    paint(back, 2.0, patient.disc, (0, 85, None))
    paint(back, 1.5, patient.vertebrae, (0, 520, bone), (1.8, spongy, bone))
    paint(back, 2.0, patient.canal, (0, 0, 0), (2.5, 40, 0))
    bone = LABELS["ribs"]
    up = torch.tensor([0.0, 0.0, 1.8, 0.0])  # ribs are higher than thick
    for rib in patient.ribs():
        for i in range(0, len(rib) - 1, 7):
            part = rib[i : i + 8]
            paint(around(part), 2.0, tubes(part + up, part - up), (0, 620, bone), (1.7, 190, bone))

    paint(
        around(torch.cat(patient.mesentery)),
        1.5,
        tubes(*patient.mesentery, reach=2.5),
        (0, 140, None),
    )
    gut = LABELS["small_bowel"]
    for i in range(0, len(patient.bowel) - 1, 8):  # one by one: each loop keeps its wall
        loop = patient.bowel[i : i + 9]
        paint(around(loop), 2.0, tubes(loop, rough=0.8), (0, 100, gut), (2.4, chyme, gut))
    colon, gut = _haustra(_COLON), LABELS["colon"]
    box = around(colon)
    paint(box, 2.0, tubes(colon, rough=0.8), (0, 75, gut), (2.5, stool, gut))
    paint(box, 3.0, tubes(colon, inset=3, level=64), (0, -960, None))
    duodenum, gut = spline(_DUODENUM), LABELS["duodenum"]
    paint(around(duodenum), 2.0, tubes(duodenum, rough=0.7), (0, 90, gut), (3, fluid, gut))
    for vessel in _VESSELS:
        paint(around(spline(vessel)), 1.5, tubes(spline(vessel)), (0, 160, 0))
    pancreas = spline(_PANCREAS)
    paint(around(pancreas), 2.0, tubes(pancreas, rough=1.7), (0, lobules, LABELS["pancreas"]))
    for gland in _ADRENALS:
        paint(around(spline(gland)), 1.5, tubes(spline(gland)), (0, 75, 0))
    paint(((-140, -90, -40), (-40, 50, 90)), 2.5, patient.spleen, (0, 118, LABELS["spleen"]))
    paint(around(spline(_AORTA)), 2.0, tubes(spline(_AORTA)), (0, 165, LABELS["aorta"]))
    paint(around(spline(_CAVA)), 2.0, tubes(spline(_CAVA)), (0, 150, LABELS["vena_cava"]))
    for name, low, high in (
        ("left_kidney", (-104, -78, -76), (-16, 2, 56)),
        ("right_kidney", (14, -78, -92), (102, 2, 40)),
    ):
        right, value = name == "right_kidney", LABELS[name]
        paint(
            (low, high),
            2.0,
            lambda p, right=right: patient.kidney(p, right),
            (0, 180, value),
            (5, pyramids, value),
        )
    stomach, gut = spline(_STOMACH), LABELS["stomach"]
    box = around(stomach)
    paint(box, 2.0, tubes(stomach, rough=1.0), (0, 90, gut), (4.5, fluid, gut))
    paint(box, 3.0, tubes(stomach, inset=5.5, level=44), (0, -970, None))
    box = ((-95, -95, -90), (135, 105, 95))
    paint(box, 3.0, patient.liver, (0, parenchyma, LABELS["liver"]))
    paint(box, 1.5, tubes(*patient.liver_trees, reach=2.5), (0, 160, None), only=LABELS["liver"])
    paint(around(spline(_PORTAL)), 1.5, tubes(spline(_PORTAL)), (0, 165, LABELS["portal_vein"]))
    gut = LABELS["gallbladder"]
    paint(
        around(spline(_GALLBLADDER)), 2.0, tubes(spline(_GALLBLADDER)), (0, 50, gut), (1.6, 8, gut)
    )


def _table(p: Lattice) -> Tensor:
    x, y = p.axes[0][:, None, None], p.axes[1][:, None]
    return ((y + 112 - 0.0011 * x * x).abs() - 5).maximum(x.abs() - 185).expand(p.shape)
