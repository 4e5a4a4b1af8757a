"""Rows in another order: values and gradients of `index_select`, without a sum; windows of a whole grid take it."""

from __future__ import annotations

import pytest
import torch

from vit2dpe.kernels import gather
from vit2dpe.models import Swin, swin_windows

ORDER = torch.tensor([4, 0, 3, 1, 2])
BACK = ORDER.argsort()


def test_values_and_gradients_of_index_select():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    plain, fast = x.index_select(0, ORDER), gather.permute_rows(x, ORDER, BACK)
    assert torch.equal(plain, fast)
    weights = torch.randn_like(plain)
    (there,), (here,) = (torch.autograd.grad(y, x, weights) for y in (plain, fast))
    assert torch.equal(there, here)
    twice = lambda x: gather.permute_rows(x, ORDER, BACK).square()  # noqa: E731
    assert torch.autograd.gradcheck(twice, x)
    assert torch.autograd.gradgradcheck(twice, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, on its first jvp
def test_function_transforms_take_the_plain_path():
    x = torch.randn(2, 5, 3, requires_grad=True)
    run = lambda one: gather.permute_rows(one, ORDER, BACK)  # noqa: E731
    assert torch.equal(torch.vmap(run)(x), x[:, ORDER])
    assert torch.equal(torch.func.jvp(run, (x[0],), (x[1],))[1], x[1][ORDER])


@pytest.mark.parametrize(("size", "taken"), [((16, 24), 8), ((14, 24), 4)])
@pytest.mark.parametrize("padding", ["mask", "attend"])
def test_windows_of_a_whole_grid_take_it_and_others_do_not(size, taken, padding, monkeypatch):
    """Two of each block; at 14 x 24 the first stage is filled up. Gradients are those of the plain path."""
    sizes = dict(img_size=(16, 24), patch_size=2, window_size=(4, 6), embed_dim=8, num_classes=3, drop_path_rate=0.0)
    model = Swin("relative", **sizes, depths=(2, 2), num_heads=(2, 4), padding=padding)
    x = torch.randn(2, 3, *size)
    calls, original = [], gather._Permute.apply
    monkeypatch.setattr(gather._Permute, "apply", lambda *args: calls.append(1) or original(*args))
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        count = len(calls)
        monkeypatch.setattr(swin_windows, "permute_rows", lambda x, order, _: x.index_select(0, order))
    for fast, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    assert count == 2 * taken  # forward, and backward
