"""Tables between their entries: what torch's own sampler reads there, right gradients, whole places as ever."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from vit2dpe import ConfigError, Dims, Positions, ViT, build, set_policy, use_policy
from vit2dpe.encodings import ENCODINGS, Jitter, NoPosition, between
from vit2dpe.encodings.base import common_policies
from vit2dpe.grids import Bounds
from vit2dpe.resolution.policies import Interpolate
from vit2dpe.signal import Dense, Table
from vit2dpe.testing import randomise, tensors

GRID, LARGE = (3, 5), (7, 9)
TOKENS = ("learned", "windowed(window=2)", "factorized")
BIASES = ("relative", "relative(prefix=true)", "t5", "logcpb", "logcpb(form=cr)", "fire")
SAMPLED = ("learned", "windowed", "factorized", "relative")


def made(word, grid=GRID):
    torch.manual_seed(1)
    return randomise(build(word, Dims(24, 2, grid, block=0, depth=2))).double().eval()


def some_places(grid=GRID, n=7, margin=0.5):
    """(1, n, d) fractional places, as far as half a patch outside, in float64."""
    generator = torch.Generator().manual_seed(2)
    share = torch.rand(1, n, len(grid), generator=generator, dtype=torch.float64)
    return share * torch.tensor([size - 1 + 2 * margin for size in grid]) - margin


def sampled(table, at, mode):
    """(C, h, w) at (n, 2) places, by torch's grid_sample."""
    sizes = torch.tensor(table.shape[1:], dtype=at.dtype)
    grid = ((2 * at + 1) / sizes - 1).flip(-1)[None, None]
    return F.grid_sample(table[None], grid, mode=mode, padding_mode="border", align_corners=False)[0, :, 0]


