from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tumorsynth.models.attention import (
    Attention,
    RelativePositionBias,
    Rotary,
    SpatialLinearAttention,
    rotate,
)
from tumorsynth.models.unet import FactorizedUNet, UNetConfig

SMALL = UNetConfig(dim=8, multipliers=(1, 2), heads=2, head_dim=8, groups=4, rotary_dim=8)


def inputs(config: UNetConfig, *size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    b, *space = size
    return (
        torch.randn(b, config.out_channels, *space),
        torch.randn(b, config.cond_channels, *space),
    )


def test_published_size() -> None:
    net = FactorizedUNet()
    assert sum(p.numel() for p in net.parameters()) == 6_018_576
    assert net.first.weight.shape == (24, 17, 1, 7, 7)
    assert net.config.size_multiple == 8


def test_shape_is_kept_for_any_depth() -> None:
    net = FactorizedUNet(SMALL)
    for space in [(1, 2, 4), (5, 4, 2), (9, 6, 6)]:
        x, cond = inputs(SMALL, 2, *space)
        assert net(x, 3, cond).shape == x.shape


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    net = FactorizedUNet(SMALL)
    x, cond = inputs(SMALL, 3, 4, 4, 4)
    t = torch.tensor([0, 2, 3])
    batch = net(x, t, cond)
    for i in range(3):
        torch.testing.assert_close(net(x[i : i + 1], int(t[i]), cond[i : i + 1])[0], batch[i])


def test_the_step_and_the_conditioning_matter() -> None:
    net = FactorizedUNet(SMALL)
    x, cond = inputs(SMALL, 1, 4, 4, 4)
    assert not torch.allclose(net(x, 0, cond), net(x, 1, cond))
    assert not torch.allclose(net(x, 0, cond), net(x, 0, -cond))


def test_gradients_reach_every_parameter() -> None:
    net = FactorizedUNet(SMALL)
    x, cond = inputs(SMALL, 2, 3, 4, 4)
    net(x, torch.tensor([0, 1]), cond).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_autocast_is_close() -> None:
    net = FactorizedUNet(SMALL)
    x, cond = inputs(SMALL, 1, 4, 4, 4)
    exact = net(x, 1, cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(x, 1, cond)
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def test_relative_position_buckets() -> None:
    buckets = RelativePositionBias(32, 8, 32).buckets(48, torch.device("cpu"))
    before, after = buckets[40].flip(0)[7:], buckets[0]  # distances 0, 1, ... to either side
    # one bucket a distance up to 7, then logarithmic, all that is 32 or further in the last one
    golden = [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12]
    assert before[: len(golden)].tolist() == golden
    assert (after[1 : len(golden)] - 16).tolist() == golden[1:]
    assert before[32:].unique().tolist() == [15] and after[32:].unique().tolist() == [31]
    assert buckets.diagonal().unique().tolist() == [0]


def test_rotation_keeps_length_and_sees_relative_position_only() -> None:
    table = Rotary(8).table(10)
    q, k = torch.randn(2, 1, 8).expand(2, 10, 8)
    turned_q, turned_k = rotate(q, table), rotate(k, table)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = turned_q @ turned_k.T
    for offset in range(-9, 10):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0  # but position does matter
    torch.testing.assert_close(turned_q[0], q[0])


def test_rotation_leaves_the_channels_beyond_its_own() -> None:
    x = torch.randn(3, 5, 12)
    turned = rotate(x, Rotary(8).table(5))
    assert torch.equal(turned[..., 8:], x[..., 8:]) and not torch.equal(turned[..., :8], x[..., :8])


def test_depth_attention_is_the_written_formula() -> None:
    """q scaled, then q and k rotated by pairs, then bias, softmax: step by step as published."""
    torch.manual_seed(0)
    attention = Attention(8, SMALL.heads, SMALL.head_dim)
    bias = RelativePositionBias(SMALL.buckets, SMALL.heads, SMALL.max_distance)(6)
    x = torch.randn(1, 6, 8)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    q, k, v = (normed @ attention.to_qkv.weight.T).reshape(6, 3, 2, 8).permute(1, 2, 0, 3)
    frequencies = Rotary(8).frequencies

    def turn(y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        for position in range(6):
            for pair in range(4):
                angle = position * float(frequencies[pair])
                a, b = y[:, position, 2 * pair], y[:, position, 2 * pair + 1]
                out[:, position, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                out[:, position, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    logits = turn(q * 8**-0.5) @ turn(k).transpose(1, 2) + bias[0]
    expected = (logits.softmax(-1) @ v).transpose(0, 1).reshape(6, 16) @ attention.to_out.weight.T
    torch.testing.assert_close(attention(x, bias, Rotary(8).table(6))[0], expected)


def test_linear_attention_keeps_slices_apart() -> None:
    attention = SpatialLinearAttention(8, SMALL.heads, SMALL.head_dim)
    x = torch.randn(1, 8, 4, 3, 3)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(attention(x)[:, :, order], attention(x[:, :, order]))
    turned = x.transpose(3, 4)  # it has no notion of position within a slice either
    torch.testing.assert_close(attention(x).transpose(3, 4), attention(turned))


@pytest.mark.parametrize(
    ("x", "cond", "t", "rule"),
    [
        ((1, 7, 4, 4, 4), (1, 9, 4, 4, 4), 0, "x_t must be"),
        ((1, 8, 4, 4, 4), (1, 9, 4, 4, 6), 0, "x_t must be"),
        ((1, 8, 4, 4, 4), (2, 9, 4, 4, 4), 0, "x_t must be"),
        ((8, 4, 4, 4), (9, 4, 4, 4), 0, "x_t must be"),
        ((1, 8, 4, 4, 5), (1, 9, 4, 4, 5), 0, "multiples of 2"),
        ((1, 8, 4, 4, 4), (1, 9, 4, 4, 4), 0.5, "t must be one integer"),
        ((2, 8, 4, 4, 4), (2, 9, 4, 4, 4), torch.zeros(3, dtype=torch.long), "t must be one"),
    ],
)
def test_bad_input_is_named(x: tuple, cond: tuple, t: float | Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        FactorizedUNet(SMALL)(torch.zeros(x), t, torch.zeros(cond))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 20},
        {"multipliers": ()},
        {"in_channels": 8},
        {"rotary_dim": 64},
        {"rotary_dim": 7},
        {"buckets": 6},
        {"max_distance": 8},
    ],
)
def test_impossible_configurations_are_named(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        UNetConfig(**change)


def test_a_configuration_read_from_json_is_equal() -> None:
    assert UNetConfig(multipliers=[1, 2, 4, 8]) == UNetConfig()  # type: ignore[arg-type]
