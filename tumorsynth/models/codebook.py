"""The vector-quantisation codebook: nearest code, and its moving-average update in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Codebook(nn.Module):
    """``size`` codes of ``dim`` channels, replaced for each latent voxel by the nearest one (L2).

    The codes are not learned by gradient but follow the encoder's outputs by an exponential
    moving average (van den Oord et al. 2017, appendix A.1), here with the bias correction of
    Adam, so that a code seen in the first steps moves to what it saw and not to a fraction of it.
    Whether the codes have been initialised, and how many updates they have had, are part of the
    state: a resumed run goes on instead of starting over.
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

    def nearest(self, latent: Tensor, tokens_per_chunk: int = 4096) -> Tensor:
        """Index of the nearest code of every latent voxel: (B, dim, d, h, w) -> (B, d, h, w) int64.

        ``argmin |z - e|^2 = argmin |e|^2 - 2 z.e``, a chunk of voxels at a time: memory is bounded
        by ``tokens_per_chunk * size`` floats however large the crop is.
        """
        flat = latent.movedim(1, -1).reshape(-1, latent.shape[1]).to(self.embeddings.dtype)
        half_norm = self.embeddings.square().sum(1) / 2
        codes = [
            torch.addmm(half_norm, chunk, self.embeddings.T, alpha=-1).argmin(1)
            for chunk in flat.split(tokens_per_chunk)
        ]
        return torch.cat(codes).view(latent.shape[0], *latent.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, d, h, w) code indices -> (B, dim, d, h, w) code vectors."""
        return nn.functional.embedding(codes, self.embeddings).movedim(-1, 1)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised latent and codes; in training mode the codes are updated as well."""
        if self.training:
            self._initialise(latent.detach())
        codes = self.nearest(latent.detach())
        quantised = self.lookup(codes).to(latent.dtype)
        if self.training:
            self._update(latent.detach(), codes)
        return quantised, codes

    @torch.no_grad()
    def _initialise(self, latent: Tensor) -> None:
        if self.initialised:
            return
        flat = latent.movedim(1, -1).reshape(-1, latent.shape[1]).float()
        pick = torch.randint(len(flat), (len(self.embeddings),), device=flat.device)
        self.embeddings.copy_(flat[pick] + 0.01 * flat.std() * torch.randn_like(flat[pick]))
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, latent: Tensor, codes: Tensor) -> None:
        flat = latent.movedim(1, -1).reshape(-1, latent.shape[1]).float()
        index = codes.reshape(-1)
        counts = torch.zeros_like(self.counts).index_add_(0, index, torch.ones_like(flat[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, index, flat)
        self.updates += 1
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        # the bias correction 1 / (1 - decay^updates) cancels in sums / counts; it matters for
        # telling a code that is in use from one that is not
        correction = 1 - self.decay ** self.updates.to(self.counts.dtype)
        used = self.counts / correction > 1e-2
        self.embeddings[used] = self.sums[used] / self.counts[used, None]