@pytest.mark.parametrize("sample", between.SAMPLES)
def test_a_table_of_vectors_is_what_grid_sample_reads(sample):
    at = some_places()
    learned, both = made(f"learned(sample={sample})"), made(f"factorized(sample={sample})")
    expected = sampled(learned.pos_embed[0].permute(2, 0, 1), at[0], sample)
    torch.testing.assert_close(learned(Positions(at, GRID)).token[0].t(), expected, rtol=0, atol=1e-12)
    rows, columns = (table.t()[:, None].expand(-1, 4, -1) for table in both.tables)
    lines = [torch.stack([torch.ones_like(at[0, :, 0]), at[0, :, axis]], dim=-1) for axis in (0, 1)]
    expected = sampled(rows, lines[0], sample) + sampled(columns, lines[1], sample)
    torch.testing.assert_close(both(Positions(at, GRID)).token[0].t(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sample", between.SAMPLES)
def test_a_table_of_biases_is_what_grid_sample_reads_at_offsets(sample):
    at = some_places(margin=0.4)
    encoding = made(f"relative(sample={sample}, prefix=true)")
    bias = encoding(Positions(at, GRID).with_prefix(2)).bias[0].dense()
    apart = (at[0, :, None] - at[0, None]).flatten(0, 1) + torch.tensor(GRID) - 1
    expected = sampled(encoding.relative_position_bias_table, apart, sample).unflatten(1, (7, 7))
    torch.testing.assert_close(bias[0, :, 2:, 2:], expected, rtol=0, atol=1e-12)
    for i, edge in enumerate((bias[0, :, :2, 2:], bias[0, :, 2:, :2], bias[0, :, :2, :2])):
        assert (edge == encoding.prefix_bias[:, i, None, None]).all()


def test_a_window_is_read_across_its_seam():
    encoding = made("windowed(window=2)")
    torch.nn.init.zeros_(encoding.pos_embed)
    token = encoding(Positions(torch.tensor([[[1.5, 3.0]]]), GRID)).token[0, 0]
    window = encoding.pos_embed_window[0]
    torch.testing.assert_close(token, (window[1, 1] + window[0, 1]) / 2, rtol=0, atol=1e-12)


def test_buckets_are_linear_between_whole_offsets_and_formulas_are_evaluated():
    q, k = (Positions(torch.tensor([[[float(p)]]]), (9,)) for p in (3.25, 1.0))
    t5, whole = made("t5", (9,)), Positions.grid((9,))
    table = t5(whole).bias[0].dense()[0]
    expected = 0.75 * table[:, 3, 1] + 0.25 * table[:, 4, 1]
    torch.testing.assert_close(t5(q, k).bias[0].dense()[0, :, 0, 0], expected, rtol=0, atol=1e-12)
    cr = made("logcpb(form=cr)", (9,))
    expected = cr.cpb_mlp(torch.tensor([3.25]).double().log())  # ln(1 + 2.25)
    torch.testing.assert_close(cr(q, k).bias[0].dense()[0, :, 0, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("word", [*TOKENS, *BIASES, *(f"{name}(sample=bicubic)" for name in SAMPLED)])
def test_whole_places_read_between_have_the_entries_themselves(word):
    """Forced to by places that want gradients; and those are right, as those of the table are, at fractional places."""
    encoding, grid = made(word), Positions.grid(GRID)
    learning = grid.coords.double().requires_grad_()
    here, there = tensors(encoding(grid)), tensors(encoding(Positions(learning, GRID)))
    for name, tensor in here.items():
        torch.testing.assert_close(there[name].detach(), tensor.detach(), rtol=0, atol=1e-12)
    named = dict(encoding.named_parameters())

    def outputs(coords, *values):
        given = dict(zip(named, values, strict=True))
        return tuple(tensors(torch.func.functional_call(encoding, given, (Positions(coords, GRID),))).values())

    values = [p.detach().clone().requires_grad_() for p in named.values()]
    assert torch.autograd.gradcheck(outputs, (some_places(n=4).requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("word", [*TOKENS, *BIASES])
def test_places_on_a_grid_are_looked_up_as_ever(word):
    encoding = made(word)
    with mock.patch.object(between, "neighbours", side_effect=AssertionError("read between entries")):
        grid = Positions.grid(GRID)
        signal = encoding(grid)
        encoding(Positions(grid.coords, GRID))
        assert all(isinstance(term, Table) for term in signal.bias)
        assert all(term.q is grid for term in signal.bias)


@pytest.mark.parametrize("word", BIASES)
def test_scaled_places_have_a_table_of_their_offsets(word):
    """`interpolate` gives a table that every kernel takes; its biases are those of the pairs of scaled places."""
    encoding, grid = made(word), Positions.grid(LARGE).with_prefix(1)
    encoding.own_policy = Interpolate(GRID)
    term = encoding(grid).bias[0]
    assert isinstance(term, Table)
    assert term.table.shape[1:] == (13, 17)
    moved = encoding.own_policy.place(grid)
    encoding.own_policy = None
    pairs = encoding(Positions(moved.coords.double(), GRID, 1)).bias[0]
    assert isinstance(pairs, Dense)
    torch.testing.assert_close(term.dense(), pairs.dense(), rtol=0, atol=2e-5)  # places are float32


@pytest.mark.parametrize(("sample", "mode"), [("bilinear", "bilinear"), ("bicubic", "plain")])
@pytest.mark.parametrize("size", [LARGE, (2, 4)])
def test_interpolating_vectors_is_resizing_them_without_antialias(sample, mode, size):
    model = ViT(
        f"learned(sample={sample})+factorized(sample={sample})+sincos",
        img_size=(12, 20), patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=3,
    ).eval()  # fmt: skip
    randomise(model)
    at, found = Positions.grid(size), []
    for policy in ("interpolate", f"resize(mode={mode})+interpolate"):
        with use_policy(model, policy):
            found.append(model.position(at).token)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_places_beyond_half_a_patch_outside_are_refused_and_the_border_is_the_last_entry():
    at = Positions(torch.tensor([[[-0.5, 4.4]]]), GRID)
    for word in ("learned", "factorized"):
        corner = tensors(made(word)(Positions(torch.tensor([[[0.0, 4.0]]]), GRID)))["token"]
        torch.testing.assert_close(tensors(made(word)(at))["token"], corner, rtol=0, atol=1e-12)
    far = Positions(torch.tensor([[[-0.6, 4.4], [2.6, 0.0]]]), GRID)
    for word in TOKENS:
        with pytest.raises(ValueError, match="by more than half a patch"):
            made(word)(far)
    with pytest.raises(ValueError, match="leave the table"):
        made("relative")(far)
    for word in SAMPLED:
        with pytest.raises(ConfigError, match="did you mean 'bilinear'"):
            made(f"{word}(sample=bilinar)")


WHOLE = ("none", "shaw", "irpe", "decomposed")  # which have nothing to read, or take whole places only


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name not in WHOLE])
def test_jitter_serves_every_encoding(name):
    """In training another Signal each time; tables are not left, and no place is looked at, whatever the amount."""
    encoding = made(name).float()
    grid = Positions.grid(GRID)
    still = tensors(encoding(grid))
    jittered = Jitter(encoding, 2.0).train()
    with mock.patch.object(Bounds, "of", side_effect=AssertionError("looked at")):
        one, two = tensors(jittered(grid)), tensors(jittered(grid))
    for field, tensor in one.items():
        assert tensor.shape == still[field].shape
        assert tensor.isfinite().all()
        assert not torch.equal(tensor, two[field])
    assert all(torch.equal(a, still[field]) for field, a in tensors(jittered.eval()(grid)).items())
    tables = [part for part in (encoding,) if part.resizes]
    moved = jittered.perturb(grid)(grid).coords
    assert bool(tables) == bool(((moved >= -0.5) & (moved <= torch.tensor(GRID) - 0.5)).all())
    with pytest.raises(ConfigError, match="cannot be jittered"):
        Jitter(type("Whole", (NoPosition,), {"continuous": False})())


def test_the_backward_keeps_no_entry_of_each_pair_and_head():
    encoding = build("relative", Dims(64, 16, GRID)).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        bias = Jitter(encoding)(Positions.grid(GRID)).bias[0].dense()
    assert bias.requires_grad
    assert max(kept) <= 15 * 15 < 16 * 15 * 15


def test_graphs_read_between_entries_too():
    """Nothing is looked at in a graph, and nothing rounded: places of one's own, and jittered ones."""
    torch.compiler.reset()
    at = Positions(some_places().float(), GRID)
    encoding = made("factorized+relative").float()

    def both(where):
        return tensors(encoding(where)), Positions.sequence(where.coords.shape[1]).on_grid

    found, on_grid = torch.compile(both, fullgraph=True, backend="eager")(at)
    assert on_grid, "text is looked up in a graph, too"
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, tensors(encoding(at))[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("word", ["learned", "factorized", "windowed(window=2)"])
def test_subtable_is_the_middle_of_a_table(word):
    encoding = made(word, LARGE)
    model = torch.nn.Module()
    model.position, model.train_grid = encoding, LARGE
    whole = encoding(Positions.grid(LARGE)).token.unflatten(1, LARGE)
    with use_policy(model, "subtable"):
        assert torch.equal(encoding(Positions.grid((3, 4))).token.unflatten(1, (3, 4)), whole[:, 2:5, 2:6])
        assert torch.equal(encoding(Positions.grid(LARGE)).token.unflatten(1, LARGE), whole)
        with pytest.raises(ConfigError, match="table of 7x9 places, and the grid has 8x9: there `resize`"):
            encoding(Positions.grid((8, 9)))


def test_subtable_of_offsets_and_of_a_model():
    encoding = made("relative", LARGE)
    model = torch.nn.Module()
    model.position, model.train_grid = encoding, LARGE
    at = Positions.grid(LARGE)
    inner = at.take((at.coords[0] < torch.tensor([3, 4])).all(-1).nonzero().flatten())
    with use_policy(model, "subtable"):
        found = encoding(Positions.grid((3, 4))).bias[0].dense()
    assert torch.equal(found, encoding(inner).bias[0].dense())
    with pytest.raises(ConfigError, match="AxialRoPE cannot subtable"):
        set_policy(ViT("rope", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2), "subtable")


def test_a_table_beside_a_formula_goes_on_being_resized():
    model = ViT("learned+rope", img_size=(12, 20), patch_size=4, embed_dim=24, depth=1, num_heads=2)
    table, rope = model.position.terms
    set_policy(model, "interpolate")
    assert (table.policy, rope.policy.name) == (None, "interpolate")
    for several in ("interpolate+resize(mode=plain)", "resize(mode=plain)+interpolate"):
        with use_policy(model, several):
            assert (table.policy.name, rope.policy.name) == ("resize", "interpolate")
    with use_policy(model, "interpolate"):
        assert table.policy.name == "interpolate"


def test_what_a_sum_does_by_itself_stays_its_first_policy():
    learned, rope, centred = (build(word, Dims(24, 2, GRID)) for word in ("learned", "rope", "rope_dinov3"))
    assert (learned + rope).policies == common_policies([learned, rope]) == ("default", "interpolate")
    assert (rope + centred).policies == ("default", "interpolate")
    assert (learned + build("relative", Dims(24, 2, GRID))).policies == ("resize", "interpolate")
    assert (learned + build("fourier", Dims(24, 2, GRID)) + rope).policies == ("default", "interpolate")
