"""How well an autoencoder gives scans back, by kind of tissue, and how it uses its codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tumorsynth.models.autoencoder import Autoencoder
from tumorsynth.training.data import Case, components, to_unit
from tumorsynth.training.measures import Difference, Errors
from tumorsynth.training.pictures import grid, sections, shown

SIDE = 64  # of the crops measured at the end of a training, in mm
WHOLE_SIDE = 96  # of those that `reconstruction` cuts a whole scan into
ENOUGH = 500  # voxels of a region to say anything about it
T = TypeVar("T")
Place = tuple[slice, slice, slice]


@torch.no_grad()
def measure_autoencoder(
    autoencoder: Autoencoder,
    cases: Sequence[Case],
    tumor_label: int | None = None,
    *,
    crops: int = 64,
    side: int = SIDE,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """How well an autoencoder gives scans back, by kind of tissue; JSON-able.

    ``reconstruction`` has an entry for "tissue", all voxels inside the autoencoder's window, and
    one for every label value of which 500 such voxels were met, "tumour" for tumor_label: RMSE,
    bias and noise in HU, PSNR in dB, SSIM, see `Errors`. ``without_detail`` has the same of the
    decoded latent alone, which is what a denoiser works in, where the autoencoder has detail.
    ``codes`` has the use of a codebook: share of codes used, perplexity.

    crops: at most so many, of ``side`` mm, spread over the scans, up to 8 in each; half of them
    where the tumours (or the rarest labels) are. Nothing is random. pictures: a PNG to write.
    """
    window = autoencoder.config.window
    regions: dict[tuple[str, str], Errors] = {}
    codes: list[Tensor] = []
    drawn: list[list[list[Tensor]]] = []
    chosen = spread(list(cases), max(1, crops // 4))
    each = max(1, min(8, crops // len(chosen)))
    for case in chosen:
        for index, where in enumerate(crop_places(case, side, each, tumor_label, window)):
            scan, out, plain = reconstructed(autoencoder, case.hu[where], codes)
            differences = {"reconstruction": Difference(scan, out, window)}
            if autoencoder.config.detail_channels:
                differences["without_detail"] = Difference(scan, plain, window)
            raw, label = _trimmed(case.hu[where], scan), None
            inside = (raw > window[0]) & (raw < window[1])
            masks = {"tissue": inside}
            if case.label is not None:
                label = _trimmed(case.label[where], scan)
                for value in label.unique().tolist():
                    if value:
                        name = "tumour" if value == tumor_label else f"label {value}"
                        masks[name] = inside & (label == value)
            for name, mask in masks.items():
                for kind, difference in differences.items() if bool(mask.any()) else ():
                    regions.setdefault((kind, name), Errors(window)).add(difference, mask)
            if len(drawn) < 8 and index < max(1, 8 // len(chosen)):
                drawn.append(_compared(scan, out, window))
    names = {name for _, name in regions}
    ordered = sorted(names, key=lambda name: (name != "tumour", name != "tissue", len(name), name))
    result: dict[str, Any] = {
        kind: {
            name: regions[kind, name].figures()
            for name in ordered
            if regions[kind, name].voxels >= ENOUGH
        }
        for kind in dict.fromkeys(("reconstruction", *(kind for kind, _ in regions)))
    }
    if autoencoder.codebook is not None:
        used = torch.cat(codes)
        usage = autoencoder.codebook.usage(used.to(autoencoder.codebook.counts.device))
        result["codes"] = {
            "codes": autoencoder.config.codes,
            "used_share": round(len(used.unique()) / autoencoder.config.codes, 4),
            "perplexity": round(usage.perplexity, 1),
            "latent_voxels": used.numel(),
        }
    if pictures is not None and drawn:
        grid(pictures, drawn)
    return result


@torch.no_grad()
def reconstructed(
    autoencoder: Autoencoder, hu: Tensor, codes: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A crop (X, Y, Z), its reconstruction and that without `Autoencoder.detail`, in HU, clipped
    to the window, on the CPU.

    Sides are cut to multiples of the autoencoder's factor. codes: gets the codes that were used.
    """
    low, high = autoencoder.config.window
    scan = hu.float().clamp(low, high)
    for axis, n in enumerate(scan.shape):
        scan = scan.narrow(axis, 0, n - n % autoencoder.config.factor)
    x = (to_unit(scan, (low, high)) * 2 - 1)[None, None].permute(0, 1, 4, 2, 3).contiguous()
    x = x.to(next(autoencoder.parameters()).device)
    latent = autoencoder.encode(x)
    if codes is not None and autoencoder.codebook is not None:
        codes.append(autoencoder.codes(latent).flatten().cpu())
    decoded = autoencoder.decode(latent)

    def hu_of(volume: Tensor) -> Tensor:
        back = volume.permute(0, 1, 3, 4, 2)[0, 0].clamp(-1, 1).cpu()
        return (back + 1) / 2 * (high - low) + low

    return scan, hu_of(decoded + autoencoder.detail(x - decoded)), hu_of(decoded)


