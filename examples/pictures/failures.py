"""The six failures that the paper lists (appendix F.2), as published and as mended, side by side.

    python examples/pictures/failures.py [-o docs/pictures/failures.png]

On the made-up phantom. "As published" is what the paper does, with this project's generator: an
ellipsoid cut by the organ, decoded voxels pasted with a blurred mask (blend="difftumor"). "Now" is
SynthesizeTumor with blend="change". Both are shown beside the untouched slice.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

import tumorsynth as ts
from tumorsynth.appearance.blend import gaussian_filter
from tumorsynth.fetching import run_alone
from tumorsynth.phantom import LABELS
from tumorsynth.pipeline.call import Call
from tumorsynth.pipeline.finish import paint_and_finish
from tumorsynth.pipeline.place_batch import PlacedSample
from tumorsynth.pipeline.records import Sample, SampleParams, TumorId
from tumorsynth.pipeline.requests import request_painting
from tumorsynth.placement.types import LocalMask, TumorParams

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the backend)

SPACING = (1.0, 1.0, 2.0)
PAPER, INK, OUTLINE = "#101010", "#d8d8d8", "#ffd23f"
WINDOW, ZOOM_MM = (-60.0, 200.0), 80.0
ROUND = (1.0, 0.0, 0.0, 0.0)


class Case:
    """A scan, and how one failure looks in it."""

    def __init__(self, image: Tensor, label: Tensor, organ: str, generator: str):
        self.image, self.label, self.organ = image, label, LABELS[organ]
        self.generator = generator

    def near(self, depth_mm: float) -> tuple[int, int, int]:
        """A voxel of the organ about this deep (None: the deepest), in its middle slices."""
        from scipy import ndimage

        organ = (self.label[0] == self.organ).numpy()
        depth = ndimage.distance_transform_edt(organ, sampling=SPACING)
        x, y, z = np.nonzero(organ)
        middle = np.abs(z - np.median(z)) < 8
        wanted = min(depth_mm, 0.9 * float(depth[:, :, np.unique(z[middle])].max()))
        order = np.argsort(np.abs(depth[x, y, z] - wanted) + 100 * ~middle, kind="stable")
        pick = order[len(order) // 2000]
        return int(x[pick]), int(y[pick]), int(z[pick])

    def published(self, centre: tuple[int, int, int], size_mm: float, **more: Any) -> Any:
        """An ellipsoid cut by the organ, pasted: the paper's sampler and blending."""
        sigma_mm = more.pop("sigma_mm", 1.0)
        synth = ts.SynthesizeTumor(
            self.generator, self.organ, 20, blend="difftumor", sigma_mm=sigma_mm
        )
        axes = more.pop("axes", (1.1, 1.0, 1 / 1.1))
        grids = torch.meshgrid(*[torch.arange(n) for n in self.label.shape[1:]], indexing="ij")
        far = sum(
            ((g - c) * s / (a * size_mm / 2)) ** 2
            for g, c, s, a in zip(grids, centre, SPACING, axes, strict=True)
        )
        mask = (far <= 1) & (self.label[0] == self.organ)
        where = mask.nonzero()
        low, high = where.amin(0).tolist(), (where.amax(0) + 1).tolist()
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        params = TumorParams(
            centre, size_mm, axes, ROUND, 0.0, 0, 3, sigma_mm, size_mm, more.get("contrast_hu")
        )
        tumor = LocalMask(params, tuple(low), mask[box], int(mask.sum()), size_mm)
        frame = ts.geometry.frame_from_spacing(SPACING)
        image, label = self.image[0].clone(), self.label[0].clone()
        sample = Sample(0, image, label, frame)
        call = Call(synth.settings, synth.handle.get(image.device), synth.painter)
        request = run_alone(
            request_painting(call.settings, call.generator, TumorId(0, 0, 0), sample, tumor)
        )
        placed = PlacedSample(SampleParams(None), [], replayed={})
        paint_and_finish(call, [request], [sample], [placed])
        return image, label == 20

    def now(self, centre: tuple[int, int, int], size_mm: float, **more: Any) -> Any:
        """The same place and size by the one line."""
        replayed = {"axes": more.pop("axes", (1.1, 1.0, 1 / 1.1))}
        options = {k: v for k, v in more.items() if k in SETTINGS}
        synth = ts.SynthesizeTumor(
            self.generator, self.organ, 20, count=1, size_mm=(size_mm / 2, size_mm), **options
        )
        synth(self.image, self.label, spacing=SPACING, seed=5)
        drawn = next(iter(synth.params[0]["tumors"]), None)
        if drawn is None:
            raise SystemExit(f"no tumour: {synth.report}")
        tumor = {**drawn, **replayed, "centre": centre, "diameter_mm": size_mm, "seed": 3}
        params = [{"seed": 5, "applied": True, "tumors": [tumor]}]
        image, label = synth(self.image, self.label, spacing=SPACING, params=params)
        if not synth.report[0]["applied"]:  # where that place will not do: the one it chose
            image, label = synth(self.image, self.label, spacing=SPACING, seed=5)
        return image[0], label[0] == 20


