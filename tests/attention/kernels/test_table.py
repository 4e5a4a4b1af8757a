"""The paths that build no matrix of biases equal the plain one: values, gradients; rectangles, prefix tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit2dpe import Dims, Positions, Signal, ViT, attend, build
from vit2dpe.attention.kernels import table as kernels
from vit2dpe.signal import Table
from vit2dpe.testing import randomise

B, H, DIM = 3, 2, 8
GRIDS = [(2, 5), (5, 2), (1, 4), (3, 1), (1, 1)]


def inputs(grid, prefix, dtype=torch.float32, learned=True):
    generator = torch.Generator().manual_seed(0)
    at = Positions.grid(grid).with_prefix(prefix)
    count = grid[0] * grid[1] + prefix
    tensors = [
        torch.randn(B, H, count, DIM, generator=generator, dtype=torch.float64),
        torch.randn(B, H, count, DIM, generator=generator, dtype=torch.float64),
        torch.randn(B, H, count, DIM, generator=generator, dtype=torch.float64),
        torch.randn(H, 2 * grid[0] - 1, 2 * grid[1] - 1, generator=generator, dtype=torch.float64),
    ]
    return at, [x.to(dtype).requires_grad_(learned) for x in tensors]


def plain(q, k, v, table, at, scale=None, factor=1.0):
    """From the definition, a double loop over tokens."""
    bias = torch.zeros(H, q.shape[2], k.shape[2], dtype=table.dtype)
    rows, cols = at.extent
    for a, (i, j) in enumerate(at.coords[0].long().tolist()):
        for b, (m, n) in enumerate(at.coords[0].long().tolist()):
            bias[:, at.prefix + a, at.prefix + b] = table[:, i - m + rows - 1, j - n + cols - 1]
    logits = q @ k.transpose(-1, -2) * (DIM**-0.5 if scale is None else scale) + factor * bias
    return logits.softmax(-1) @ v


@pytest.fixture
def paths(monkeypatch):
    """The paths that were taken, by name."""
    taken, original = [], kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: taken.append(args[-1]) or original(*args))
    return taken


@pytest.mark.parametrize("images", [B, 1])  # all images of a head in a step, or all heads of an image
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_learned_has_the_values_and_gradients_of_the_definition(grid, prefix, images, paths, monkeypatch):
    def given():
        at, tensors = inputs(grid, prefix, torch.float64)
        return at, [*(x.detach()[:images].requires_grad_() for x in tensors[:3]), tensors[3]]

    at, ours = given()
    monkeypatch.setattr(kernels, "CACHE", 2 * 8 * (grid[0] * grid[1] + prefix) ** 2)  # two images at a time, of three
    if prefix:  # one head at a time, of two
        monkeypatch.setattr(kernels, "MATRICES", 1)
    _, theirs = given()
    found = attend(*ours[:3], Signal(bias=(Table(ours[3], at, at),), temperature=1.5), scale=0.3)
    expected = plain(*theirs, at, scale=0.45, factor=1.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    for x, y in zip(
        torch.autograd.grad(found, ours, weights), torch.autograd.grad(expected, theirs, weights), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    assert paths == ["learned"]


def test_learned_in_half_precision(paths):
    at, ours = inputs((3, 4), 1)
    _, theirs = inputs((3, 4), 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*(x.bfloat16() for x in ours[:3]), Signal(bias=(Table(ours[3], at, at),)))
    assert found.dtype == torch.bfloat16
    expected = plain(*theirs, at)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0.1, atol=0.1)


def efficient(q, k, v, bias, log, dropout=0.0, causal=False, *, scale=None):
    """torch's memory-efficient kernel, which the CPU does not have, from its definition."""
    assert log
    assert not any(step % 16 for step in bias.stride()[1:-1])  # or torch would copy it
    logits = scale * q @ k.mT + bias
    seed = torch.zeros((), dtype=torch.long)
    return logits.softmax(-1) @ v, logits.logsumexp(-1), seed, seed.clone()


def efficient_backward(gradient, q, k, v, bias, out, log, seed, offset, dropout, ask, causal=False, *, scale=None):
    weights = (scale * q @ k.mT + bias - log[..., None]).exp()
    dlogits = weights * (gradient @ v.mT - (gradient * out).sum(-1, keepdim=True))
    return scale * dlogits @ k, scale * dlogits.mT @ q, weights.mT @ gradient, dlogits


