from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_generator
from torch import Tensor

from tumorsynth.generators.sampling import (
    Schedule,
    cosine_schedule,
    ddim_sample,
    ddim_steps,
    ddpm_sample,
    ddpm_steps,
    draw_noise,
    q_sample,
    target,
    to_x0,
)

PREDICTIONS = ("noise", "x0", "v")


def oracle(schedule: Schedule, x0: Tensor, prediction: str):
    """A network that knows the answer: the noise in x_t is whatever makes it from x0."""

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        bar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1, 1)
        noise = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        return target(schedule, x0, t, noise, prediction)  # type: ignore[arg-type]

    return denoise


def test_published_early_schedule() -> None:
    schedule = cosine_schedule(4)
    betas = [0.152988, 0.416958, 0.707859, 0.9999]
    assert schedule.betas.tolist() == pytest.approx(betas, abs=1e-6)
    bars = [0.847012, 0.493844, 0.144272, 1.44272e-5]
    assert schedule.alphas_cumprod.tolist() == pytest.approx(bars, rel=1e-5)
    assert schedule.timesteps == 4
    # the last step is noise-free and returns x0 itself
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_mean_x0[0] == 1 and schedule.posterior_mean_xt[0] == 0


def test_published_late_schedule() -> None:
    schedule = cosine_schedule(200)
    assert ddim_steps(200, 50) == list(range(1, 200, 4))
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(0.999745, abs=5e-7)
    assert float(schedule.betas[-1]) == 0.9999


@pytest.mark.parametrize("timesteps", [1, 2, 4, 50, 1000])
def test_schedule_of_any_length(timesteps: int) -> None:
    schedule = cosine_schedule(timesteps)
    assert (schedule.betas > 0).all() and (schedule.betas <= 0.9999).all()
    assert (schedule.alphas_cumprod.diff() < 0).all()
    # one step back from x_t = signal * x0 keeps the signal at the level of the step before
    before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]]).sqrt()
    mean = schedule.posterior_mean_x0 + schedule.posterior_mean_xt * schedule.alphas_cumprod.sqrt()
    torch.testing.assert_close(mean, before)


