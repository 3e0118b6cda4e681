"""Read scans from files onto the generator's grid: RAS, 1 mm, HU. Needs MONAI.

All cases are read and checked before anything is trained, and one error lists all problems.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tumorsynth.affines import MAX_SHIFT_VOXELS, largest_shift, to_array, voxel_sizes
from tumorsynth.scans.nifti import Reading
from tumorsynth.scans.organ_masks import read_scan
from tumorsynth.scans.volume import Volume
from tumorsynth.scans.volume_files import file_lacks_geometry, read_volume
from tumorsynth.training.data import (
    PACKED_HU,
    Case,
    held_out_duplicates,
    hu_problem,
    load_pack,
    raise_problems,
)
from tumorsynth.training.sources import Source, find_sources, with_masks

MAX_VOLUME_MM3 = 1.5e9  # a whole body in its field of view has 0.5e9
MIN_LONGEST_SIDE_MM = 5.0  # of any CT
MAX_READING_THREADS = 4  # each holds a whole scan in float32
BODY_HU = -300  # voxels above belong to the body
MIN_BODY_SHARE = 0.02  # of a slice that belongs to the body


def load_data(
    data: Path,
    labels: Path | None = None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    organs: Sequence[str] = (),
    channel: str | None = None,
) -> list[Case]:
    """Read training cases.

    Args:
        data: a pack (.npz), a dataset.json, or a folder of CTs in any layout of
            `tumorsynth.scans.layouts`. Cases listed under "validation" in a dataset.json are held
            out.
        labels: a folder of label maps, for a folder of CTs.
        reading: what to do where files contradict themselves or each other.
        organs: names of the organs, where the labels are folders of one file per organ: the label
            is 1, 2, ... in these, and the next value in the tumours.
        channel: number or name of the CT, where cases have several channels (nnU-Net).

    Raises:
        FileNotFoundError: if ``data`` does not exist.
        ValueError: with every problem of every case.

    Examples:
        >>> cases = load_data(Path("images"), Path("labels"))
    """
    if labels is not None and not data.is_dir():
        raise ValueError(
            f"--labels goes with a folder of CTs, but {data} is not one; leave --labels out: a "
            "dataset.json and a pack name their own labels"
        )
    if data.suffix == ".npz":
        if channel is not None:
            raise ValueError(f"--channel is for scans, but {data} is a pack of them; leave it out")
        return load_pack(data)
    sources = with_masks(find_sources(data, labels, channel), organs)
    return read_cases(sources, reading=reading)


def read_cases(
    sources: list[Source],
    workers: int | None = None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
) -> list[Case]:
    """Read all cases, in order.

    Args:
        sources: the files of the cases.
        workers: threads that read, by default one for each processor, at most four: each holds a
            whole scan in float32. Decompression and resampling release the interpreter lock.
        reading: what to do where files contradict themselves or each other.

    Raises:
        ValueError: with every problem of every case.
    """
    reader = _reader(reading)
    from monai.data import CacheDataset

    workers = workers or min(MAX_READING_THREADS, os.cpu_count() or 1)
    results = CacheDataset(sources, reader, num_workers=workers, progress=False, copy_cache=False)
    cases = [case for case in results if isinstance(case, Case)]
    problems = [problem for problem in results if isinstance(problem, str)]
    for name in sorted({s.name for s in sources}):
        same = [s for s in sources if s.name == name]
        if len({s.held_out for s in same}) > 1:
            problems.append(
                f'{name}: listed under both "training" and "validation"; a scan that is trained on '
                "cannot be held out: remove it from one"
            )
        elif len(same) > 1:
            problems.append(f"{name}: listed twice; list it once")
    raise_problems(problems or held_out_duplicates(cases))
    if reading.geometry is None:
        _warn_of_default_headers(sources)
    return cases


def _warn_of_default_headers(sources: list[Source]) -> None:
    """Warn of CTs whose header says 1 mm only because the library that wrote it knew no size."""
    files = [source.image for source in sources]
    named = [path.name for path in files if file_lacks_geometry(path)]
    if named:
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        warnings.warn(
            f"the header of {named[0]}{more} says voxels of 1 mm and no position, as libraries "
            "write that know neither; where voxels have another size the generator learns wrong "
            "sizes: repair the headers, or add --geometry pixdim if they are right",
            stacklevel=3,
        )


def read_case(source: Source) -> Case:
    """Read one case and crop it to the body.

    Raises:
        ValueError: with the problems of the case, without its name.
    """
    return _read(source, Reading(), _resampling())


def _reader(reading: Reading) -> Any:
    """A MONAI transform from a Source to its Case, or to a problem in words.

    An exception would end the reading of all other cases.
    """
    grid = _resampling()
    from monai.transforms import Transform

    class Read(Transform):
        def __call__(self, source: Source) -> Case | str:
            try:
                return _read(source, reading, grid)
            except (ValueError, OSError) as error:
                return f"{source.name}: {error}"

    return Read()


def _read(source: Source, reading: Reading, grid: Any) -> Case:
    image = _load(source.image, reading)
    label = _load_label(source, reading)
    problems = [hu_problem(image.as_tensor()[0]), _size_problem(image)]
    if label is not None:
        problems.append(_label_problem(image, label, reading))
    if any(problems):
        raise ValueError("; ".join(problem for problem in problems if problem))
    scan = {"image": image}
    if label is not None:  # exactly the image's grid, although the headers may differ in rounding
        label.affine = image.affine
        scan["label"] = label
    resampled = grid(scan)
    hu = resampled["image"].as_tensor()[0]
    box = body_box(hu)
    packed = None
    if label is not None:
        packed = resampled["label"].as_tensor()[0][box].round().byte().clone()
    hu = hu[box].round().clamp(*PACKED_HU).short().clone()
    return Case(source.name, hu, packed, source.held_out)


def _load(path: Path, reading: Reading) -> Any:
    """Read a CT as a MetaTensor (1, X, Y, Z) of float32."""
    volume = read_volume(path, reading)
    return _as_tensor(volume, volume.values())


def _load_label(source: Source, reading: Reading) -> Any:
    """Read a label, likewise; None where there is none."""
    if source.label is None:
        return None
    if source.masks is None:
        volume = read_volume(source.label, reading)
    else:
        _, volume = read_scan(source.image, source.label, reading, source.masks)
    return _as_tensor(volume, volume.integers().astype(np.float32))


def _as_tensor(volume: Volume, values: np.ndarray) -> Any:
    from monai.data import MetaTensor

    return MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(volume.affine))


def _size_problem(image: Any) -> str | None:
    """Why a CT cannot be resampled to 1 mm: with a wrong header it would exhaust the memory."""
    spacing = voxel_sizes(to_array(image.affine))
    sides = spacing * image.shape[1:]
    size = " x ".join(f"{side:.4g}" for side in sides)
    if np.isfinite(sides).all() and 0 < sides.max() < MIN_LONGEST_SIDE_MM:
        return (
            f"by its header the CT is {size} mm; if its spacing is in metres, multiply it by 1000"
        )
    if np.isfinite(sides).all() and 0 < sides.prod() <= MAX_VOLUME_MM3:
        return None
    return (
        f"a CT must be of at most {MAX_VOLUME_MM3:.2g} mm3, but by its header it is "
        f"{size} mm; repair the header"
    )


def _label_problem(image: Any, label: Any, reading: Reading) -> str | None:
    if label.shape != image.shape:
        return (
            f"a label must have its image's shape {tuple(image.shape[1:])}, "
            f"got {tuple(label.shape[1:])}"
        )
    if not reading.same_grid:
        affines = to_array(image.affine), to_array(label.affine)
        shift = largest_shift(*affines, image.shape[1:])
        if shift > MAX_SHIFT_VOXELS:
            return (
                "the label lies elsewhere in space than the image (the affines differ, by up to "
                f"{shift:.2g} voxels); resample it, or add --same-grid if voxel lies on voxel"
            )
    low, high = (int(end) for end in label.as_tensor().aminmax())
    if low < 0 or high > 255:
        return f"label values must be integers from 0 to 255, got {low if low < 0 else high}"
    return None


def _resampling() -> Any:
    """MONAI's transforms that resample to the grid, label optional."""
    try:
        from monai.transforms import Compose, Orientationd, Spacingd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading scans for training needs {error.name}: "
            'pip install "tumorsynth[train]"; a pack (.npz) needs torch only'
        ) from error
    keys, missing = ["image", "label"], {"allow_missing_keys": True}
    return Compose(
        [
            Orientationd(keys, axcodes="RAS", labels=None, **missing),
            Spacingd(
                keys,
                pixdim=(1.0, 1.0, 1.0),
                mode=("bilinear", "nearest"),
                padding_mode="border",
                **missing,
            ),
        ]
    )


def body_box(hu: Tensor) -> tuple[slice, slice, slice]:
    """Return the slices that hold the body: more than 2 % of their voxels lie above -300 HU."""
    body = (hu > BODY_HU).float()
    slices = []
    for axis in range(3):
        share = body.mean(dim=tuple(a for a in range(3) if a != axis))
        inside = (share > MIN_BODY_SHARE).nonzero().flatten()
        low, high = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, hu.shape[axis])
        slices.append(slice(low, high))
    return slices[0], slices[1], slices[2]