@pytest.fixture(scope="module")
def kernel():
    """The operations that `slices` calls, with their schema, on the CPU."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_scaled_dot_product_efficient_attention", efficient)
    library.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward)
    yield
    library._destroy()


@pytest.fixture
def as_on_cuda(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "MATRICES", 1)


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("images", [1, 2, 8])  # of a slice, of three
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_slices_have_the_values_and_gradients_of_the_definition(
    grid, prefix, images, how, as_on_cuda, paths, monkeypatch
):
    at, ours = inputs(grid, prefix)
    _, theirs = inputs(grid, prefix)
    tokens = grid[0] * grid[1] + prefix
    monkeypatch.setattr(kernels, "SLICE", images * 4 * H * tokens * (tokens + -tokens % 16))
    run = attend if how == "eager" else torch.compile(attend, backend="aot_eager", fullgraph=True)
    found = run(*ours[:3], Signal(bias=(Table(ours[3], at, at),), temperature=1.5), scale=0.3)
    expected = plain(*theirs, at, scale=0.45, factor=1.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(x, y, weights) for x, y in ((found, ours), (expected, theirs))), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)
    assert how == "compiled" or paths == ["slices"]


def test_slices_in_half_precision(as_on_cuda, paths):
    at, ours = inputs((3, 4), 1)
    _, theirs = inputs((3, 4), 1)
    odd = [x[..., :7].bfloat16() for x in ours[:3]]  # channels are filled up
    found = attend(*odd, Signal(bias=(Table(ours[3], at, at),)))
    expected = plain(*(x[..., :7] for x in theirs[:3]), theirs[3], at, scale=7**-0.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0.1, atol=0.1)
    assert ours[3].grad.dtype == torch.float32
    assert paths == ["slices"]


def test_slices_differentiated_twice(as_on_cuda):
    at, tensors = inputs((2, 3), 1)
    found = []
    for devices in (("cpu",), ()):
        kernels.DEVICES = devices
        q, k, v, table = (x.detach().requires_grad_() for x in tensors)
        out = attend(q, k, v, Signal(bias=(Table(table, at, at),)))
        first = torch.autograd.grad(out.square().sum(), (q, table), create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v, table)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_where_slices_serve(as_on_cuda, monkeypatch):
    at, (q, _, _, table) = inputs((2, 3), 1)
    chosen = lambda term, like=q: kernels.select(term, like, True, None)  # noqa: E731
    assert chosen(Table(table, at, at)).path == "slices"
    some = at.take(torch.tensor([0, 1, 2, 3, 4, 5]))
    assert "not all places" in chosen(Table(table, some, some)).why
    assert "prefix" in chosen(Table(table, at, at, torch.zeros(H, 3))).why
    assert "float64" in chosen(Table(table, at, at), q.double()).why
    with sdpa_kernel(SDPBackend.MATH):
        assert "sdpa_kernel" in chosen(Table(table, at, at)).why
    monkeypatch.setattr(kernels, "MATRICES", 4 * 2**20)
    assert "not above 64 MiB" in chosen(Table(table, at, at)).why
    monkeypatch.setattr(kernels, "SLICE", B * H * 49 * 4 - 1)
    assert chosen(Table(table, at, at)).path == "slices"


def test_second_derivatives():
    at, (q, k, v, table) = inputs((2, 3), 1, torch.float64)
    signal = lambda t: Signal(bias=(Table(t, at, at),))  # noqa: E731
    q = q[:1].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q, t: attend(q, k[:1], v[:1], signal(t)), (q, table))


@pytest.mark.need("A1")
@pytest.mark.parametrize("word", ["t5", "relative(shared=true)", "t5+rope_mixed", "relative"])
def test_gradients_that_are_differentiated_are_right_where_blocks_share_a_table(word):
    torch.manual_seed(0)
    sizes = dict(img_size=(16, 24), patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=3)
    model = randomise(ViT(word, **sizes)).double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    parameters = list(model.parameters())
    along = [torch.randn_like(p) for p in parameters]

    def gradients(create_graph=False):
        found = torch.autograd.grad(model(images).square().sum(), parameters, create_graph=create_graph)
        return torch.cat([g.flatten() for g in found])

    def moved(step):
        with torch.no_grad():
            for p, d in zip(parameters, along, strict=True):
                p.add_(d, alpha=step)
        return gradients()

    with sdpa_kernel(SDPBackend.MATH):  # what torch can differentiate twice
        plain, kept = gradients(), gradients(create_graph=True)
        torch.testing.assert_close(kept, plain, rtol=1e-6, atol=1e-9 * float(plain.norm()))
        second = torch.autograd.grad(kept @ torch.cat([d.flatten() for d in along]), parameters, allow_unused=True)
        pairs = zip(parameters, second, strict=True)
        found = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
        expected = (moved(1e-6) - moved(-2e-6)) / 2e-6  # the second step starts where the first ended
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_a_frozen_backbone_trains_its_table_alone(paths):
    at, (q, k, v, table) = inputs((2, 3), 1)
    out = attend(q.detach(), k.detach(), v.detach(), Signal(bias=(Table(table, at, at),)))
    weights = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, table, weights)
    (expected,) = torch.autograd.grad(plain(q, k, v, table, at), table, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert paths == ["learned"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prefix", "path"), [(0, "view"), (2, "chunked")])
@pytest.mark.parametrize("grid", GRIDS)
def test_inference_above_the_budget_equals_inference_below_it(grid, prefix, path, dtype, paths, monkeypatch):
    at, tensors = inputs(grid, prefix, dtype, learned=False)
    signal = Signal(bias=(Table(tensors[3].float(), at, at),), temperature=1.25)
    below = attend(*tensors[:3], signal)
    monkeypatch.setattr(kernels, "BUDGET", 3 * H * (grid[0] * grid[1] + prefix) * tensors[0].element_size() - 1)
    above = attend(*tensors[:3], signal)
    torch.testing.assert_close(above, below, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert paths == ([path] if grid[0] * grid[1] + prefix > 2 else [])


def test_a_subset_of_a_grid_goes_in_chunks(paths, monkeypatch):
    at, (q, k, v, table) = inputs((3, 4), 2, learned=False)
    index = torch.tensor([[0, 5, 7], [1, 2, 11], [4, 3, 10]])
    some = at.take(index)
    q, k, v = (x[:, :, :5] for x in (q, k, v))
    below = attend(q, k, v, Signal(bias=(Table(table, some, some),)))
    monkeypatch.setattr(kernels, "BUDGET", 100)
    torch.testing.assert_close(attend(q, k, v, Signal(bias=(Table(table, some, some),))), below, rtol=0, atol=1e-6)
    assert paths == ["chunked"]


def test_places_in_another_order_are_not_taken_for_the_whole_grid(paths):
    at, (q, k, v, table) = inputs((2, 3), 0)
    turned = at.take(torch.tensor([5, 4, 3, 2, 1, 0]))
    attend(q, k, v, Signal(bias=(Table(table, turned, turned),))).sum().backward()
    assert paths == []


def test_a_mask_or_a_second_bias_takes_the_plain_path(paths):
    at, (q, k, v, table) = inputs((2, 3), 0)
    term = Table(table, at, at)
    attend(q, k, v, Signal(bias=(term,)), mask=torch.eye(6, dtype=torch.bool)).sum().backward()
    attend(q, k, v, Signal(bias=(term, term))).sum().backward()
    assert paths == []


def saved_bytes(model, images):
    """Bytes that a training forward keeps for the backward, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(images).sum()
    return sum(size for place, size in kept.items() if place not in parameters)


