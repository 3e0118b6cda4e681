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

TRUNK: Corners = ((-168, -115, -math.inf), (168, 125, math.inf))


def _haustra(points: Path) -> Tensor:
    """Return the path of a colon with haustra."""
    path = spline(points, 10)
    path[:, 3] *= 1 + 0.13 * torch.sin(0.9 * torch.arange(len(path)))
    return path


def paint_patient(paint: Callable, patient: Patient) -> None:
    """Paint all structures from the outside inwards; later ones cover earlier ones.

    Args:
        paint: called as paint(box, step, distance, (depth, HU, label), ...) for each structure.
        patient: the patient to paint.
    """
    painter = _PatientPainter(paint, patient)
    painter.body_wall()
    painter.chest_and_muscles()
    painter.bones()
    painter.bowel()
    painter.upper_organs()
    painter.stomach_and_liver()


class _PatientPainter:
    """Structures of a patient in groups, to be painted in the order of `paint_patient`."""

    def __init__(self, paint: Callable, patient: Patient) -> None:
        self.paint, self.patient = paint, patient

    def body_wall(self) -> None:
        """Paint the table, fat and the muscle wall."""
        self.paint(
            ((-190, -130, -math.inf), (190, -90, math.inf)),
            3.0,
            _table,
            (0, -60, None),
            (1.5, -960, None),
        )
        self.paint(
            TRUNK, 5.0, lambda p: self.patient.outline(p, 0), (0, 15, None), (2, self._fat, None)
        )
        self.paint(
            TRUNK, 3.5, self._wall, (0, self._muscle, None), (3.8, -40, None), (4.5, 58, None)
        )

    def chest_and_muscles(self) -> None:
        """Paint heart, lungs and the muscles of the back."""
        chest: Corners = ((-150, -110, -50), (150, 110, math.inf))
        self.paint(
            ((-100, -30, 40), (60, 105, math.inf)),
            3.0,
            self.patient.heart,
            (-2, -70, None),
            (2, 110, None),
            (11, 150, None),
        )
        self.paint(
            chest, 3.0, self.patient.lung, (-2.2, 55, None), (0, self._lung, LABELS["lungs"])
        )
        self.paint(
            ((-100, -115, -math.inf), (100, -5, math.inf)),
            2.5,
            self.patient.muscle,
            (-1.2, -60, None),
            (0, self._muscle, 0),
        )

    def bones(self) -> None:
        """Paint crura, spine and ribs."""
        for crus in CRURA:
            self.paint(
                self.patient.around(spline(crus)), 2.0, self._tubes(spline(crus)), (0, 60, 0)
            )
        back: Corners = ((-48, -110, -math.inf), (48, 0, math.inf))
        bone = LABELS["spine"]
        self.paint(back, 2.0, self.patient.disc, (0, 85, None))
        self.paint(back, 1.5, self.patient.vertebrae, (0, 520, bone), (1.8, self._spongy, bone))
        self.paint(back, 2.0, self.patient.canal, (0, 0, 0), (2.5, 40, 0))
        bone = LABELS["ribs"]
        up = torch.tensor([0.0, 0.0, 1.8, 0.0])  # ribs are higher than thick
        for rib in self.patient.ribs():
            for i in range(0, len(rib) - 1, 7):
                part = rib[i : i + 8]
                self.paint(
                    self.patient.around(part),
                    2.0,
                    self._tubes(part + up, part - up),
                    (0, 620, bone),
                    (1.7, 190, bone),
                )

    def bowel(self) -> None:
        """Paint mesentery, small bowel, colon and duodenum."""
        self.paint(
            self.patient.around(torch.cat(self.patient.mesentery)),
            1.5,
            self._tubes(*self.patient.mesentery, reach=2.5),
            (0, 140, None),
        )
        gut = LABELS["small_bowel"]
        for i in range(0, len(self.patient.bowel) - 1, 8):  # one by one: each loop keeps its wall
            loop = self.patient.bowel[i : i + 9]
            self.paint(
                self.patient.around(loop),
                2.0,
                self._tubes(loop, rough=0.8),
                (0, 100, gut),
                (2.4, self._chyme, gut),
            )
        colon, gut = _haustra(COLON), LABELS["colon"]
        box = self.patient.around(colon)
        self.paint(box, 2.0, self._tubes(colon, rough=0.8), (0, 75, gut), (2.5, self._stool, gut))
        self.paint(box, 3.0, self._tubes(colon, inset=3, level=64), (0, -960, None))
        duodenum, gut = spline(DUODENUM), LABELS["duodenum"]
        self.paint(
            self.patient.around(duodenum),
            2.0,
            self._tubes(duodenum, rough=0.7),
            (0, 90, gut),
            (3, self._fluid, gut),
        )

    def upper_organs(self) -> None:
        """Paint vessels, pancreas, adrenals, spleen, aorta, vena cava and kidneys."""
        for vessel in VESSELS:
            self.paint(
                self.patient.around(spline(vessel)), 1.5, self._tubes(spline(vessel)), (0, 160, 0)
            )
        pancreas = spline(PANCREAS)
        self.paint(
            self.patient.around(pancreas),
            2.0,
            self._tubes(pancreas, rough=1.7),
            (0, self._lobules, LABELS["pancreas"]),
        )
        for gland in ADRENALS:
            self.paint(
                self.patient.around(spline(gland)), 1.5, self._tubes(spline(gland)), (0, 75, 0)
            )
        self.paint(
            ((-140, -90, -40), (-40, 50, 90)), 2.5, self.patient.spleen, (0, 118, LABELS["spleen"])
        )
        self.paint(
            self.patient.around(spline(AORTA)),
            2.0,
            self._tubes(spline(AORTA)),
            (0, 165, LABELS["aorta"]),
        )
        self.paint(
            self.patient.around(spline(CAVA)),
            2.0,
            self._tubes(spline(CAVA)),
            (0, 150, LABELS["vena_cava"]),
        )
        for name, low, high in (
            ("left_kidney", (-104, -78, -76), (-16, 2, 56)),
            ("right_kidney", (14, -78, -92), (102, 2, 40)),
        ):
            right, value = name == "right_kidney", LABELS[name]
            self.paint(
                (low, high),
                2.0,
                lambda p, right=right: self.patient.kidney(p, right),
                (0, 180, value),
                (5, self._pyramids, value),
            )

    def stomach_and_liver(self) -> None:
        """Paint stomach, liver with its vessels, portal vein and gallbladder."""
        stomach, gut = spline(STOMACH), LABELS["stomach"]
        box = self.patient.around(stomach)
        self.paint(box, 2.0, self._tubes(stomach, rough=1.0), (0, 90, gut), (4.5, self._fluid, gut))
        self.paint(box, 3.0, self._tubes(stomach, inset=5.5, level=44), (0, -970, None))
        box = ((-95, -95, -90), (135, 105, 95))
        self.paint(box, 3.0, self.patient.liver, (0, self._parenchyma, LABELS["liver"]))
        self.paint(
            box,
            1.5,
            self._tubes(*self.patient.liver_trees, reach=2.5),
            (0, 160, None),
            only=LABELS["liver"],
        )
        self.paint(
            self.patient.around(spline(PORTAL)),
            1.5,
            self._tubes(spline(PORTAL)),
            (0, 165, LABELS["portal_vein"]),
        )
        gut = LABELS["gallbladder"]
        self.paint(
            self.patient.around(spline(GALLBLADDER)),
            2.0,
            self._tubes(spline(GALLBLADDER)),
            (0, 50, gut),
            (1.6, 8, gut),
        )

    def _tubes(
        self,
        *paths: Tensor,
        rough: float = 0.0,
        inset: float = 0.0,
        level: float | None = None,
        reach: float = 5.0,
    ) -> Callable[[Lattice], Tensor]:
        """Return the distance to tubes as a function of a lattice.

        Args:
            paths: points (N, 4) each: x, y, z, radius.
            rough: height of the surface's ripples, mm.
            inset: mm by which the tubes are thinner.
            level: y above which the tubes count, as air rises; None counts all.
            reach: largest distance to compute, mm.
        """

        def distance(p: Lattice) -> Tensor:
            d = p.tubes(*paths, reach=reach) + inset
            d = d + rough * self.patient.ripple(p) if rough else d
            return d if level is None else meet(d, level - p.y, 1)

        return distance

    def _fat(self, p: Lattice) -> Tensor:  # with strands
        return -104 + 7 * p.grain(4) + 25 * (p.grain(11) - 1.3).clamp(min=0)

    def _muscle(self, p: Lattice) -> Tensor:  # marbled
        return 62 - 70 * (self.patient.ripple(p) - 1.1).clamp(min=0)

    def _fluid(self, p: Lattice) -> Tensor:
        return 30 + 12 * p.grain(1)

    def _stool(self, p: Lattice) -> Tensor:
        return 40 - 260 * (p.grain(7) - 0.2).clamp(min=0) * (
            0.4 + 0.4 * self.patient.wobble(p)
        ).clamp(0.02)

    def _lung(self, p: Lattice) -> Tensor:
        return -860 + 45 * p.grain(2)

    def _spongy(self, p: Lattice) -> Tensor:
        return 200 + 45 * p.grain(3)

    def _lobules(self, p: Lattice) -> Tensor:  # of the pancreas, in fat
        return 98 - 40 * (p.grain(5) - 0.8).clamp(min=0)

    def _pyramids(self, p: Lattice) -> Tensor:
        return 160 - 25 * torch.tanh(2 * self.patient.ripple(p))

    def _parenchyma(self, p: Lattice) -> Tensor:
        return 108 + 3 * self.patient.wobble(p)

    def _chyme(self, p: Lattice) -> Tensor:
        state = self.patient.wobble(p)
        return torch.where(state > 1.6, -850.0, 32 + 15 * state + 12 * p.grain(1))

    def _wall(self, p: Lattice) -> Tensor:
        return meet(self.patient.outline(p, self.patient.fat), -self.patient.cavity(p), 2)


def _table(p: Lattice) -> Tensor:
    x, y = p.axes[0][:, None, None], p.axes[1][:, None]
    return ((y + 112 - 0.0011 * x * x).abs() - 5).maximum(x.abs() - 185).expand(p.shape)
