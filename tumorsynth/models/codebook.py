"""The vector-quantisation codebook: nearest code, and its moving-average update in training."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tumorsynth.devices import full_float32
from tumorsynth.models.conv import linear

fused_on: str | None = "cuda"  # the kind of device that searches in one kernel; None for none
DEAD = 0.03  # of a code's even share of the latent voxels: used less, it counts as dead


class Usage(NamedTuple):
    """``perplexity``: the number of codes, used evenly, that would tell as much (1 to size);
    ``alive``: share of the codes that are not dead, 0 to 1."""

    perplexity: float
    alive: float


class Codebook(nn.Module):
    """``size`` codes of ``dim`` channels, replaced for each latent voxel by the nearest one (L2).

    The codes are not learned by gradient but follow the encoder's outputs by an exponential
    moving average (van den Oord et al. 2017, appendix A.1), here with the bias correction of
    Adam, so that a code seen in the first steps moves to what it saw and not to a fraction of it.
    Whether the codes have been initialised, and how many updates they have had, are part of the
    state: a resumed run goes on instead of starting over.

    Where torch.distributed is initialised, all processes count together and hold the same codes.
    """

    embeddings: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor
    initialised: Tensor

    def __init__(self, size: int, dim: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("embeddings", torch.randn(size, dim))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def nearest(self, latent: Tensor, tokens_per_chunk: int | None = None) -> Tensor:
        """Index of the nearest code of every latent voxel: (B, dim, d, h, w) -> (B, d, h, w) int64.

        ``argmin |z - e|^2 = argmin |e|^2 - 2 z.e``, a chunk of voxels at a time: memory is bounded
        by ``tokens_per_chunk * size`` floats however large the crop is. By default a chunk's
        distances fit into a CPU's cache, or are 4096 voxels' on a GPU; on CUDA, where triton is
        installed, one kernel searches without them. Always in full float32.
        """
        if tokens_per_chunk is None:
            found = _fused(latent, self.embeddings)
            if found is not None:
                return found
        size = len(self.embeddings)
        if tokens_per_chunk is None:
            tokens_per_chunk = max(16, 2**19 // size) if latent.device.type == "cpu" else 4096
        flat = _tokens(latent).to(self.embeddings.dtype)
        away, half_norm = -self.embeddings, self.embeddings.square().sum(1) / 2
        # 16,384 codes lie too close together for the eight bits of bfloat16
        kind = latent.device.type
        with torch.autocast(kind, enabled=False), full_float32(kind):
            codes = [
                _argmin(linear(chunk, away, half_norm)) for chunk in flat.split(tokens_per_chunk)
            ]
        return torch.cat(codes).view(latent.shape[0], *latent.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, d, h, w) code indices -> (B, dim, d, h, w) code vectors."""
        return nn.functional.embedding(codes, self.embeddings).movedim(-1, 1)

    def forward(
        self, latent: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantised latent and codes; in training mode the codes are updated as well.

        In training the quantised latent is float32 and passes its gradient straight through to
        ``latent``. ``generator`` (on the CPU; else the global random state) draws the initial
        codes out of the first batch.
        """
        if not self.training:
            codes = self.nearest(latent.detach())
            return self.lookup(codes).to(latent.dtype), codes
        latent = latent.float()
        seen = latent.detach()
        if not self.initialised:
            self._seed(torch.ones_like(self.counts, dtype=torch.bool), seen, generator)
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
        """Move dead codes to voxels of ``latent`` drawn at random; returns how many there were.

        threshold: latent voxels per update (of all processes together, averaged with bias
        correction) below which a code is dead; by default 3 % of an even share. A restarted code
        starts out with an even share, so that, unused, it is dead again after some 350 updates at
        the default decay (fewer early in training). To be called every hundred steps or so, by all
        processes at once. Nothing is drawn, and nothing changes, where no code is dead or there
        has been no update yet.
        """
        if self.updates == 0:
            return 0
        counts, share = self._corrected()
        dead = counts < (DEAD * share if threshold is None else threshold)
        number = int(dead.sum())
        if number:
            self._seed(dead, latent.detach().float(), generator)
            start = max(share, threshold or 0.0) * self._correction()
            self.counts[dead] = start
            self.sums[dead] = self.embeddings[dead] * start
        return number

    @torch.no_grad()
    def usage(self, codes: Tensor | None = None) -> Usage:
        """Of given codes (this process's), or of the moving average over the last updates."""
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
            float((counts >= DEAD * share).float().mean()),
        )

    def _correction(self) -> Tensor:
        """The moving averages started at zero: their sum of weights, 1 after some hundreds."""
        return 1 - self.decay ** self.updates.to(self.counts.dtype)

    def _corrected(self) -> tuple[Tensor, float]:
        """Latent voxels per update of every code, and their mean, the even share."""
        counts = self.counts / self._correction()
        return counts, float(counts.mean())

    def _seed(self, which: Tensor, seen: Tensor, generator: torch.Generator | None) -> None:
        """Put the codes of a mask where latent voxels are, each a little off its voxel."""
        voxels = _of_all(_tokens(seen))
        # drawn on the CPU: the same on every device; what process 0 draws is what counts
        number = int(which.sum())
        pick = torch.randint(len(voxels), (number,), generator=generator).to(voxels.device)
        jitter = torch.randn(number, voxels.shape[1], generator=generator).to(voxels.device)
        drawn = voxels[pick] + 0.01 * voxels.std(correction=0) * jitter
        self.embeddings[which] = _of_first(drawn)

    @torch.no_grad()
    def _update(self, seen: Tensor, codes: Tensor) -> None:
        flat, index = _tokens(seen), codes.reshape(-1)
        # one column more than sums, for the counts: one reduction instead of two
        ones = torch.ones_like(flat[:, :1])
        both = torch.zeros_like(torch.cat([self.sums, self.counts[:, None]], 1))
        both.index_add_(0, index, torch.cat([flat, ones], 1))
        if _processes() > 1:
            dist.all_reduce(both)
        self.updates += 1
        self.counts.lerp_(both[:, -1], 1 - self.decay)
        self.sums.lerp_(both[:, :-1], 1 - self.decay)
        # The bias correction cancels in sums / counts. It matters for telling a code that is in use
        # from one that is not: the latter stays where it is, instead of at 0 / 0.
        used = self.counts > 1e-2 * self._correction()
        self.embeddings[used] = self.sums[used] / self.counts[used, None]


def _fused(latent: Tensor, embeddings: Tensor) -> Tensor | None:
    """The answer of the fused search, or None where it cannot run; a failure is said once."""
    global fused_on
    suits = latent.device.type == fused_on and embeddings.dtype == torch.float32
    if not suits or torch.compiler.is_compiling():
        return None
    try:
        from tumorsynth.models.nearest_triton import nearest

        with torch.cuda.device_of(latent):  # triton launches on the current device
            return nearest(latent, embeddings)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: no triton, no C compiler, a GPU it does not know
        fused_on = None
        if not isinstance(error, ImportError):
            warnings.warn(
                f"the fused search of the codes does not run here ({type(error).__name__}: "
                f"{str(error).strip()[:160]}); going on with the slower one",
                stacklevel=2,
            )
    return None


def _argmin(values: Tensor) -> Tensor:
    """values.argmin(1) of (n, size), three times as fast on a CPU: amin is vectorised there, argmin
    is not, so the smallest of each group comes first and the index within one group after."""
    groups = values.unflatten(1, (math.gcd(values.shape[1], 128), -1))
    best = groups.amin(2).argmin(1, keepdim=True)
    within = groups.take_along_dim(best[:, :, None], dim=1).argmin(2)
    return (best * groups.shape[2] + within)[:, 0]


def _tokens(latent: Tensor) -> Tensor:
    """(B, dim, d, h, w) -> (voxels, dim)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _of_all(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order: those of the whole batch."""
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


def _of_first(rows: Tensor) -> Tensor:
    """The rows of process 0."""
    if _processes() > 1:
        dist.broadcast(rows, 0)
    return rows