def test_training_keeps_no_matrix():
    """32 x 32 tokens: a matrix a block and head is 4 MiB."""
    sizes = dict(img_size=64, patch_size=2, embed_dim=16, num_heads=4, depth=2, num_classes=2, class_token=False)
    images = torch.randn(1, 3, 64, 64)
    relative, nothing = (saved_bytes(ViT(word, global_pool="avg", **sizes), images) for word in ("relative", "none"))
    assert relative < 1.05 * nothing


def test_the_index_is_not_made_where_no_matrix_is(monkeypatch):
    position, at = build("relative", Dims(H * DIM, H, (3, 4))), Positions.grid((3, 4))
    monkeypatch.setattr(Table, "_index", lambda self: pytest.fail("an index of all pairs was made"))
    q, k, v = torch.randn(3, B, H, 12, DIM)
    attend(q, k, v, position(at)).sum().backward()
    monkeypatch.setattr(kernels, "BUDGET", 100)
    with torch.no_grad():
        attend(q, k, v, position(at))


@pytest.mark.parametrize("most", [1, 2, 5, 9])
@pytest.mark.parametrize(("images", "heads"), [(1, 3), (2, 5), (3, 3), (7, 2)])
def test_steps_of_a_backward_cover_every_head_of_every_image_once(images, heads, most):
    seen = torch.zeros(images, heads, dtype=torch.long)
    for step in kernels._steps(images, heads, most):
        assert 1 <= seen[step].numel() <= most
        seen[step] += 1
    assert bool((seen == 1).all())