def test_noising_keeps_unit_variance() -> None:
    schedule = cosine_schedule(4)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 1, 40, 40, 40)
    x = q_sample(schedule, x0, torch.arange(4), noise)
    assert x.var(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1.0] * 4, abs=0.02)
    share = (x * x0).mean(dim=(1, 2, 3, 4)) / x0.square().mean(dim=(1, 2, 3, 4))
    assert share.tolist() == pytest.approx(schedule.alphas_cumprod.sqrt().tolist(), abs=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_x0_inverts_target(prediction) -> None:
    schedule = cosine_schedule(10)
    t = torch.tensor([0, 4, 9])
    x0, noise = torch.randn(2, 3, 8, 2, 3, 4, dtype=torch.float64)
    answer = target(schedule, x0, t, noise, prediction)
    x_t = q_sample(schedule, x0, t, noise)
    torch.testing.assert_close(to_x0(schedule, answer, x_t, t, prediction), x0)
    one = to_x0(schedule, answer[1:2], x_t[1:2], 4, prediction)
    torch.testing.assert_close(one, x0[1:2])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timesteps", [1, 4, 20])
def test_ddpm_with_a_network_that_knows_returns_the_truth(timesteps: int, prediction) -> None:
    schedule = cosine_schedule(timesteps)
    x0 = torch.rand(2, 8, 4, 4, 4) * 2 - 1
    noise = torch.randn(timesteps + 1, 2, 8, 4, 4, 4)
    cond = torch.zeros(2, 9, 4, 4, 4)
    found = ddpm_sample(oracle(schedule, x0, prediction), schedule, cond, noise, 1.0, prediction)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


def test_ddpm_clamps_x0_and_asks_every_step() -> None:
    schedule, asked = cosine_schedule(4), []

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (2,)
        asked.append(int(t[0]))
        return torch.full_like(x, 7.0)

    noise = torch.randn(5, 2, 8, 1, 1, 1)
    cond = torch.zeros(2, 9, 1, 1, 1)
    found = ddpm_sample(denoise, schedule, cond, noise, clamp=0.5, prediction="x0")
    assert asked == [3, 2, 1, 0] and torch.equal(found, torch.full_like(found, 0.5))
    free = ddpm_sample(denoise, schedule, cond, noise, clamp=None, prediction="x0")
    assert torch.equal(free, torch.full_like(free, 7.0))


@pytest.mark.parametrize(("timesteps", "steps", "kept"), [
    (4, 1, [3]), (4, 2, [0, 3]), (4, 3, [0, 2, 3]), (4, 4, [0, 1, 2, 3]), (200, 3, [0, 100, 199]),
])  # fmt: skip
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_in_fewer_steps_keeps_both_ends_and_tells_the_network_its_own_times(
    timesteps: int, steps: int, kept: list[int], prediction
) -> None:
    schedule, asked = cosine_schedule(timesteps), []
    x0, noise = torch.rand(2, 8, 4, 4, 4) * 2 - 1, torch.randn(steps + 1, 2, 8, 4, 4, 4)
    know = oracle(schedule, x0, prediction)

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return know(x, t, cond)

    cond = torch.zeros(2, 9, 4, 4, 4)
    found = ddpm_sample(denoise, schedule, cond, noise, 1.0, prediction, steps)
    assert asked == kept[::-1] == ddpm_steps(timesteps, steps)[::-1]
    torch.testing.assert_close(found, x0, atol=2e-4, rtol=0)


@pytest.mark.parametrize("steps", [50, 200])
def test_ddpm_of_gaussian_data_is_gaussian(steps: int) -> None:
    """For data ~ N(0, 1) the best noise prediction is known, so is the distribution sampled."""
    schedule = cosine_schedule(200)
    torch.manual_seed(0)

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x * (1 - schedule.alphas_cumprod[int(t[0])]).sqrt()

    noise = torch.randn(steps + 1, 1, 1, 20, 20, 20)
    cond = torch.zeros(1, 9, 20, 20, 20)
    found = ddpm_sample(denoise, schedule, cond, noise, clamp=None, steps=steps)
    assert float(found.mean()) == pytest.approx(0, abs=0.05)
    assert float(found.std()) == pytest.approx(1, abs=0.05)


def test_ddim_ends_at_the_published_noise_level() -> None:
    schedule = cosine_schedule(200)
    x0, noise = torch.rand(1, 8, 2, 2, 2) * 2 - 1, torch.randn(51, 1, 8, 2, 2, 2)
    cond, asked = torch.zeros(1, 9, 2, 2, 2), []
    know = oracle(schedule, x0, "noise")

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return know(x, t, cond)

    found = ddim_sample(denoise, schedule, cond, noise)
    assert asked == list(range(197, 0, -4))
    # deterministic: the noise it started from is in it all the way
    bar = float(schedule.alphas_cumprod[197])
    eps = (noise[0] - bar**0.5 * x0) / (1 - bar) ** 0.5
    last = 0.999745**0.5 * x0 + (1 - 0.999745) ** 0.5 * eps
    torch.testing.assert_close(found, last, atol=2e-4, rtol=0)
    assert torch.equal(found, ddim_sample(know, schedule, cond, noise[:1]))


@pytest.mark.parametrize(("timesteps", "steps"), [(4, 1), (4, 2), (8, 4), (20, 5)])
def test_ddim_leaves_no_noise_on_a_short_schedule(timesteps: int, steps: int) -> None:
    schedule = cosine_schedule(timesteps)
    x0, noise = torch.rand(1, 8, 2, 2, 2) * 2 - 1, torch.randn(1, 1, 8, 2, 2, 2)
    know = oracle(schedule, x0, "x0")
    cond = torch.zeros(1, 9, 2, 2, 2)
    found = ddim_sample(know, schedule, cond, noise, steps=steps, prediction="x0")
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_ddim_with_eta_1_and_every_step_is_ddpm(prediction, clamp) -> None:
    """Song et al. 2021, section 4.1."""
    schedule, noise = cosine_schedule(8), torch.randn(9, 2, 8, 2, 2, 2)
    cond = torch.zeros(2, 9, 2, 2, 2)

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.tanh(x * 0.3 + t.reshape(-1, 1, 1, 1, 1) * 0.1)

    args = (denoise, schedule, cond, noise)
    one = ddim_sample(*args, steps=8, eta=1.0, clamp=clamp, prediction=prediction)
    other = ddpm_sample(*args, clamp=clamp, prediction=prediction)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_samples_do_not_depend_on_their_batch() -> None:
    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(n) for n in numbers]

    before = torch.get_rng_state()
    batch = draw_noise((8, 2, 3, 4), 4, seeds(7, 8, 9))
    assert batch.shape == (5, 3, 8, 2, 3, 4) and batch.dtype == torch.float32
    assert torch.equal(batch[:, 1:2], draw_noise((8, 2, 3, 4), 4, seeds(8)))
    assert torch.equal(batch[:, [2, 0]], draw_noise((8, 2, 3, 4), 4, seeds(9, 7)))
    assert not torch.equal(batch[:, 0], batch[:, 1])
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_keeps_no_graph_and_works_in_float32() -> None:
    cond = torch.zeros(1, 9, 2, 2, 2, requires_grad=True)
    noise = torch.randn(5, 1, 8, 2, 2, 2, dtype=torch.float64)
    found = ddpm_sample(lambda x, t, c: (x * c[:, :8]).bfloat16(), cosine_schedule(4), cond, noise)
    assert not found.requires_grad and found.dtype == torch.float32


