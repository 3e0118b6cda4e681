"""The codebook in training: moving average, restart, resume, several processes, memory."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.codebook import Codebook


def latents(seed: int, batch: int = 2, side: int = 4, dim: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, side, side, side, generator=rng)


def placed(embeddings: list[list[float]]) -> Codebook:
    """A codebook in training whose codes are at these points."""
    codebook = Codebook(len(embeddings), len(embeddings[0]))
    codebook.embeddings.copy_(torch.tensor(embeddings))
    codebook.initialised.fill_(True)
    return codebook.train()


def at(points: list[list[float]]) -> Tensor:
    """Points as a latent, (1, dim, n, 1, 1)."""
    return torch.tensor(points).T[None, :, :, None, None].contiguous()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_first_update_moves_a_code_to_what_it_saw_and_no_other():
    codebook = placed([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    codebook(at([[1.0, 2.0], [3.0, 0.0], [9.0, 1.0]]))
    expected = torch.tensor([[2.0, 1.0], [9.0, 1.0], [0.0, 10.0]])
    torch.testing.assert_close(codebook.embeddings, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(codebook.embeddings[2], expected[2])


def test_a_code_never_used_stays_where_it_is_for_good():
    codebook = placed([[0.0, 0.0], [100.0, -50.0]])
    for seed in range(300):
        codebook(0.1 * latents(seed, side=2, dim=2))
    assert torch.equal(codebook.embeddings[1], torch.tensor([100.0, -50.0]))
    assert codebook.embeddings[0].norm() < 0.1


def test_a_code_no_longer_used_stays_where_it_was():
    codebook = Codebook(2, 1, decay=0.9).train()
    codebook.embeddings.copy_(torch.tensor([[0.0], [5.0]]))
    codebook.initialised.fill_(True)
    codebook(at([[0.0], [5.5]]))
    for _ in range(1000):
        codebook(at([[0.0]]))
    assert codebook.counts[1] < 1e-38  # next to nothing of a float32 is left
    torch.testing.assert_close(codebook.embeddings[1], torch.tensor([5.5]))


def test_codes_are_the_weighted_mean_of_what_they_saw():
    codebook = placed([[-5.0], [5.0]])
    values = [4.0, 6.0, 5.0, 7.0]
    for value in values:
        codebook(at([[value], [value], [-5.0]]))
    weights = [codebook.decay ** (len(values) - 1 - k) for k in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert codebook.embeddings[1].item() == pytest.approx(expected, rel=1e-5)
    # bias-corrected, the counts are the voxels per update from the first update on
    torch.testing.assert_close(codebook._corrected()[0], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("chunk", [1, 7, 128, 4096])
def test_nearest_is_the_brute_force_argmin(chunk: int):
    codebook = Codebook(50, 3)
    latent = latents(1)
    flat = latent.movedim(1, -1).reshape(-1, 3).double()
    expected = torch.cdist(flat, codebook.embeddings.double()).argmin(1)
    assert torch.equal(codebook.nearest(latent, chunk).flatten(), expected)


def test_what_follows_from_the_codes_is_kept_until_they_change():
    codebook, latent = placed([[0.0, 1.0, 0.0], [5.0, 5.0, 5.0]]).eval(), latents(0)
    first = codebook.derived()
    assert codebook.nearest(latent).sum() == 0 and codebook.derived() is first
    with torch.inference_mode():
        assert codebook.derived() is first
    state = {name: value.clone() for name, value in codebook.state_dict().items()}
    for change in (
        lambda: codebook.embeddings.neg_(),
        lambda: codebook.embeddings.__setitem__(0, 9.0),
        lambda: codebook.load_state_dict(state),
        lambda: codebook.load_state_dict(state, assign=True),
        lambda: codebook.double(),
        lambda: setattr(codebook, "embeddings", codebook.embeddings + 1),
    ):
        before = codebook.derived()
        change()
        found, codes = codebook.derived(), codebook.embeddings
        assert found is not before
        assert torch.equal(found.away, -codes) and float(found.highest) == float(codes.max())
        assert torch.equal(found.half_norm, codes.square().sum(1) / 2)
        assert float(found.lowest) == float(codes.min())


def test_training_keeps_nothing_of_the_codes():
    codebook = placed([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    for seed in range(3):
        codebook(latents(seed))
        assert codebook._kept is None
        assert torch.equal(codebook.derived().away, -codebook.embeddings)
    codebook.eval().nearest(latents(0))
    copied = pickle.loads(pickle.dumps(codebook))
    assert codebook._kept is not None and copied._kept is None
    assert torch.equal(copied.nearest(latents(1)), codebook.nearest(latents(1)))


def test_autocast_does_not_change_the_codes():
    torch.manual_seed(0)
    codebook = Codebook(4096, 8)
    latent = latents(2, side=8, dim=8)
    expected = codebook.nearest(latent)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.nearest(latent), expected)


class Largest(TorchDispatchMode):
    """The largest tensor any operator makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_voxels_times_all_codes_is_ever_made():
    codebook, latent = Codebook(512, 4).train(), latents(0, batch=1, side=26, dim=4)
    voxels = latent[0, 0].numel()
    with Largest() as one_hot:
        torch.nn.functional.one_hot(torch.zeros(voxels, dtype=torch.long), 512)
    assert one_hot.elements == voxels * 512  # so the measure sees what it has to
    for call in (codebook, codebook.nearest, codebook.restart_dead):
        with Largest() as largest:
            call(latent)
        assert largest.elements <= 4096 * 512 < voxels * 512 / 4


