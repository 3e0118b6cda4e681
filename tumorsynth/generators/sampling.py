"""Noise schedule and samplers: DDPM (Ho et al. 2020), cosine (Nichol 2021), DDIM (Song 2021).

DDPM may sample fewer steps than the schedule has: it is then respaced (Nichol 2021, section 4).

A denoiser is any callable ``denoise(x_t, t, cond)`` with t (B,) int64. All randomness comes in as
the tensor ``noise`` of shape (steps + 1, B, channels, d, h, w): the start, then one draw for each
step (the last step adds none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
Prediction = Literal["noise", "x0", "v"]
MAX_NOISE_LEFT = 0.002  # share of the variance at which DDIM may end
DRAWN_AT_ONCE = 16  # normal numbers of one block of torch's CPU generator


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance schedule; every tensor is (T,), float64, on the CPU.

    Args:
        betas: noise added at step t (Ho 2020, eq. 2).
        alphas_cumprod: alpha-bar_t, the signal's share of the variance (eq. 4).
        posterior_mean_x0: weight of x0 in the mean of q(x_{t-1} | x_t, x0) (eq. 7).
        posterior_mean_xt: weight of x_t in that mean.
        posterior_variance: variance of q, beta-tilde_t (eq. 7); 0 at t = 0.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    posterior_variance: Tensor

    @property
    def timesteps(self) -> int:
        return len(self.betas)


def cosine_schedule(
    timesteps: int = 4,
    s: float = 0.008,
    max_beta: float = 0.9999,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Return the cosine schedule of Nichol & Dhariwal 2021, eq. 17.

    Args:
        timesteps: length T.
        s: offset that keeps the first betas from vanishing.
        max_beta: upper limit of every beta.
        zero_terminal_snr: shift and scale sqrt(alpha-bar) so that the last is 0 and the first stays
            (Lin et al. 2023, "Common diffusion noise schedules", algorithm 1).

    Raises:
        ValueError: if ``timesteps`` is not a positive integer.
    """
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps must be a positive integer, got {timesteps!r}; pass 4 or 200")
    x = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    f = torch.cos((x + s) / (1 + s) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(0, max_beta)
    bar = (1 - betas).cumprod(0)
    if zero_terminal_snr and timesteps > 1:
        root = bar.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return _schedule_of(root.square())
    return _schedule(betas, bar)


def respaced(schedule: Schedule, kept: Sequence[int]) -> Schedule:
    """Return the schedule of some of the steps, ascending (Nichol & Dhariwal 2021, section 4)."""
    if len(kept) == schedule.timesteps:
        return schedule
    return _schedule_of(schedule.alphas_cumprod[list(kept)])


def ddpm_steps(timesteps: int, steps: int) -> list[int]:
    """Return evenly spaced steps of DDPM, ascending, with the first and last: 0, 3 for 4 in 2.

    One step is the last, from noise alone.

    Raises:
        ValueError: if ``steps`` is not from 1 to ``timesteps``.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(
            f"steps must be from 1 to the schedule's {timesteps} timesteps, got {steps}; "
            f"pass steps={timesteps}"
        )
    if steps == 1:
        return [timesteps - 1]
    return [round(k * (timesteps - 1) / (steps - 1)) for k in range(steps)]


def _schedule_of(bar: Tensor) -> Schedule:
    """Return the schedule with these alpha-bars."""
    return _schedule(1 - torch.cat([bar[:1], bar[1:] / bar[:-1]]), bar)


def _schedule(betas: Tensor, bar: Tensor) -> Schedule:
    alphas, previous = 1 - betas, torch.cat([bar.new_ones(1), bar[:-1]])
    return Schedule(
        betas=betas,
        alphas_cumprod=bar,
        posterior_mean_x0=betas * previous.sqrt() / (1 - bar),
        posterior_mean_xt=(1 - previous) * alphas.sqrt() / (1 - bar),
        posterior_variance=betas * (1 - previous) / (1 - bar),
    )


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return x_t: x0 (B, ...) with the noise of step t (B,) added (Ho 2020, eq. 4)."""
    signal, sigma = _levels(schedule, t, x0)
    return signal * x0 + sigma * noise


def target(
    schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor, prediction: Prediction = "noise"
) -> Tensor:
    """Return the training target of a network that gets q_sample(schedule, x0, t, noise).

    Args:
        schedule: the noise schedule.
        x0: (B, ...), the signal.
        t: (B,), steps.
        noise: same shape as ``x0``.
        prediction: what the network predicts.
    """
    if _checked(prediction) == "noise":
        return noise
    if prediction == "x0":
        return x0
    signal, sigma = _levels(schedule, t, x0)
    return signal * noise - sigma * x0  # Salimans & Ho 2022, section 4


def to_x0(
    schedule: Schedule,
    predicted: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    prediction: Prediction = "noise",
) -> Tensor:
    """Convert a network's output to x0, the inverse of `target`.

    Args:
        schedule: the noise schedule.
        predicted: the network's output for ``x_t``.
        x_t: (B, ...).
        t: (B,), or one step for all samples.
        prediction: what the network predicts.
    """
    if _checked(prediction) == "x0":
        return predicted
    signal, sigma = _levels(schedule, t, x_t)
    if prediction == "v":
        return signal * x_t - sigma * predicted
    return (x_t - sigma * predicted) / signal


@torch.no_grad()
def ddpm_sample(
    denoise: Denoise,
    schedule: Schedule,
    cond: Tensor,
    noise: Tensor,
    clamp: float | None = 1.0,
    prediction: Prediction = "noise",
    steps: int | None = None,
) -> Tensor:
    """Sample through every step, or fewer (Ho 2020, algorithm 2).

    Args:
        denoise: the network.
        schedule: of T timesteps.
        cond: (B, ..., d, h, w), passed to the network.
        noise: (steps + 1, B, channels, d, h, w).
        clamp: x0 is clamped to [-clamp, clamp] at every step; None does not clamp.
        prediction: what the network predicts.
        steps: at most T, see `ddpm_steps`; None is T.

    Returns:
        x0, (B, channels, d, h, w), float32.

    Raises:
        ValueError: if ``noise`` has another shape, or ``steps`` is not from 1 to T.
    """
    kept = ddpm_steps(schedule.timesteps, steps or schedule.timesteps)
    weights = respaced(schedule, kept)
    draws = _checked_noise(noise, len(kept) + 1, cond)
    x = draws[0]
    for draw, k in zip(draws[1:], reversed(range(len(kept))), strict=True):
        x0 = _predict_x0(denoise, schedule, x, kept[k], cond, clamp, prediction)
        x = float(weights.posterior_mean_x0[k]) * x0 + float(weights.posterior_mean_xt[k]) * x
        if k:
            x = x + math.sqrt(weights.posterior_variance[k]) * draw
    return x


def ddim_steps(timesteps: int, steps: int) -> list[int]:
    """Return the evenly spaced steps of DDIM, ascending: 1, 5, ..., 197 for 200 in 50.

    Raises:
        ValueError: if ``steps`` does not divide ``timesteps``.
    """
    if steps < 1 or timesteps % steps:
        raise ValueError(
            f"steps must divide the schedule's {timesteps} timesteps, got {steps}; "
            f"pass for example steps={timesteps // 4 if timesteps % 4 == 0 else timesteps}"
        )
    stride = timesteps // steps
    return list(range(min(1, stride - 1), timesteps, stride))


@torch.no_grad()
def ddim_sample(
    denoise: Denoise,
    schedule: Schedule,
    cond: Tensor,
    noise: Tensor,
    steps: int = 50,
    eta: float = 0.0,
    clamp: float | None = None,
    prediction: Prediction = "noise",
) -> Tensor:
    """Sample over a subset of the steps (Song et al. 2021, eq. 12 and 16).

    As in the published model, the last step ends at the noise level just below its own (0.999745
    for 200 in 50) instead of 1, unless a short schedule would leave visible noise there.

    Args:
        denoise: the network.
        schedule: of T steps.
        cond: (B, ..., d, h, w), passed to the network.
        noise: (steps + 1, B, channels, d, h, w); with eta = 0, (1, B, ...) suffices.
        steps: a divisor of T.
        eta: share of the DDPM noise that every step adds; 0 is deterministic.
        clamp: x0 is clamped to [-clamp, clamp] at every step; None does not clamp.
        prediction: what the network predicts.

    Returns:
        x0, (B, channels, d, h, w), float32.

    Raises:
        ValueError: if ``steps`` does not divide T, or ``noise`` has another shape.
    """
    selected = ddim_steps(schedule.timesteps, steps)
    draws = _checked_noise(noise, steps + 1 if eta else min(len(noise), steps + 1), cond)
    bar = [1.0, *schedule.alphas_cumprod.tolist()]  # bar[t + 1] belongs to step t
    x = draws[0]
    for n, i in enumerate(reversed(selected)):
        last = bar[i] if 1 - bar[i] < MAX_NOISE_LEFT else 1.0
        now, then = bar[i + 1], bar[selected[-n - 2] + 1] if n + 1 < steps else last
        x0 = _predict_x0(denoise, schedule, x, i, cond, clamp, prediction)
        eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        x = math.sqrt(then) * x0 + math.sqrt(max(0.0, 1 - then - sigma**2)) * eps
        if sigma:
            x = x + sigma * draws[n + 1]
    return x


def draw_noise(
    shape: Sequence[int],
    steps: int,
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    last: bool = True,
) -> Tensor:
    """Draw the noise of a batch, each sample's from its own CPU generator.

    A sample's noise therefore depends on its seed alone, not on the batch or the device.

    Args:
        shape: of one sample.
        steps: draws after the start.
        generators: one CPU generator for each sample.
        device: where the result goes.
        last: whether to draw for the last step, which adds nothing. False draws 0 for it and leaves
            the numbers before it as they are, but not what the generators draw next.

    Returns:
        (steps + 1, B, *shape), float32.

    Raises:
        ValueError: if a generator is not on the CPU.
    """
    for generator in generators:
        if generator.device.type != "cpu":
            raise ValueError(
                f"noise must be drawn from CPU generators, got one on {generator.device}; "
                "pass torch.Generator('cpu').manual_seed(seed)"
            )
    drawn = steps + 1
    # a block that is not full takes other numbers, so that fewer draws may start with others
    if not last and steps > 0 and math.prod(shape) % DRAWN_AT_ONCE == 0:
        drawn = steps
    noise = torch.zeros(steps + 1, len(generators), *shape, dtype=torch.float32)
    for sample, one in enumerate(generators):
        # another default dtype would draw other numbers
        noise[:drawn, sample] = torch.randn((drawn, *shape), generator=one, dtype=torch.float32)
    return noise.to(device)


def _predict_x0(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    i: int,
    cond: Tensor,
    clamp: float | None,
    prediction: Prediction,
) -> Tensor:
    t = torch.full((len(x),), i, device=x.device)
    x0 = to_x0(schedule, denoise(x, t, cond).float(), x, i, prediction)
    return x0 if clamp is None else x0.clamp(-clamp, clamp)


def _levels(
    schedule: Schedule, t: Tensor | int, like: Tensor
) -> tuple[Tensor | float, Tensor | float]:
    """Return sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), shaped to multiply ``like``."""
    if isinstance(t, int):  # plain numbers need no host-device synchronisation
        bar = float(schedule.alphas_cumprod[t])
        return math.sqrt(bar), math.sqrt(1 - bar)
    bars = schedule.alphas_cumprod[t.cpu()].reshape(-1, *[1] * (like.ndim - 1))
    return bars.sqrt().to(like), (1 - bars).sqrt().to(like)


def _checked(prediction: str) -> str:
    if prediction not in ("noise", "x0", "v"):
        raise ValueError(f'prediction must be "noise", "x0" or "v", got {prediction!r}; pass one')
    return prediction


def _checked_noise(noise: Tensor, draws: int, cond: Tensor) -> Tensor:
    fits = noise.ndim == 6 and len(noise) == draws
    if not fits or noise.shape[1] != len(cond) or noise.shape[3:] != cond.shape[2:]:
        wanted = (draws, len(cond), "channels", *cond.shape[2:])
        raise ValueError(
            f"noise must be ({', '.join(map(str, wanted))}) for this schedule and cond, "
            f"got {tuple(noise.shape)}; draw it with draw_noise"
        )
    return noise.to(cond.device, torch.float32)