def test_bad_input_is_named() -> None:
    schedule, cond = cosine_schedule(4), torch.zeros(2, 9, 2, 2, 2)

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x

    for shape in [(4, 2, 8, 2, 2, 2), (6, 2, 8, 2, 2, 2), (5, 1, 8, 2, 2, 2), (5, 2, 8, 2, 2, 3)]:
        with pytest.raises(ValueError, match="noise must be"):
            ddpm_sample(denoise, schedule, cond, torch.zeros(shape))
    with pytest.raises(ValueError, match="noise must be"):
        ddim_sample(denoise, schedule, cond, torch.zeros(1, 2, 8, 2, 2, 2), steps=4, eta=0.5)
    for steps in (0, 3, 8):
        with pytest.raises(ValueError, match="steps must divide"):
            ddim_steps(4, steps)
        with pytest.raises(ValueError, match="from 1 to"):
            ddpm_steps(2, steps)
    for timesteps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="timesteps must be"):
            cosine_schedule(timesteps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prediction must be"):
        ddpm_sample(denoise, schedule, cond, torch.zeros(5, 2, 8, 2, 2, 2), prediction="eps")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8, 2, 2, 2), (8, 16, 16, 16), (8, 1, 1, 3), (3, 1, 1, 1)])
@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_a_last_draw_of_zeros_leaves_the_others_as_they_are(shape, steps) -> None:
    whole, part = (
        draw_noise(shape, steps, [torch.Generator().manual_seed(s) for s in (0, 1)], last=last)
        for last in (True, False)
    )
    left_out = steps > 0 and math.prod(shape) % 16 == 0
    assert whole.shape == part.shape == (steps + 1, 2, *shape) and whole[-1].all()
    assert torch.equal(part[:steps], whole[:steps])
    assert torch.equal(part[-1], torch.zeros_like(part[-1]) if left_out else whole[-1])


def test_the_last_draw_adds_nothing() -> None:
    schedule, cond = cosine_schedule(4), torch.zeros(2, 9, 2, 2, 2)
    noise = torch.randn(5, 2, 8, 2, 2, 2)
    without = torch.cat([noise[:4], torch.zeros_like(noise[:1])])

    def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x.sin() + t[:, None, None, None, None]

    whole, part = (ddpm_sample(denoise, schedule, cond, given) for given in (noise, without))
    assert torch.equal(whole, part)


def test_samples_that_share_one_stream_are_drawn_as_ever() -> None:
    generator, cond = tiny_generator(), torch.zeros(2, 9, 16, 16, 16)
    stream = torch.Generator().manual_seed(3)
    noise = torch.cat([draw_noise((8, 16, 16, 16), 4, [stream]) for _ in range(2)], dim=1)
    found = generator.sample(cond, torch.Generator().manual_seed(3))
    assert torch.equal(found, generator.sample(cond, noise))


# -- zero terminal SNR ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 200])
def test_zero_terminal_snr_leaves_no_signal_at_the_end_and_the_first_step_alone(steps):
    plain, zero = cosine_schedule(steps), cosine_schedule(steps, zero_terminal_snr=True)
    assert float(zero.alphas_cumprod[-1]) == 0.0
    assert float(zero.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]))
    assert bool((zero.alphas_cumprod.diff() < 0).all())
    for values in (zero.betas, zero.posterior_mean_x0, zero.posterior_variance):
        assert bool(values.isfinite().all())


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_perfect_network_samples_its_x0_from_pure_noise(prediction):
    schedule = cosine_schedule(4, zero_terminal_snr=True)
    x0 = torch.randn(1, 8, 4, 4, 4).clamp(-1, 1)

    def perfect(x, t, cond):
        noise = (x - schedule.alphas_cumprod[t].sqrt() * x0) / (
            1 - schedule.alphas_cumprod[t]
        ).sqrt()
        return target(schedule, x0, t, noise.float(), prediction).float()

    noise = torch.randn(5, 1, 8, 4, 4, 4)
    made = ddpm_sample(perfect, schedule, torch.zeros(1, 9, 4, 4, 4), noise, prediction=prediction)
    assert torch.allclose(made, x0, atol=1e-4)