def test_initial_codes_are_drawn_from_the_first_batch_and_from_the_generator_alone():
    latent = 3 + latents(0)
    first, second, other = (Codebook(20, 3).train() for _ in range(3))
    state = torch.get_rng_state()
    first(latent, rng(1))
    torch.manual_seed(123)
    second(latent, rng(1))
    other(latent, rng(2))
    torch.set_rng_state(state)
    assert torch.equal(first.embeddings, second.embeddings)
    assert not torch.equal(first.embeddings, other.embeddings)
    assert first.initialised and (first.embeddings - 3).abs().max() < 4.5


def test_the_gradient_passes_straight_through():
    codebook = Codebook(8, 3).train()
    latent = latents(0).requires_grad_()
    quantised, codes = codebook(latent, rng())
    weight = torch.randn(quantised.shape)
    (quantised * weight).sum().backward()
    assert latent.grad is not None and torch.equal(latent.grad, weight)
    with torch.no_grad():  # what is decoded is a code (the one before this update)
        again = Codebook(8, 3).train()
        again._place_codes(torch.ones(8, dtype=torch.bool), latent, rng())
    torch.testing.assert_close(quantised.detach(), again.lookup(codes))


def test_evaluation_learns_nothing():
    codebook = Codebook(8, 3).train()
    codebook(latents(0), rng())
    before = {k: v.clone() for k, v in codebook.state_dict().items()}
    codebook.eval()
    quantised, codes = codebook(latents(1))
    assert torch.equal(quantised, codebook.lookup(codes))
    assert all(torch.equal(v, before[k]) for k, v in codebook.state_dict().items())


def test_restart_moves_dead_codes_to_the_latents_and_leaves_the_living():
    codebook = placed([[0.0, 0.0], [50.0, 50.0], [1.0, 1.0], [-80.0, 0.0]])
    for _ in range(100):
        codebook(at([[0.0, 0.1], [1.0, 1.1]]))
    living = codebook.embeddings[[0, 2]].clone()
    here = 7 + 0.5 * latents(0, dim=2)
    assert codebook.restart_dead(here, generator=rng()) == 2
    assert torch.equal(codebook.embeddings[[0, 2]], living)
    voxels = here.movedim(1, -1).reshape(-1, 2)
    distance = torch.cdist(codebook.embeddings[[1, 3]], voxels).amin(1)
    assert (distance < 0.05).all()
    # not dead at once, nor after a while unused: it gets its time
    assert codebook.restart_dead(here) == 0
    for _ in range(100):
        codebook(at([[0.0, 0.1], [1.0, 1.1]]))
    assert codebook.restart_dead(here) == 0
    # and in use, it follows what it sees from where it was put
    codebook(at([[7.0, 7.0]]))
    assert torch.isfinite(codebook.embeddings).all()
    assert (codebook.embeddings[[1, 3]] - 7).norm(dim=1).max() < 3


