"""`SegmenterScorer`: how much of a synthetic tumour a segmentation network finds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from tumorsynth.appearance.network_grid import DIRECTIONS, NetworkGrid, pad_to
from tumorsynth.appearance.painted import PaintedTumor
from tumorsynth.appearance.segmenter_output import ACTIVATIONS, tumor_probability
from tumorsynth.arguments import is_bool, keywords_of
from tumorsynth.devices import onto
from tumorsynth.geometry import Box, Ints3, bounding_box, frame_from_spacing
from tumorsynth.intensity import HU, Intensity
from tumorsynth.once import Once
from tumorsynth.threads import own_threads

Preprocess = Callable[[Tensor], Any]
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@keywords_of()
class SegmenterScorer:
    """Scores a tumour by the share of its voxels that a segmentation network finds.

    It is a ``scorer`` of `tumorsynth.Gate`: ``least`` and ``most`` are then shares, from 0 to 1.
    The network sees one patch around the tumour, of the sample at hand, and no second pass over the
    volume. It runs in eval mode and without gradients, on the device that it is on, and is left as
    it was: the mode of each of its modules, and the random state of torch, numpy and Python.

    Args:
        model: a network or function that maps (1, C, X, Y, Z) to logits of the same size, or to a
            list of them as with deep supervision. None leaves it to the trainer: Lightning's
            callback and the nnU-Net trainer then score with the network that they train.
        tumor_channel: the output channel of the tumour, or several.
        patch_size: voxels of the network's input, along its axes, one number or three. Beyond the
            sample the patch holds 0, as in MONAI's and nnU-Net's inference. A tumour that is
            larger takes several patches.
        preprocess: how HU become the network's input: ``ts.Scaled(...)`` or ``ts.ZScore(...)``, or
            a function of HU (1, X, Y, Z), as MONAI's transforms are, that returns (C, X, Y, Z).
            None passes the image in the scale in which it came to the transform.
        spacing: mm per voxel of the network's input, along its axes. None is that of the sample.
        orientation: where the network's axes run to in the patient, as in "RAS". None takes the
            sample's axes as they are.
        activation: "softmax", "sigmoid", or "none" where the network returns probabilities. None
            takes softmax, and sigmoid of a single channel.
        threshold: probability from which on a voxel counts as found.

    Raises:
        ValueError: for a value that is out of range; on first use, for a network whose output has
            the wrong shape, too few channels, or values that are not finite.
        TypeError: for a value of the wrong type.

    Examples:
        >>> scorer = ts.SegmenterScorer(network, 2, 96, preprocess=ts.Scaled(-175, 250, 0, 1))
        >>> found = ts.SynthesizeTumor(gate=ts.Gate(scorer=scorer, least=0.7))
        >>> missed = ts.SynthesizeTumor(gate=ts.Gate(scorer=scorer, least=0.0, most=0.3))
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any] | None,
        tumor_channel: int | Sequence[int],
        patch_size: int | Sequence[int] = (96, 96, 96),
        *,
        preprocess: Intensity | Preprocess | None = None,
        spacing: Sequence[float] | float | None = None,
        orientation: str | None = None,
        activation: str | None = None,
        threshold: float = 0.5,
    ) -> None:
        if model is not None and not callable(model):
            raise TypeError(
                f"model must be a network or a function, got {model!r}; build the network and load "
                "its weights first, or pass None in Lightning and nnU-Net"
            )
        if preprocess is not None and (isinstance(preprocess, type) or not callable(preprocess)):
            if isinstance(preprocess, type) or not isinstance(preprocess, Intensity):
                raise TypeError(
                    "preprocess must be ts.Scaled(...), ts.ZScore(...) or a function of HU, got "
                    f"{preprocess!r}; pass for example ts.Scaled(-175, 250, 0, 1)"
                )
        if activation not in (None, *ACTIVATIONS):
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; leave it "
                "out for softmax"
            )
        if is_bool(threshold) or not isinstance(threshold, int | float) or not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold!r}; try 0.5")
        self.model = model
        self._bound = model is None  # by a trainer, or to be
        self.tumor_channel = _check_channels(tumor_channel)
        self.patch_size = _check_patch_size(patch_size)
        self.preprocess = preprocess
        self.spacing = None if spacing is None else frame_from_spacing(spacing).spacing
        self.orientation = _check_orientation(orientation)
        self.activation, self.threshold = activation, float(threshold)
        self._stale = Once()  # the warning

    def bind(self, model: Callable[[Tensor], Any]) -> None:
        """Score with this model if none was given; called by the trainers."""
        if self._bound:
            self.model = model

    def __repr__(self) -> str:
        # without addresses and weights: checkpoints and reports compare it
        name = "None" if self._bound else type(self.model).__name__
        given = {
            "preprocess": self.preprocess if isinstance(self.preprocess, Intensity) else None,
            "spacing": self.spacing,
            "orientation": self.orientation,
            "activation": self.activation,
        }
        more = "".join(f", {k}={v!r}" for k, v in given.items() if v is not None)
        channels = self.tumor_channel[0] if len(self.tumor_channel) == 1 else self.tumor_channel
        if self.threshold != 0.5:
            more += f", threshold={self.threshold:g}"
        return f"SegmenterScorer({name}, {channels}, {self.patch_size}{more})"

    def __call__(self, hu: Tensor, tumor_mask: Tensor, spacing: Sequence[float]) -> float:
        """Return the share of a tumour that the network finds in a scan or a part of one.

        Args:
            hu: (X, Y, Z), with the tumour.
            tumor_mask: bool, same shape.
            spacing: mm per voxel.
        """
        whole = Box.whole(hu.shape)
        frame = frame_from_spacing(spacing)
        return self.score(PaintedTumor(hu, whole, hu, tumor_mask, frame, HU()))

    def score(self, painted: PaintedTumor) -> float:
        """Return the share of a tumour that the network finds in its sample."""
        inner = bounding_box(painted.inside)
        if inner is None:
            raise ValueError("tumor_mask must hold a voxel, got none; pass the tumour's mask")
        start = [a + b for a, b in zip(inner.start, painted.region.start, strict=True)]
        tumor = Box.at(start, inner.shape)
        shape = painted.image.shape
        grid = NetworkGrid.of(painted.frame, shape, self.spacing, self.orientation)
        windows = grid.windows(tumor, self.patch_size)
        part = Box.hull(windows)
        source = grid.source(part, shape)
        values = painted.image_in(source).float()
        if self.preprocess is not None:
            values = painted.intensity.to_hu(values)
        values = grid.to_network(grid.cut(values.nan_to_num(0.0, 0.0, 0.0), source, part))
        probability = torch.zeros(part.shape, device=values.device)
        covered = torch.zeros_like(probability)
        with torch.no_grad(), self._evaluating() as run:
            network_input = self._prepare(values)
            turned = [grid.to_sample(channel) for channel in network_input]
            for window in windows:
                at = window.relative_to(part).slices
                patch = torch.stack([grid.to_network(channel[at]) for channel in turned])
                probability[at] += grid.to_sample(run(patch))
                covered[at] += 1
        probability = grid.carry_back(probability / covered, part, tumor)
        found = (probability >= self.threshold)[painted.mask_in(tumor)]
        return float(found.float().mean())

    def _prepare(self, values: Tensor) -> Tensor:
        """Return the network's input (C, X, Y, Z) for HU, or the image's own scale (X, Y, Z)."""
        if self.preprocess is None:
            return values[None]
        if isinstance(self.preprocess, Intensity):
            scale = self.preprocess
            values = (values - float(scale.to_hu(values.new_zeros(())))) / scale.hu_per_unit
            return (values if scale.limits is None else values.clamp(*scale.limits))[None]
        prepared = torch.as_tensor(self.preprocess(values[None])).as_subclass(Tensor)
        if prepared.ndim != 4 or prepared.shape[1:] != values.shape:
            raise ValueError(
                f"preprocess must return (C, X, Y, Z) for (1, X, Y, Z), here {(1, *values.shape)}, "
                f"got {tuple(prepared.shape)}; resample with spacing= and orientation="
            )
        if not bool(prepared.isfinite().all()):
            raise ValueError(
                "preprocess must return finite values, got NaN or infinity; look at what it "
                "divides by"
            )
        return prepared.to(values.device).float()

    @contextmanager
    def _evaluating(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function of a patch (C, X, Y, Z) that returns the probability of tumour."""
        model = self.model
        if model is None:
            raise ValueError(
                "SegmenterScorer needs a model here, got None, which only Lightning's callback and "
                "the nnU-Net trainer replace by the network that they train; pass the network"
            )
        while isinstance(model, _WRAPPERS):  # a forward of one rank alone would wait for the others
            model = model.module
        training, first = [], None
        if isinstance(model, nn.Module):
            training = [module for module in model.modules() if module.training]
            tensors = [*model.parameters(), *model.buffers()]
            first = next((one for one in tensors if one.is_floating_point()), None)
        if training and get_worker_info() is not None:
            self._stale.give(
                "SegmenterScorer must score with the network in training, but in a DataLoader's "
                "worker it has a copy that learns nothing; synthesise on the batch "
                "(BatchSynthesizeTumord, TumorSynthCallback), or call network.eval() if this is on "
                "purpose"
            )

        def run(patch: Tensor) -> Tensor:
            padded, inner = pad_to(patch, self.patch_size)
            if first is not None:
                padded = onto(padded, first.device).to(first.dtype)
            output = _forward(model, padded[None])
            found = tumor_probability(output, self.patch_size, self.tumor_channel, self.activation)
            return found[inner].to(patch.device)

        device = None if first is None else first.device
        if isinstance(model, nn.Module) and training:
            model.eval()
        try:
            with own_threads(), _own_random_state(device):
                yield run
        finally:
            for module in training:
                module.training = True


def _forward(model: Callable[[Tensor], Any], patch: Tensor) -> Any:
    """Run a model; say what it got where it cannot take it."""
    try:
        return model(patch)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        if "forked subprocess" in str(error):  # the adapters say what to do
            raise
        raise ValueError(
            f"the segmenter must take a patch of shape {tuple(patch.shape)}, but raised "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; pass the patch_size "
            "of its training, and a preprocess= that gives as many channels"
        ) from error


@contextmanager
def _own_random_state(device: torch.device | None) -> Iterator[None]:
    """Give a model, perhaps with dropout of its own, the same random numbers each time."""
    on_gpu = [device] if device is not None and device.type == "cuda" else []
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(on_gpu):
        torch.default_generator.manual_seed(0)
        for one in on_gpu:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not is_bool(value)


def _check_channels(channels: Any) -> tuple[int, ...]:
    several = [channels] if _is_whole(channels) else channels
    fits = isinstance(several, list | tuple | range) and len(several) > 0
    if not fits or not all(_is_whole(one) and one >= 0 for one in several):
        raise ValueError(
            "tumor_channel must be the output channel of the tumour, from 0, or several, got "
            f"{channels!r}; for background, organ, tumour pass 2"
        )
    return tuple(int(one) for one in several)


def _check_patch_size(patch_size: Any) -> Ints3:
    sides = [patch_size] * 3 if _is_whole(patch_size) else patch_size
    try:
        sides = [*sides]
    except TypeError:
        sides = []
    if len(sides) != 3 or not all(_is_whole(side) and 1 <= side <= 4096 for side in sides):
        raise ValueError(
            f"patch_size must be one or three numbers of voxels, got {patch_size!r}; pass that of "
            "the network's training, for example (96, 96, 96)"
        )
    return int(sides[0]), int(sides[1]), int(sides[2])


def _check_orientation(orientation: Any) -> str | None:
    if orientation is None:
        return None
    letters = orientation.upper() if isinstance(orientation, str) else ""
    axes = {DIRECTIONS[letter][0] for letter in letters if letter in DIRECTIONS}
    if len(letters) != 3 or len(axes) != 3:
        raise ValueError(
            "orientation must be three letters, where the network's axes run to in the patient, "
            f'got {orientation!r}; pass for example "RAS" or "LPS"'
        )
    return letters
