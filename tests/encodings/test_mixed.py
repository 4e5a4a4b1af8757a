"""Tables at places of grids of several sizes at once: what each grid alone has, to rounding, with its gradients."""

import pytest
import torch

from tests.devices import Device
from vit2dpe import ConfigError, Dims, Positions, build, use_policy
from vit2dpe.encodings.mixed import Fit, read_weighted, weights_of
from vit2dpe.encodings.tables import RESIZES
from vit2dpe.testing import randomise, tensors

SIZES = [(4, 6), (1, 1), (2, 3), (5, 6), (4, 13), (12, 2), (9, 17)]  # of a table of 4x6: a third to three times
GRID, MIXED = (3, 4), [(3, 4), (2, 7), (8, 3), (1, 2), (6, 8)]
TOKENS = (
    *(f"learned(resize={mode})" for mode in ("antialias", "plain", "dino", "smooth", "corners")),
    *("learned(keep_aspect=true)", "windowed(window=2)", "factorized"),
)
BIASES = ("relative", "relative(resize=geometric)", "relative(prefix=true)", "relative(symmetric=true)")
CONTEXTUAL = ("shaw(clip=3)", "irpe", "decomposed")


def identity(sizes, dtype):
    count = torch.Size(sizes).numel()
    return torch.eye(count, dtype=dtype).view(count, *sizes)


@pytest.mark.parametrize("mode", RESIZES)
@pytest.mark.parametrize("old", [(4, 6), (7, 11), (1, 5), (31, 3)])
def test_each_place_has_what_the_table_resized_to_its_grid_holds_there(mode, old):
    """A linear function of the table, compared entry by entry, and so its gradient too."""
    sizes = [tuple(2 * s - 1 for s in size) for size in SIZES] if old[0] % 2 else SIZES
    if mode == "geometric" and not old[0] % 2:
        return  # it is of tables over offsets, which have an odd number of entries
    places = [Positions.grid(size).coords[0].double() for size in sizes]
    x = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)  # (B, N, d)
    size = torch.tensor(sizes, dtype=torch.float64)[:, None]
    fit = Fit(mode, size, size)
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        table = identity(old, dtype)
        dense = weights_of(x, old, fit, dtype, channels=len(table))
        assert isinstance(dense, torch.Tensor)
        found = read_weighted(table, weights_of(x, old, fit, dtype))
        torch.testing.assert_close(read_weighted(table, dense), found, rtol=0, atol=most)
        for i, one in enumerate(sizes):
            expected = RESIZES[mode](table, one).flatten(1)
            torch.testing.assert_close(found[:, i, : expected.shape[1]], expected, rtol=0, atol=most)


class Model(torch.nn.Module):
    """What a policy is set for: an encoding, and the grid it was trained on."""

    def __init__(self, word, dtype):
        super().__init__()
        torch.manual_seed(1)
        self.position = randomise(build(word, Dims(24, 2, GRID, block=0, depth=2))).to(dtype).eval()
        self.train_grid = GRID


def policies(word, dtype):
    encoding = Model(word, dtype).position
    found = ["default", *(f"resize(mode={mode})" for mode in encoding.resizes)]
    if "resize" in encoding.policies:
        found += ["resize(power=0.5)", "resize(power=(0, 1.5))", "subtable"]
    if "interpolate" in encoding.policies:
        found += ["interpolate", "interpolate(align=corner)", "interpolate(power=(0.5, 1))"]
    return found


def parts(signal, at, sizes):
    """Of each sample, or image in a row, its fields without padding; {name: tensor}."""
    counts, prefix = [size[0] * size[1] for size in sizes], at.prefix
    found = tensors(signal)
    for i, n in enumerate(counts):
        if at.segment is None:
            index, one = torch.arange(prefix + n), {name: x[i if len(x) > 1 else 0] for name, x in found.items()}
        else:
            index, one = torch.arange(n) + sum(counts[:i]), {name: x[0] for name, x in found.items()}
        yield {name: x[..., index, :] if name == "token" else x[..., index, :][..., index] for name, x in one.items()}