def test_restart_obeys_its_threshold_and_its_generator():
    def trained() -> Codebook:
        codebook = placed([[0.0], [10.0], [20.0]])
        codebook(at([[0.0]] * 6 + [[10.0]] * 2 + [[20.0]]))
        return codebook

    latent = latents(0, dim=1)
    assert [trained().restart_dead(latent, t) for t in (0.5, 1.5, 2.5, 7.0)] == [0, 1, 2, 3]
    codebooks = [trained() for _ in range(3)]
    for codebook, seed in zip(codebooks, (1, 1, 2), strict=True):
        codebook.restart_dead(latent, 2.5, rng(seed))
    first, second, other = (c.embeddings for c in codebooks)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_restart_draws_nothing_where_no_code_is_dead_or_before_training():
    codebook = placed([[0.0], [10.0]])
    state = torch.get_rng_state()
    before = codebook.embeddings.clone()
    assert codebook.restart_dead(latents(0, dim=1)) == 0  # no update yet
    codebook(at([[0.0], [10.0]]))
    assert codebook.restart_dead(latents(0, dim=1)) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(codebook.embeddings, before)


def test_restarts_bring_a_collapsed_codebook_back():
    def run(restart: bool) -> tuple[float, float]:
        codebook = placed((torch.tensor([[40.0, 40.0]]) + torch.randn(64, 2)).tolist())
        generator = rng()
        for step in range(60):
            latent = latents(step, dim=2)
            quantised, _ = codebook(latent)
            if restart and step % 10 == 9:
                codebook.restart_dead(latent, generator=generator)
        return float((quantised - latent).square().mean()), codebook.usage().perplexity

    torch.manual_seed(0)
    (collapsed, few), (restarted, many) = run(False), run(True)
    assert few < 5 and many > 25
    assert restarted < 0.1 * collapsed


def test_training_resumed_from_its_state_goes_on_identically():
    def train(codebook: Codebook, steps: range) -> None:
        for step in steps:
            codebook(latents(step), rng(step))
            if step % 4 == 3:
                codebook.restart_dead(latents(step), 1.5, rng(step))

    straight, killed, resumed = (Codebook(32, 3).train() for _ in range(3))
    train(straight, range(12))
    train(killed, range(6))
    resumed.load_state_dict(killed.state_dict())
    train(resumed, range(6, 12))
    state = resumed.state_dict()
    assert set(state) == {"embeddings", "counts", "sums", "updates", "initialised"}
    assert all(torch.equal(v, state[k]) for k, v in straight.state_dict().items())


def test_usage_counts_the_codes_in_use():
    codebook = placed([[0.0], [10.0], [20.0], [30.0]])
    assert codebook.usage() == (1.0, 0.0)
    assert codebook.usage(torch.tensor([0, 1, 2, 3])) == pytest.approx((4.0, 1.0))
    assert codebook.usage(torch.tensor([[2, 2], [2, 2]])) == pytest.approx((1.0, 0.25))
    codebook(at([[0.0], [10.0]]))
    assert codebook.usage() == pytest.approx((2.0, 0.5))


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(60), 2, rank)
    try:
        codebook = Codebook(16, 3).train()
        codebook.embeddings += rank  # they start apart
        for step in range(4):
            # the second process has one sample fewer: nothing may rely on equal shares
            codebook(latents(step, batch=5)[3 * rank :][:3], rng(step + 100 * rank))
        moved = codebook.restart_dead(latents(9, batch=5)[3 * rank :][:3], 25.0, rng(rank))
        torch.save((codebook.state_dict(), moved), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_hold_the_codebook_of_one_with_the_whole_batch(tmp_path: Path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    other = mp.get_context("spawn").Process(target=_process, args=(1, str(tmp_path)))
    other.start()
    _process(0, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    alone = Codebook(16, 3).train()
    for step in range(4):
        alone(latents(step, batch=5), rng(step))
    moved = alone.restart_dead(latents(9, batch=5), 25.0, rng(0))
    (first, moved_first), (second, moved_second) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert 0 < moved == moved_first == moved_second
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)  # sums in another order


def autoencoder(codes: int) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        AutoencoderConfig(
            patch=2,
            encoder_widths=(8, 16),
            decoder_widths=(16, 8),
            decoder_blocks=1,
            codes=codes,
            groups=4,
            padding="zeros",
        )
    )


@pytest.mark.parametrize("codes", [0, 32])
def test_an_autoencoder_learns_through_its_codes(codes: int):
    model, x = autoencoder(codes).train(), 0.1 * latents(0, side=16, dim=1)
    recon, latent, quantised = model.reconstruct(x)
    assert recon.shape == x.shape and quantised.shape == latent.shape
    recon.square().mean().backward()
    stem = model.encoder.stem.conv.weight
    assert stem.grad is not None and stem.grad.abs().max() > 0
    if model.codebook is not None:
        assert model.codebook.updates == 1 and not torch.equal(latent, quantised)
    else:
        assert quantised is latent
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.reconstruct(x)[0], model(x), rtol=0, atol=0)