def crop_places(
    case: Case, side: int, count: int, tumor_label: int | None, window: tuple[float, float]
) -> list[Place]:
    """Up to ``count`` cubes of a scan: half around its tumours, or else its rarest labels, the
    others spread over what is tissue."""
    centres: list[list[int]] = []
    if case.label is not None:
        tumor = case.label == (-1 if tumor_label is None else tumor_label)
        if bool(tumor.any()):
            boxes = sorted(components(tumor), key=lambda part: -part[2])
            centres = [[(a + b) // 2 for a, b in zip(lo, hi, strict=True)] for lo, hi, _ in boxes]
        else:
            values = case.label.flatten().long().bincount()
            rarest = [int(v) for v in values.argsort() if v and values[v]]
            for value in rarest[: count // 2]:
                voxels = (case.label == value).nonzero()
                centres.append(voxels[len(voxels) // 2].tolist())
    places = [cube(c, case.hu.shape, side) for c in spread(centres, max(1, count // 2))]
    rated: list[tuple[float, Place]] = []
    for where in tiles(case.hu.shape, side):
        part = case.hu[where]
        rated.append((float(((part > window[0]) & (part < window[1])).float().mean()), where))
    enough = min(0.3, max(share for share, _ in rated))
    places += spread([where for share, where in rated if share >= enough], count - len(places))
    return [where for k, where in enumerate(places) if where not in places[:k]]


def tiles(shape: Sequence[int], side: int) -> list[Place]:
    """Cubes of this side that cover a volume; the last ones are moved back to fit into it."""
    return [
        cube([c * side + side // 2 for c in corner], shape, side)
        for corner in np.ndindex(*(max(1, -(-n // side)) for n in shape))
    ]


def cube(centre: Sequence[int], shape: Sequence[int], side: int) -> Place:
    """A cube around a voxel, moved back to fit into the volume, or as much as the volume has."""
    starts = [max(0, min(c - side // 2, n - side)) for c, n in zip(centre, shape, strict=True)]
    a, b, c = (slice(s, min(n, s + side)) for s, n in zip(starts, shape, strict=True))
    return a, b, c


def spread(things: list[T], count: int) -> list[T]:
    """At most ``count`` of the things, evenly spaced."""
    count = min(count, len(things))
    return [things[(2 * k + 1) * len(things) // (2 * count)] for k in range(count)]


def _trimmed(volume: Tensor, like: Tensor) -> Tensor:
    a, b, c = like.shape
    return volume[:a, :b, :c]


def _compared(scan: Tensor, out: Tensor, window: tuple[float, float]) -> list[list[Tensor]]:
    """A row of the grid: original, reconstruction and 4 x their difference, plane by plane."""
    width = window[1] - window[0]
    views = (
        shown(scan, *window),
        shown(out, *window),
        (0.5 + 4 * (out - scan) / width).clamp(0, 1),
    )
    return [list(tiles) for tiles in zip(*map(sections, views), strict=True)]


def reconstruction(
    autoencoder: Autoencoder, case: Case, organ_labels: Sequence[int]
) -> dict[str, Any]:
    """`Errors` in the organ's voxels of a whole scan, cut into cubes of 96 mm; under
    ``without_detail`` those of the decoded latent alone, where the autoencoder has detail."""
    assert case.label is not None
    organ = torch.isin(case.label, torch.tensor(list(organ_labels), dtype=case.label.dtype))
    window = autoencoder.config.window
    errors, without = Errors(window), Errors(window)
    for where in tiles(case.hu.shape, WHOLE_SIDE):
        factor = autoencoder.config.factor
        inside = organ[where]
        inside = inside[tuple(slice(n - n % factor) for n in inside.shape)]
        if inside.float().mean() < 0.05:
            continue
        scan, out, plain = reconstructed(autoencoder, case.hu[where])
        errors.add(Difference(scan, out, window), inside)
        if autoencoder.config.detail_channels:
            without.add(Difference(scan, plain, window), inside)
    figures: dict[str, Any] = errors.figures() if errors.voxels else {"voxels": 0}
    return {**figures, "without_detail": without.figures()} if without.voxels else figures
