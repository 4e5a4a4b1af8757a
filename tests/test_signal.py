"""Signals add: tokens sum, rotations multiply as complex numbers, biases concatenate, temperatures multiply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import randn
from vit2dpe import Positions, Rotation, Signal, attend, rotate
from vit2dpe.encodings.base import rotation_of
from vit2dpe.encodings.linear import LinearAngles
from vit2dpe.signal import Dense, LowRank, Table

N, WIDTH, HEADS = 3, 4, 2
angles = st.lists(st.floats(-100, 100), min_size=N * WIDTH // 2, max_size=N * WIDTH // 2)


def rotation(values):
    angle = torch.tensor(values, dtype=torch.float64).view(1, 1, N, WIDTH // 2)
    return Rotation(angle.cos(), angle.sin())


@st.composite
def signals(draw):
    """Any of the fields, whole numbers where a float sum would round."""
    maybe = st.booleans()
    number = st.integers(-9, 9)
    q, k = (rotation(draw(angles)) if draw(maybe) else None for _ in range(2))
    return Signal(
        token=torch.full((1, N, 2), float(draw(number))) if draw(maybe) else None,
        q_rotation=q,
        k_rotation=k,
        bias=tuple(Dense(torch.full((1, HEADS, N, N), float(draw(number)))) for _ in range(draw(st.integers(0, 2)))),
        temperature=draw(st.sampled_from([None, 0.5, 1.0, 2.0])),
    )


def same(a, b):
    for x, y in zip(a.bias, b.bias, strict=True):
        assert x is y
    assert a.temperature == b.temperature
    for x, y in ((a.token, b.token), (a.q_rotation, b.q_rotation), (a.k_rotation, b.k_rotation)):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(signals(), signals(), signals())
def test_addition_is_associative(a, b, c):
    same((a + b) + c, a + (b + c))


@settings(deadline=None, max_examples=50)
@given(signals())
def test_the_empty_signal_is_neutral(a):
    same(Signal() + a, a)
    same(a + Signal(), a)


def test_the_empty_signal_asks_nothing():
    assert Signal() == (None, None, None, (), None, (), ())
    x = randn(1, HEADS, N, WIDTH)
    assert torch.equal(attend(x, x, x, Signal()), attend(x, x, x))


def test_fields_add_each_in_its_way():
    one, two = (Dense(torch.full((1, HEADS, N, N), value)) for value in (1.0, 2.0))
    a = Signal(token=torch.ones(1, N, 2), bias=(one,), temperature=3.0)
    b = Signal(token=torch.full((4, N, 2), 2.0), bias=(two, one), temperature=0.5)
    total = a + b
    assert isinstance(total, Signal)
    assert torch.equal(total.token, torch.full((4, N, 2), 3.0))
    assert len(total.bias) == 3
    assert all(x is y for x, y in zip(total.bias, (one, two, one), strict=True))
    assert total.temperature == 1.5
    assert (a.bias, b.bias) == ((one,), (two, one))


@settings(deadline=None, max_examples=50)
@given(angles, angles)
def test_rotations_multiply_as_complex_numbers(first, second):
    a, b = rotation(first), rotation(second)
    product = torch.complex(*a) * torch.complex(*b)
    torch.testing.assert_close(torch.complex(*a.times(b)), product, rtol=0, atol=1e-12)
    x = torch.linspace(-1, 1, HEADS * N * WIDTH, dtype=torch.float64).view(1, HEADS, N, WIDTH)
    torch.testing.assert_close(rotate(rotate(x, a), b), rotate(x, a.times(b)), rtol=0, atol=1e-12)


def test_rotations_of_heads_and_of_samples_broadcast():
    per_head = Rotation(*(torch.full((1, HEADS, N, 2), value) for value in (0.6, 0.8)))
    per_sample = Rotation(*(torch.full((5, 1, N, 2), value) for value in (0.8, 0.6)))
    cos, sin = per_head.times(per_sample)
    assert cos.shape == sin.shape == (5, HEADS, N, 2)
    torch.testing.assert_close(cos, torch.zeros_like(cos), rtol=0, atol=1e-7)  # 53.1° and 36.9° make a right angle
    torch.testing.assert_close(sin, torch.ones_like(sin), rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", [None, 0.01, 0.5, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("biased", [False, True])
def test_temperature_acts_on_logits_and_bias_but_not_on_the_mask(temperature, biased):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, n, WIDTH, generator=generator) for n in (4, 5, 5))
    bias = torch.randn(1, HEADS, 4, 5, generator=generator)
    mask = torch.rand(2, 1, 4, 5, generator=generator) > 0.3
    mask[..., 0] = True
    v[..., -1, :] = 1e4
    mask[..., -1] = False  # one key that must never be seen, however hot
    ours = attend(q, k, v, Signal(bias=(Dense(bias),) if biased else (), temperature=temperature), mask)
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.transpose(-1, -2) * WIDTH**-0.5 + bias.double() * biased
    logits = logits * (1.0 if temperature is None else temperature)
    reference = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=1e-5)


def test_terms_of_every_kind_add_up_in_attention():
    generator = torch.Generator().manual_seed(0)
    at = Positions.grid((2, 3))
    q, k, v = (torch.randn(2, HEADS, 6, WIDTH, generator=generator) for _ in range(3))
    dense = Dense(torch.randn(2, HEADS, 6, 6, generator=generator))
    table = Table(torch.randn(HEADS, 3, 5, generator=generator), at, at)
    low = LowRank(torch.randn(1, HEADS, 6, 2, generator=generator), torch.randn(1, HEADS, 6, 2, generator=generator))
    assert torch.equal(low.dense(), torch.einsum("bhir,bhjr->bhij", low.fq, low.fk))
    total = Dense(dense.dense() + table.dense() + low.dense())
    ours = attend(q, k, v, Signal(bias=(dense, table)) + Signal(bias=(low,)))
    torch.testing.assert_close(ours, attend(q, k, v, Signal(bias=(total,))), rtol=0, atol=1e-6)
    assert float((ours - attend(q, k, v, Signal(bias=(dense, table)))).abs().max()) > 0.1


@pytest.mark.parametrize("batch", [1, 2])
def test_cosine_and_sine_of_learned_phases_have_the_gradients_of_the_formula(batch):
    generator = torch.Generator().manual_seed(0)
    coords = torch.randn(batch, 6, 2, dtype=torch.float64, generator=generator)
    w = torch.randn(2, HEADS, 4, dtype=torch.float64, generator=generator).requires_grad_()

    def both(w):
        return tuple(rotation_of(LinearAngles(coords, w).resolve(None, (), 1), torch.float64, w.device))

    def formula(w):
        angle = F.pad(torch.einsum("bnd,dhk->bhnk", coords, w), (0, 0, 1, 0))
        return angle.cos(), angle.sin()

    assert type(both(w)[0].grad_fn).__name__ == "_CosSinBackward"
    torch.testing.assert_close(both(w), formula(w))
    given = [torch.randn(batch, HEADS, 7, 4, dtype=torch.float64, generator=generator) for _ in range(2)]
    ours, theirs = (torch.autograd.grad(f(w), w, given) for f in (both, formula))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(both, (w,))
    assert torch.autograd.gradgradcheck(both, (w,))
    several = torch.stack([w.detach(), -w.detach()])
    torch.testing.assert_close(torch.func.vmap(both)(several)[0][1], formula(-w)[0])
    torch.testing.assert_close(
        torch.func.jacrev(both)(w.detach())[0], torch.autograd.functional.jacobian(formula, w)[0]
    )


def test_phases_whose_places_ask_for_a_gradient_give_it():
    coords = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *given: tuple(rotation_of(LinearAngles(*given).resolve(None, (), 0), w.dtype, w.device)), (coords, w)
    )


def test_an_encoding_lays_cosine_and_sine_side_by_side():
    """Where the kernel reads both as one complex number without a copy."""
    cos, sin = rotation_of(torch.randn(1, 1, 3, 4), torch.float32, "cpu")
    assert sin.data_ptr() - cos.data_ptr() == cos.element_size()


@pytest.mark.parametrize("prefixes", [(0, 0), (1, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("with_columns", [False, True])
def test_a_table_is_looked_up_as_by_a_double_loop(prefixes, with_columns):
    """Queries and keys at places of their own, each with its prefix."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(HEADS, 5, 9, generator=generator)
    columns = torch.randn(HEADS, 3, generator=generator) if with_columns else None
    q = Positions.grid((3, 2)).with_prefix(prefixes[0])
    k = Positions.grid((2, 5)).with_prefix(prefixes[1])
    dense = Table(table, q, k, columns).dense()
    front = torch.zeros(HEADS, 3) if columns is None else columns
    for i in range(prefixes[0] + 6):
        for j in range(prefixes[1] + 10):
            a, b = i - prefixes[0], j - prefixes[1]
            if a >= 0 and b >= 0:
                expected = table[:, a // 2 - b // 5 + 2, a % 2 - b % 5 + 4]
            else:
                expected = front[:, 2 if a < 0 and b < 0 else 0 if a < 0 else 1]
            assert torch.equal(dense[0, :, i, j], expected), (i, j)


@pytest.mark.parametrize(("queries", "keys", "got"), [((4, 2), (2, 2), "-1 to 3"), ((2, 2), (4, 2), "-3 to 1")])
def test_offsets_beyond_a_table_are_refused_on_either_side(queries, keys, got):
    with pytest.raises(ValueError, match=f"offsets along axis 0 leave the table: it covers ±2, got {got}"):
        Table(torch.zeros(HEADS, 5, 5), Positions.grid(queries), Positions.grid(keys)).dense()