SETTINGS = inspect.signature(ts.SynthesizeTumor).parameters


def rows(generator: str) -> list[tuple[str, str, Case, Any, Any]]:
    """Title, what was done, case, published and now, one for each failure."""
    ct = ts.make_phantom(spacing=SPACING, shape=(240, 220, 70), seed=0)
    image, label = ct.image, ct.label
    soft = gaussian_filter(image[0], [1.5, 1.5, 1.0])[None]
    rng = torch.Generator().manual_seed(1)
    noisy = image + 25 * torch.randn(image.shape, generator=rng)
    liver = label == LABELS["liver"]
    plain = image - 55.0 * liver  # an unenhanced liver, of 55 HU
    made = []

    def add(title: str, what: str, case: Case, centre: Any, size: float, **more: Any) -> None:
        old = {k: v for k, v in more.items() if k in ("axes", "sigma_mm")}
        old |= {"contrast_hu": more["published_hu"]} if "published_hu" in more else {}
        new = {k: v for k, v in more.items() if k not in ("sigma_mm", "published_hu", "inside")}
        made.append(
            (
                title,
                what,
                case,
                case.published(centre, size, **old),
                case.now(more.get("inside", centre), size, **new),
                centre,
            )
        )

    case = Case(image, label, "liver", generator)
    add(
        "sickle and strip shapes",
        "at the capsule",
        case,
        case.near(1.0),
        26.0,
        inside=case.near(12.0),
    )
    case = Case(soft, label, "liver", generator)
    add("edges too sharp", "a soft kernel", case, case.near(22.0), 20.0, sigma_mm=0.0)
    case = Case(plain, label, "liver", generator)
    add("density like fluid", "unenhanced liver", case, case.near(22.0), 20.0,
        published_hu=-55.0)  # fmt: skip
    case = Case(noisy, label, "liver", generator)
    add("noise that does not match", "a noisy scan", case, case.near(22.0), 20.0)
    effect = {"mass_effect": 0.6} if "mass_effect" in SETTINGS else {}
    case = Case(image, label, "liver", generator)
    add("no mass effect", "a large tumour", case, case.near(30.0), 44.0, **effect)
    case = Case(image, label, "pancreas", generator)
    add("follows the organ exactly", "a thin organ", case, case.near(8.0), 30.0)
    return made


def draw(path: Path, found: list[Any]) -> None:
    figure, axes = plt.subplots(3, len(found), figsize=(2.2 * len(found), 6.9), facecolor=PAPER)
    for column, (title, what, case, published, now, centre) in enumerate(found):
        panels = (("untouched", (case.image[0], None)), ("as published", published), ("now", now))
        for row, (name, (image, mask)) in enumerate(panels):
            axis, (x, y, z) = axes[row][column], centre
            if row == 2:  # it may have had to go elsewhere
                x, y, z = mask.nonzero().float().mean(0).round().long().tolist()
            half = [round(ZOOM_MM / 2 / s) for s in SPACING[:2]]
            across, along = (slice(max(0, c - h), c + h) for c, h in zip((x, y), half, strict=True))
            picture = image[across, along, z].flip((0, 1)).T
            axis.imshow(picture, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1])
            if mask is not None:
                outline = mask[across, along, z].flip((0, 1)).T.float()
                axis.contour(outline, [0.5], colors=OUTLINE, linewidths=0.6, linestyles="dotted")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(f"{title}\n{what}", color=INK, fontsize=8)
            if column == 0:
                axis.text(-0.06, 0.5, name, color=INK, fontsize=8, rotation=90, va="center",
                          ha="right", transform=axis.transAxes)  # fmt: skip
    figure.subplots_adjust(0.03, 0.01, 0.995, 0.93, 0.03, 0.03)
    figure.savefig(path, dpi=110, facecolor=PAPER)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/pictures/failures.png"))
    parser.add_argument("--generator", default="liver-early")
    args = parser.parse_args()
    torch.manual_seed(0)
    draw(args.out, rows(args.generator))


if __name__ == "__main__":
    main()
