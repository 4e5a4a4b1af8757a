"""Rotation in place equals the plain path: values and gradients; it writes over nothing that counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import randn
from vit2dpe import Attention, Dims, Positions, Rotation, Signal, build
from vit2dpe.attention import functional as core
from vit2dpe.attention.functional import split_heads
from vit2dpe.attention.kernels import rotary
from vit2dpe.encodings.base import interleave

B, H, DIM, GRID, PREFIX = 3, 2, 16, (2, 5), 1
N = GRID[0] * GRID[1] + PREFIX
AT = Positions.grid(GRID).with_prefix(PREFIX)


def turn(kind="shared", dtype=torch.float32, seed=0):
    """One angle for all heads and samples, or one for each."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = {"shared": (1, 1), "heads": (1, H), "samples": (B, 1), "both": (B, H)}[kind]
    angle = torch.randn(batch, heads, N, DIM // H // 2, generator=generator, dtype=torch.float64)
    return interleave(angle.cos().to(dtype), angle.sin().to(dtype))


def packed(dtype=torch.float32, seed=1):
    return randn(B, N, 3 * DIM, seed=seed, dtype=torch.float64).to(dtype)


def both(qkv, rotation):
    """(in place, plain): q, k, v and the gradients to qkv, cos and sin of one weighted sum of them."""
    weights = randn(3, B, H, N, DIM // H, seed=2, dtype=torch.float64)
    results = []
    for private in (True, False):
        source = qkv.clone().requires_grad_()
        angle = [part.detach().clone().requires_grad_() for part in rotation]
        signal = Signal(q_rotation=(own := Rotation(*angle)), k_rotation=own)
        q, k, v, rest = split_heads(source * 1.0, signal, H, private=private)
        assert (rest.q_rotation is None) == private
        if not private:
            q, k = core.rotate(q, own), core.rotate(k, own)
        sum((w * part).sum() for w, part in zip(weights.to(qkv.dtype), (q, k, v), strict=True)).backward()
        along = -rotation.sin * angle[0].grad + rotation.cos * angle[1].grad  # what an angle behind them receives
        results.append([q, k, v, source.grad, along])
    return zip(*results, strict=True)


@pytest.mark.parametrize("kind", ["shared", "heads", "samples", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_the_plain_path(kind, dtype):
    for fast, plain in both(packed(dtype), turn(kind, dtype)):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32_and_rounded_once(dtype):
    for (fast, plain), name in zip(both(packed(dtype), turn("heads")), ("q", "k", "v", "qkv", "angle"), strict=True):
        if name == "angle":  # from rounded outputs here, from unrounded ones there
            torch.testing.assert_close(fast, plain, rtol=0.05, atol=0.05)
        else:
            torch.testing.assert_close(fast, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_and_their_gradients_against_finite_differences():
    angle = torch.randn(1, H, N, DIM // H // 2, dtype=torch.float64, requires_grad=True)

    def forward(qkv, angle):
        own = Rotation(angle.cos(), angle.sin())
        q, k, v, _ = split_heads(qkv * 1.0, Signal(q_rotation=own, k_rotation=own), H, private=True)
        return (q * k).sum(-1) + v.square().sum(-1)

    qkv = packed(torch.float64)[:1].requires_grad_()
    assert torch.autograd.gradcheck(forward, (qkv, angle))
    assert torch.autograd.gradgradcheck(forward, (qkv, angle))


def test_gradients_of_any_stride_are_taken():
    source = packed().requires_grad_()
    own = turn()
    q, k, v, _ = split_heads(source * 1.0, Signal(q_rotation=own, k_rotation=own), H, private=True)
    (q.sum() + k.transpose(-1, -2).contiguous().square().sum() + v[..., ::2].sum()).backward()
    expected = packed().requires_grad_()
    q, k, v, _ = split_heads(expected * 1.0, Signal(), H)
    q, k = core.rotate(q, own), core.rotate(k, own)
    (q.sum() + k.square().sum() + v[..., ::2].sum()).backward()
    torch.testing.assert_close(source.grad, expected.grad, rtol=1e-5, atol=1e-5)


def module(seed=0):
    torch.manual_seed(seed)
    return Attention(DIM, H)


def signal(word="rope"):
    return build(word, Dims(DIM, H, GRID))(AT)


def plainly(layer, x, *args):
    """The same forward with the output of `qkv` declared somebody else's."""
    layer._qkv_is_private = lambda: False
    try:
        return layer(x, *args)
    finally:
        del layer._qkv_is_private


def used(monkeypatch, run):
    """How often the in-place path was taken while running."""
    calls, original = [], rotary.split_and_rotate
    monkeypatch.setattr(rotary, "split_and_rotate", lambda *args: calls.append(1) or original(*args))
    run()
    return len(calls)


def test_whole_attention_is_the_same_with_and_without(monkeypatch):
    layer, x = module(), torch.randn(B, N, DIM)
    assert used(monkeypatch, lambda: layer(x, signal())) == 1
    torch.testing.assert_close(layer(x, signal()), plainly(layer, x, signal()), rtol=1e-6, atol=1e-6)


def test_who_keeps_the_output_of_qkv_keeps_its_values(monkeypatch):
    layer, x, kept = module(), torch.randn(B, N, DIM), []
    handle = layer.qkv.register_forward_hook(lambda *args: kept.append(args[-1]))
    assert used(monkeypatch, lambda: layer(x, signal())) == 0
    torch.testing.assert_close(kept[0], layer.qkv(x))
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert used(monkeypatch, lambda: layer(x, signal())) == 0
    finally:
        everywhere.remove()


def test_a_projection_of_another_kind_is_left_alone(monkeypatch):
    """Tanh keeps its output for its backward: written over, its gradient would be wrong."""
    layer, x = module(), torch.randn(B, N, DIM)
    layer.qkv = nn.Sequential(layer.qkv, nn.Tanh())
    assert used(monkeypatch, lambda: layer(x, signal()).sum().backward()) == 0


def test_queries_and_keys_of_different_places_take_the_plain_path(monkeypatch):
    layer, x = module(), torch.randn(B, N, DIM)
    one = signal()
    assert used(monkeypatch, lambda: layer(x, one._replace(k_rotation=turn()))) == 0


@pytest.mark.parametrize("word", ["rope", "rope_mixed"])
def test_recomputing_a_checkpoint_gives_the_same_gradients(word):
    layer, position, x = module(), build(word, Dims(DIM, H, GRID)), torch.randn(B, N, DIM)
    grads = []
    for run in (layer, lambda x, s: checkpoint(layer, x, s, use_reentrant=False)):
        layer.zero_grad()
        run(x, position(AT)).square().sum().backward()
        grads.append(layer.qkv.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_autocast_takes_it_too(monkeypatch):
    layer, x = module(), torch.randn(B, N, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        assert used(monkeypatch, lambda: layer(x, signal())) == 1
        fast, plain = layer(x, signal()), plainly(layer, x, signal())
    torch.testing.assert_close(fast, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, on its first jvp
def test_function_transforms_take_the_plain_path(monkeypatch):
    own = signal()

    def rotated(qkv):
        q, k, _, rest = split_heads(qkv * 1.0, own, H, private=True)
        if rest.q_rotation is not None:
            q, k = core.rotate(q, rest.q_rotation), core.rotate(k, rest.k_rotation)
        return q * k

    x = packed()
    separately = torch.func.vmap(lambda sample: rotated(sample[None]))(x)[:, 0]
    torch.testing.assert_close(separately, rotated(x))
    _, along = torch.func.jvp(rotated, (x,), (torch.ones_like(x),))
    step = 1e-3
    torch.testing.assert_close(along, (rotated(x + step) - rotated(x - step)) / (2 * step), rtol=1e-3, atol=1e-2)
