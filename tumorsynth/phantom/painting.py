"""Paint the phantom's patient: the order of structures, and their HU in the portal-venous phase."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tumorsynth.phantom.anatomy import Patient
from tumorsynth.phantom.landmarks import (
    ADRENALS,
    AORTA,
    CAVA,
    COLON,
    CRURA,
    DUODENUM,
    GALLBLADDER,
    LABELS,
    PANCREAS,
    PORTAL,
    STOMACH,
    VESSELS,
    Path,
)
from tumorsynth.phantom.shapes import Corners, Lattice, meet, spline


def _haustra(points: Path) -> Tensor:
    path = spline(points, 10)
    path[:, 3] *= 1 + 0.13 * torch.sin(0.9 * torch.arange(len(path)))
    return path


def paint_patient(paint: Callable, patient: Patient) -> None:
    """Paint all structures from the outside inwards; later ones cover earlier ones.

    Args:
        paint: called as paint(box, step, distance, (depth, HU, label), ...) for each structure.
        patient: the patient to paint.
    """
    around = patient.around
    trunk: Corners = ((-168, -115, -math.inf), (168, 125, math.inf))

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

    paint(
        ((-190, -130, -math.inf), (190, -90, math.inf)),
        3.0,
        _table,
        (0, -60, None),
        (1.5, -960, None),
    )
    paint(trunk, 5.0, lambda p: patient.outline(p, 0), (0, 15, None), (2, fat, None))
    paint(trunk, 3.5, wall, (0, muscle, None), (3.8, -40, None), (4.5, 58, None))
    chest: Corners = ((-150, -110, -50), (150, 110, math.inf))
    paint(
        ((-100, -30, 40), (60, 105, math.inf)),
        3.0,
        patient.heart,
        (-2, -70, None),
        (2, 110, None),
        (11, 150, None),
    )
    paint(chest, 3.0, patient.lung, (-2.2, 55, None), (0, lung, LABELS["lungs"]))
    paint(
        ((-100, -115, -math.inf), (100, -5, math.inf)),
        2.5,
        patient.muscle,
        (-1.2, -60, None),
        (0, muscle, 0),
    )
    for crus in CRURA:
        paint(around(spline(crus)), 2.0, tubes(spline(crus)), (0, 60, 0))
    back: Corners = ((-48, -110, -math.inf), (48, 0, math.inf))
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
    colon, gut = _haustra(COLON), LABELS["colon"]
    box = around(colon)
    paint(box, 2.0, tubes(colon, rough=0.8), (0, 75, gut), (2.5, stool, gut))
    paint(box, 3.0, tubes(colon, inset=3, level=64), (0, -960, None))
    duodenum, gut = spline(DUODENUM), LABELS["duodenum"]
    paint(around(duodenum), 2.0, tubes(duodenum, rough=0.7), (0, 90, gut), (3, fluid, gut))
    for vessel in VESSELS:
        paint(around(spline(vessel)), 1.5, tubes(spline(vessel)), (0, 160, 0))
    pancreas = spline(PANCREAS)
    paint(around(pancreas), 2.0, tubes(pancreas, rough=1.7), (0, lobules, LABELS["pancreas"]))
    for gland in ADRENALS:
        paint(around(spline(gland)), 1.5, tubes(spline(gland)), (0, 75, 0))
    paint(((-140, -90, -40), (-40, 50, 90)), 2.5, patient.spleen, (0, 118, LABELS["spleen"]))
    paint(around(spline(AORTA)), 2.0, tubes(spline(AORTA)), (0, 165, LABELS["aorta"]))
    paint(around(spline(CAVA)), 2.0, tubes(spline(CAVA)), (0, 150, LABELS["vena_cava"]))
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
    stomach, gut = spline(STOMACH), LABELS["stomach"]
    box = around(stomach)
    paint(box, 2.0, tubes(stomach, rough=1.0), (0, 90, gut), (4.5, fluid, gut))
    paint(box, 3.0, tubes(stomach, inset=5.5, level=44), (0, -970, None))
    box = ((-95, -95, -90), (135, 105, 95))
    paint(box, 3.0, patient.liver, (0, parenchyma, LABELS["liver"]))
    paint(box, 1.5, tubes(*patient.liver_trees, reach=2.5), (0, 160, None), only=LABELS["liver"])
    paint(around(spline(PORTAL)), 1.5, tubes(spline(PORTAL)), (0, 165, LABELS["portal_vein"]))
    gut = LABELS["gallbladder"]
    paint(around(spline(GALLBLADDER)), 2.0, tubes(spline(GALLBLADDER)), (0, 50, gut), (1.6, 8, gut))


def _table(p: Lattice) -> Tensor:
    x, y = p.axes[0][:, None, None], p.axes[1][:, None]
    return ((y + 112 - 0.0011 * x * x).abs() - 5).maximum(x.abs() - 185).expand(p.shape)
