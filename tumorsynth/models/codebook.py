"""The vector-quantisation codebook: nearest code, and its moving-average update in training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tumorsynth.devices import full_float32, stream_of
from tumorsynth.models.conv import linear

fused_on: str | None = "cuda"  # type of device that searches in one kernel; None for none
DEAD_SHARE = 0.03  # codes used less than this share of the mean use are dead


class Usage(NamedTuple):
    """How evenly the codes are used.

    Args:
        perplexity: number of evenly used codes of the same entropy, 1 to size.
        alive: share of the codes that are not dead, 0 to 1.
    """

    perplexity: float
    alive: float


class DerivedFromCodes(NamedTuple):
    """What the search and the latent's range need of the codes.

    Args:
        away: (size, dim), the negative codes.
        half_norm: (size,), half of their squared lengths.
        lowest: the smallest value in them.
        highest: the largest one.
    """

    away: Tensor
    half_norm: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> DerivedFromCodes:
        return cls(-codes, codes.square().sum(1) / 2, codes.min(), codes.max())


class Codebook(nn.Module):
    """Replaces each latent voxel by the nearest (L2) of a set of codes.

    The codes follow the encoder's outputs by an exponential moving average (van den Oord et al.
    2017, appendix A.1) with the bias correction of Adam, so that codes move in full from the first
    update. The state includes whether the codes are initialised and the number of updates, so that
    an interrupted run can resume. With torch.distributed, all processes count together and hold the
    same codes.

    Args:
        size: number of codes.
        dim: channels of a code.
        decay: of the moving average.
    """

    embeddings: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor
    initialised: Tensor

    def __init__(self, size: int, dim: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self._kept: tuple[Tensor, tuple[int, int], DerivedFromCodes] | None = None
        self.register_buffer("embeddings", torch.randn(size, dim))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def nearest(self, latent: Tensor, tokens_per_chunk: int | None = None) -> Tensor:
        """Find the nearest code of every latent voxel, in full float32.

        The search minimises ``|e|^2 / 2 - z.e`` chunk by chunk, which bounds memory by
        ``tokens_per_chunk * size`` floats. On CUDA with triton, one kernel searches without storing
        distances.

        Args:
            latent: (B, dim, d, h, w).
            tokens_per_chunk: latent voxels in a chunk; None chooses what fits a CPU's cache, 4096
                on a GPU, or the fused kernel.

        Returns:
            Index of the code, (B, d, h, w) int64.
        """
        if tokens_per_chunk is None:
            found = _fused(latent, self.embeddings, self.derived)
            if found is not None:
                return found
        size = len(self.embeddings)
        if tokens_per_chunk is None:
            tokens_per_chunk = max(16, 2**19 // size) if latent.device.type == "cpu" else 4096
        flat = _tokens(latent).to(self.embeddings.dtype)
        derived = self.derived()
        # codes lie too close together for the 8 bits of bfloat16
        kind = latent.device.type
        with torch.autocast(kind, enabled=False), full_float32(kind, own_layers=True):
            codes = [
                _argmin(linear(chunk, derived.away, derived.half_norm))
                for chunk in flat.split(tokens_per_chunk)
            ]
        return torch.cat(codes).view(latent.shape[0], *latent.shape[2:])

    def derived(self) -> DerivedFromCodes:
        """Return what follows from the codes; outside of training it is kept until they change."""
        codes = self.embeddings
        if self.training or codes.is_inference():  # torch does not count changes of the latter
            return DerivedFromCodes.of(codes)
        state, kept = (codes._version, stream_of(codes.device)), self._kept
        if kept is None or kept[0] is not codes or kept[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = codes, state, DerivedFromCodes.of(codes)
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the codes of indices: (B, d, h, w) -> (B, dim, d, h, w)."""
        return nn.functional.embedding(codes, self.embeddings).movedim(-1, 1)

    def forward(
        self, latent: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantise a latent; in training mode, update the codes as well.

        In training the quantised latent is float32 and passes its gradient straight through to
        ``latent``.

        Args:
            latent: (B, dim, d, h, w).
            generator: on the CPU, draws the initial codes from the first batch; None uses torch's
                global random state.

        Returns:
            Quantised latent, and the indices of its codes (B, d, h, w).
        """
        if not self.training:
            codes = self.nearest(latent.detach())
            return self.lookup(codes).to(latent.dtype), codes
        latent = latent.float()
        seen = latent.detach()
        if not self.initialised:
            self._place_codes(torch.ones_like(self.counts, dtype=torch.bool), seen, generator)
            self.initialised.fill_(True)
        codes = self.nearest(seen)
        quantised = latent + (self.lookup(codes) - latent).detach()
        self._update(seen, codes)
        return quantised, codes

    @torch.no_grad()
    def restart_dead(
        self,
        latent: Tensor,
        threshold: float | None = None,
        generator: torch.Generator | None = None,
    ) -> int:
        """Move dead codes to random voxels of a latent.

        A restarted code starts with an even share of the voxels: unused, it is dead again after
        some 350 updates at the default decay, fewer early in training. Call this about every
        hundred steps, in all processes at once. Without dead codes or updates so far, nothing is
        drawn and nothing changes.

        Args:
            latent: (B, dim, d, h, w).
            threshold: latent voxels for each update (of all processes, averaged with bias
                correction) below which a code is dead; None is `DEAD_SHARE` of an even share.
            generator: on the CPU, draws the voxels; None uses torch's global random state.

        Returns:
            Number of dead codes.
        """
        if self.updates == 0:
            return 0
        counts, share = self._corrected()
        dead = counts < (DEAD_SHARE * share if threshold is None else threshold)
        number = int(dead.sum())
        if number:
            self._place_codes(dead, latent.detach().float(), generator)
            start = max(share, threshold or 0.0) * self._correction()
            self.counts[dead] = start
            self.sums[dead] = self.embeddings[dead] * start
        return number

    @torch.no_grad()
    def usage(self, codes: Tensor | None = None) -> Usage:
        """Return how evenly codes are used.

        Args:
            codes: indices from this process; None measures the moving average of all.
        """
        if codes is None:
            counts, share = self._corrected() if self.updates > 0 else (self.counts, 0.0)
        else:
            counts = torch.bincount(codes.flatten(), minlength=len(self.counts)).float()
            share = float(counts.mean())
        if not share:
            return Usage(1.0, 0.0)
        p = counts.double() / counts.double().sum()
        return Usage(
            math.exp(-float(torch.xlogy(p, p).sum())),
            float((counts >= DEAD_SHARE * share).float().mean()),
        )

    def _correction(self) -> Tensor:
        """Return the sum of weights of the moving averages, which start at zero."""
        return 1 - self.decay ** self.updates.to(self.counts.dtype)

    def _corrected(self) -> tuple[Tensor, float]:
        """Return the latent voxels of every code in an update, and their mean, the even share."""
        counts = self.counts / self._correction()
        return counts, float(counts.mean())

    def _place_codes(self, which: Tensor, seen: Tensor, generator: torch.Generator | None) -> None:
        """Place the codes of a mask near random latent voxels."""
        voxels = _gather_rows(_tokens(seen))
        # draw on the CPU, which gives the same on every device; process 0 decides
        number = int(which.sum())
        pick = torch.randint(len(voxels), (number,), generator=generator).to(voxels.device)
        jitter = torch.randn(number, voxels.shape[1], generator=generator).to(voxels.device)
        codes = voxels[pick] + 0.01 * voxels.std(correction=0) * jitter
        self.embeddings[which] = _broadcast_rows(codes)

    @torch.no_grad()
    def _update(self, seen: Tensor, codes: Tensor) -> None:
        flat, index = _tokens(seen), codes.reshape(-1)
        # a further column holds the counts, which saves a reduction
        ones = torch.ones_like(flat[:, :1])
        both = torch.zeros_like(torch.cat([self.sums, self.counts[:, None]], 1))
        both.index_add_(0, index, torch.cat([flat, ones], 1))
        if _processes() > 1:
            dist.all_reduce(both)
        self.updates += 1
        self.counts.lerp_(both[:, -1], 1 - self.decay)
        self.sums.lerp_(both[:, :-1], 1 - self.decay)
        # The bias correction cancels in sums / counts, but not in this threshold. Unused codes stay
        # where they are, instead of moving to 0 / 0.
        used = self.counts > 1e-2 * self._correction()
        self.embeddings[used] = self.sums[used] / self.counts[used, None]


def _fused(
    latent: Tensor, embeddings: Tensor, derived: Callable[[], DerivedFromCodes]
) -> Tensor | None:
    """Return the result of the fused search, or None if it cannot run; warn once on failure."""
    global fused_on
    possible = latent.device.type == fused_on and embeddings.dtype == torch.float32
    if not possible or torch.compiler.is_dynamo_compiling():
        return None
    try:
        from tumorsynth.models.nearest_triton import nearest

        with torch.cuda.device_of(latent):  # triton launches on the current device
            return nearest(latent, embeddings, half_norm=derived().half_norm)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no triton, no C compiler, an unknown GPU, ...
        fused_on = None
        if not isinstance(error, ImportError):
            warnings.warn(
                f"the fused search of the codes does not run here ({type(error).__name__}: "
                f"{str(error).strip()[:160]}); going on with the slower one",
                stacklevel=2,
            )
    return None


def _argmin(values: Tensor) -> Tensor:
    """Return values.argmin(1) of (n, size), faster on a CPU.

    amin is vectorised there and argmin is not, so this finds the smallest of each group first and
    the index within the best group after.
    """
    groups = values.unflatten(1, (math.gcd(values.shape[1], 128), -1))
    best = groups.amin(2).argmin(1, keepdim=True)
    within = groups.take_along_dim(best[:, :, None], dim=1).argmin(2)
    return (best * groups.shape[2] + within)[:, 0]


def _tokens(latent: Tensor) -> Tensor:
    """(B, dim, d, h, w) -> (voxels, dim)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in their order."""
    processes = _processes()
    if processes == 1:
        return rows
    lengths = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(processes)]
    dist.all_gather(lengths, torch.tensor(len(rows), device=rows.device))
    most = max(int(n) for n in lengths)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])])
    gathered = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, lengths, strict=True)])


def _broadcast_rows(rows: Tensor) -> Tensor:
    """Return the rows of process 0."""
    if _processes() > 1:
        dist.broadcast(rows, 0)
    return rows