def compare(word, dtype, make, prefix=0):
    most = 1e-10 if dtype == torch.float64 else 2e-5
    model = Model(word, dtype)
    for policy in policies(word, dtype):
        sizes = [(3, 4), (2, 1), (1, 3)] if policy == "subtable" else MIXED
        with use_policy(model, policy):
            at, given, expected = make(sizes).with_prefix(prefix), [], []
            generator = torch.Generator().manual_seed(2)
            for one, size in zip(parts(model.position(at), at, sizes), sizes, strict=True):
                alone = tensors(model.position(Positions.grid(size).with_prefix(prefix)))
                assert one.keys() == alone.keys()
                for name, tensor in one.items():
                    same = torch.allclose(tensor, alone[name][0], rtol=0, atol=most)
                    assert same, f"{name} under {policy} is off by {(tensor - alone[name][0]).abs().max():.1e}"
                    weight = torch.randn(tensor.shape, generator=generator, dtype=dtype)
                    given.append((tensor * weight).sum())
                    expected.append((alone[name][0] * weight).sum())
            if dtype == torch.float64:
                for mine, theirs in zip(*(gradients(model, x) for x in (given, expected)), strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def gradients(model, losses):
    return torch.autograd.grad(sum(losses), list(model.parameters()), retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("word", [*TOKENS, *BIASES, *CONTEXTUAL])
def test_a_padded_batch_has_what_each_grid_alone_has(word, dtype):
    compare(word, dtype, Positions.grids, prefix=2)


@pytest.mark.parametrize("word", [*TOKENS, *BIASES, *CONTEXTUAL])
def test_a_row_of_images_has_what_each_grid_alone_has(word):
    compare(word, torch.float64, Positions.packed)


@pytest.mark.parametrize("word", [*TOKENS, *BIASES, *CONTEXTUAL])
def test_no_size_is_looked_at(word):
    """Tensors of the meta device have no values."""
    model, at = Model(word, torch.float32), Positions.grids([(2, 3), (3, 1)])
    expected = {name: x.shape for name, x in tensors(model.position(at)).items()}
    coords, extent = at.coords.to("meta"), at.extent.to("meta")
    for policy in {"default", "resize(power=0.5)", "interpolate"} & {*policies(word, torch.float32)}:
        for box in ((3, 4), ()):
            with use_policy(model.to("meta"), policy):
                found = tensors(model.position(Positions(coords, extent, on_grid=True, box=box)))
            assert {name: x.shape for name, x in found.items()} == expected


@pytest.mark.parametrize("word", ["learned", "windowed", "factorized", "relative"])
def test_between_whole_places_each_resized_table_is_read(word):
    """As jitter leaves places: of each sample at those of its own grid."""
    encoding, at = Model(word, torch.float64).position, Positions.grids(MIXED)
    torch.manual_seed(3)
    moved = at.moved(at.coords + torch.rand_like(at.coords) - 0.5)
    for i, (one, size) in enumerate(zip(parts(encoding(moved), at, MIXED), MIXED, strict=True)):
        coords = moved.coords[i : i + 1, : size[0] * size[1]]
        for name, tensor in tensors(encoding(Positions(coords, size))).items():
            torch.testing.assert_close(one[name], tensor[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("word", ["learned+windowed+factorized", "relative", "decomposed+irpe"])
def test_a_device_without_float64_has_the_same(word):
    encoding = Model(word, torch.float32).position
    expected = tensors(encoding(Positions.grids(MIXED)))
    with Device("mps"):
        found = tensors(encoding.to("mps")(Positions.grids(MIXED, device="mps")))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_part_of_a_table_is_refused_where_nobody_knows_how_large_grids_are():
    model, at = Model("learned", torch.float32), Positions.grids([(2, 3), (3, 4)])
    with use_policy(model, "subtable"), pytest.raises(ConfigError, match="give Positions a box"):
        model.position(Positions(at.coords, at.extent, on_grid=True))


@pytest.mark.slow
def test_one_graph_serves_all_sizes():
    torch.compiler.reset()
    encoding = Model("learned+relative+irpe+decomposed", torch.float64).position
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda at: tensors(encoding(at)), fullgraph=True, backend=backend)
    for sizes in ([(3, 4), (2, 7)], [(6, 3), (1, 2)]):
        at = Positions.grids(sizes, 20)
        at = Positions(at.coords, at.extent, on_grid=True, valid=at.valid, box=(6, 7))
        for name, tensor in compiled(at).items():
            torch.testing.assert_close(tensor, tensors(encoding(at))[name], rtol=0, atol=1e-10)
    assert len(graphs) == 1
