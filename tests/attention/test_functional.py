"""rotate is complex multiplication that keeps norms and dtypes; attend has right gradients; Attention is timm's."""

from __future__ import annotations

from functools import partial

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import randn
from vit2dpe import Attention, Positions, Rotation, Signal, attend, rotate
from vit2dpe.signal import Dense, LowRank, Table

N, WIDTH = 3, 4
SIZE = N * WIDTH
values = st.lists(st.floats(-10, 10), min_size=SIZE, max_size=SIZE)
angles = st.lists(st.floats(-1000, 1000), min_size=SIZE // 2, max_size=SIZE // 2)


def rotation(numbers, dtype=torch.float32):
    angle = torch.tensor(numbers, dtype=torch.float64).view(1, 1, N, WIDTH // 2)
    return Rotation(angle.cos().to(dtype), angle.sin().to(dtype))


@settings(deadline=None, max_examples=100)
@given(values, angles)
def test_rotate_is_complex_multiplication_of_neighbours(x, angle):
    x = torch.tensor(x, dtype=torch.float64).view(1, 1, N, WIDTH)
    turn = rotation(angle, torch.float64)
    product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(*turn)
    torch.testing.assert_close(rotate(x, turn), torch.view_as_real(product).flatten(-2), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(values, angles)
def test_rotate_keeps_norms(x, angle):
    x = torch.tensor(x).view(1, 1, N, WIDTH)
    torch.testing.assert_close(rotate(x, rotation(angle)).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotate_keeps_the_dtype_and_rounds_once(dtype):
    x = randn(2, 5, N, WIDTH, dtype=torch.float64).to(dtype)
    turn = rotation(torch.linspace(0, 50, SIZE // 2).tolist())
    ours = rotate(x, turn)
    exact = rotate(x.double(), Rotation(*(part.double() for part in turn)))
    assert ours.dtype == dtype
    # Half a unit in the last place of the result, and what float32 arithmetic adds: no second rounding.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + (0 if dtype == torch.float64 else 1e-6)
    assert bool(((ours.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_attend_keeps_the_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, N, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    turn = rotation([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    signal = Signal(q_rotation=turn, k_rotation=turn, bias=(Dense(torch.randn(1, 2, N, N, generator=generator)),))
    ours = attend(q, k, v, signal)
    exact = attend(q.double(), k.double(), v.double(), signal)
    assert ours.dtype == dtype
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-6, torch.float64: 0.0}[dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_timms_with_the_same_weights(qkv_bias, qk_norm):
    torch.manual_seed(0)
    theirs = timm.layers.Attention(
        24, num_heads=3, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Attention(24, 3, qkv_bias=qkv_bias, qk_norm=qk_norm)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 7, 24)
    a, b = ours(x), theirs(x)
    assert float(b.detach().std()) > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for out in (a, b):
        out.sin().sum().backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-4, atol=1e-5)


def test_attention_takes_a_signal_and_a_mask():
    torch.manual_seed(0)
    layer, x = Attention(8, 2), torch.randn(2, 5, 8)
    bias = torch.randn(1, 2, 5, 5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    q, k, v = layer.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 2 + bias).masked_fill(~mask, float("-inf")).softmax(-1)
    reference = layer.proj((weights @ v).transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(layer(x, Signal(bias=(Dense(bias),)), mask), reference, rtol=0, atol=1e-6)


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    layer, x = Attention(8, 2, attn_drop=0.5), torch.randn(2, 5, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="dim=10, heads=4"):
        Attention(10, 4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [None, 1.7])
def test_gradients_through_attend(masked, temperature):
    torch.manual_seed(0)
    at_q, at_k = Positions.grid((1, 3)), Positions.grid((2, 3)).take(torch.tensor([0, 4, 5, 2]))
    q, k, v = (torch.randn(2, 2, n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    fq, fk = (torch.randn(1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    w = torch.randn(2, 1, WIDTH // 2, dtype=torch.float64, requires_grad=True)  # learned frequencies
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool) if masked else None

    def turn(at, w):
        angle = torch.einsum("bnd,dhp->bhnp", at.coords.double(), w)
        return Rotation(angle.cos(), angle.sin())

    def run(q, k, v, bias, table, fq, fk, w):
        terms = (Dense(bias), Table(table, at_q, at_k), LowRank(fq, fk))
        signal = Signal(q_rotation=turn(at_q, w), k_rotation=turn(at_k, w), bias=terms, temperature=temperature)
        return attend(q, k, v, signal, mask)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, table, fq, fk, w))
