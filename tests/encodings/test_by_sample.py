"""Places of several grids at once: each image of a padded batch or of a packed row is what it is alone."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree

from benchmarks import devtrace
from tests.devices import Device
from vit2dpe import Attention, Dims, Positions, attend, build, frozen
from vit2dpe.attention.functional import FullMask
from vit2dpe.attention.kernels import flex
from vit2dpe.attention.masks import together
from vit2dpe.encodings import ENCODINGS, Jitter
from vit2dpe.encodings.split import split_shared_and_per_block
from vit2dpe.errors import ConfigError
from vit2dpe.grids import Bounds
from vit2dpe.resolution.apply import _policies, _temperature
from vit2dpe.testing import randomise, tensors

GRID, HEADS, DIM, PREFIX = (4, 3), 2, 12, 2
SIZES = [(2, 3), (5, 6), (4, 2)]  # below the training grid, above it along both axes, and of another aspect
OPTIONS = [
    *("rope(start=1)", "rope(order=interleaved)", "rope(sections=(2,3),bank=whole)", "rope_mixed(start=1)"),
    *("rope(order=head,sections=(1,1))", "rope(preset=flux,sections=(3,3))", "rope_dinov3(partial=0.5)"),
    *("alibi(distance=squared)", "alibi(slopes=learned)", "alibi(slopes=axes)", "kerple(form=power)"),
    *("logcpb(form=cr)", "t5(buckets=8)", "sincos(layout=timm)", "sincos+rope+alibi", "lookhere+rope_mixed"),
]
MORE = ("interpolate(power=0.5)", "interpolate(align=corner)", "ntk(power=(0.5,1))", "llama3", "longrope(long_factor=")


def encoding_of(word, policy=None, temperature=None, grid=GRID, dtype=torch.float64):
    torch.manual_seed(3)
    encoding = randomise(build(word, Dims(HEADS * DIM, HEADS, grid))).to(dtype).eval()
    chosen = None if policy is None else _policies(policy, grid)[0]
    encoding.own_temperature = _temperature(temperature, grid)
    for part in encoding.modules():
        if hasattr(part, "own_policy"):
            part.own_policy = chosen
    return encoding


def policies_for(encoding):
    longrope = f"longrope(long_factor=({','.join(f'{1 + i / 4:g}' for i in range(DIM // 2))}))"
    more = [longrope if word.startswith("longrope") else word for word in MORE]
    kinds = {word: word.partition("(")[0].replace("llama3", "yarn").replace("longrope", "yarn") for word in more}
    return [None, *encoding.policies, *(word for word, kind in kinds.items() if kind in encoding.policies)]


def attended(signal, x, mask=None):
    """(B, N, D): attention of tokens x (B, N, D) to each other."""
    x = x if signal.token is None else x + signal.token
    q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in (x, x.flip(-1), x))
    out = attend(q, k, v, signal._replace(token=None), None if mask is None else FullMask(mask))
    return out.transpose(1, 2).flatten(2)


def images(sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    counts = [PREFIX + torch.Size(size).numel() for size in sizes]
    return [torch.randn(1, count, HEADS * DIM, generator=generator, dtype=dtype) for count in counts]


def padded(make, xs, sizes):
    """What `make(tokens, places)` gives of each image, of all at once with padding of other contents."""
    at = Positions.grids(sizes, length=max(x.shape[1] for x in xs)).with_prefix(PREFIX)
    most = at.prefix + at.coords.shape[1]
    out = make(torch.cat([F.pad(x, (0, 0, 0, most - x.shape[1]), value=9.0) for x in xs]), at)
    return [out[i : i + 1, : x.shape[1]] for i, x in enumerate(xs)]


def packed(make, xs, sizes):
    """Likewise in one row: the prefix tokens of all images, their places, and some padding."""
    counts = [x.shape[1] - PREFIX for x in xs]
    at = Positions.packed(sizes, length=sum(counts) + 3).with_prefix(PREFIX * len(xs))
    row = torch.cat([x[:, :PREFIX] for x in xs] + [x[:, PREFIX:] for x in xs], dim=1)
    first, rest = make(F.pad(row, (0, 0, 0, 3), value=9.0), at).tensor_split([at.prefix], dim=1)
    parts = zip(first.split(PREFIX, dim=1), rest.split([*counts, 3], dim=1)[:-1], strict=True)
    return [torch.cat(part, dim=1) for part in parts]


LAYOUTS = (padded, packed)


def compare(encoding, sizes, dtype=torch.float64, tolerance=1e-10):
    """Outputs and the gradients of what is learned, of each layout and of the images alone."""
    xs, learned = images(sizes, dtype), list(encoding.parameters())

    def found(outs):
        total = sum(out.square().sum() for out in outs)
        return [*outs, *(torch.autograd.grad(total, learned, allow_unused=True) if learned else ())]

    alone = found(
        [attended(encoding(Positions.grid(s).with_prefix(PREFIX)), x) for x, s in zip(xs, sizes, strict=True)]
    )
    for layout in LAYOUTS:
        together_ = found(layout(lambda x, at: attended(encoding(at), x, together(at)), xs, sizes))
        for ours, theirs in zip(together_, alone, strict=True):
            scale = 1.0 if theirs is None else max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("word", [*ENCODINGS, *OPTIONS])
def test_an_image_among_others_is_what_it_is_alone(word):
    for policy in policies_for(encoding_of(word)):
        encoding = encoding_of(word, policy, "log" if policy in (None, "ntk") else "yarn(power=0.5)")
        compare(encoding, SIZES)
    compare(encoding_of(word, dtype=torch.float32), SIZES, torch.float32, 1e-5)


@pytest.mark.parametrize("word", ["rope", "rope_mixed", "fire", "alibi", "sincos", "t5", "rope_dinov3"])
@pytest.mark.parametrize(
    ("grid", "sizes"), [((6,), [(4,), (9,)]), ((2, 3, 2), [(3, 2, 2), (2, 4, 3)])], ids=["1d", "3d"]
)
def test_on_any_number_of_axes(word, grid, sizes):
    for policy in {None, encoding_of(word, grid=grid).policies[-1]}:
        compare(encoding_of(word, policy, "log", grid), sizes)


@pytest.mark.parametrize(
    "word", ["learned(axes=(1,2))+learned(axes=0)", "rope(axes=(2,0))+t5(axes=1)", "relative(axes=(0,2))+fire(axes=1)"]
)
def test_words_of_some_axes(word):
    compare(encoding_of(word, None, "log", (2, 3, 2)), [(3, 2, 2), (2, 4, 3)])


def test_blocks_of_different_words():
    shared, _ = split_shared_and_per_block("rope/none/alibi", Dims(HEADS * DIM, HEADS, GRID, depth=3))
    shared.own_temperature = _temperature("log", GRID)
    for index in range(3):
        xs = images(SIZES)
        for layout in LAYOUTS:
            outs = layout(lambda x, at, i=index: attended(shared.double()(at).of_block(i), x, together(at)), xs, SIZES)
            for x, size, out in zip(xs, SIZES, outs, strict=True):
                alone = attended(shared(Positions.grid(size).with_prefix(PREFIX)).of_block(index), x)
                torch.testing.assert_close(out, alone, atol=1e-10, rtol=0)


def test_patches_of_another_size_in_the_world():
    """A spacing for all, extents by sample."""
    for word, policy in (
        ("rope", "yarn"),
        ("rope_dinov3", None),
        ("sincos", "interpolate"),
        ("fire(reach=extent)", None),
    ):
        encoding = encoding_of(word, policy)
        for size in SIZES:
            alone = encoding(Positions.grid(size, spacing=(0.5, 2.0), origin=0.0))
            coords, n = alone_places(size), torch.Size(size).numel()
            both = Positions(
                torch.cat([coords, torch.zeros_like(coords)]), torch.tensor([size, (7, 1)]), spacing=(0.5, 2.0)
            )
            for name, tensor in tensors(encoding(both)).items():
                torch.testing.assert_close(tensor[:1, ..., :n, :], tensors(alone)[name], atol=1e-10, rtol=0)


def alone_places(size):
    return Positions.grid(size, spacing=(0.5, 2.0), origin=0.0).coords


@pytest.mark.parametrize("word", ["rope", "rope_mixed", "relative+rope", "alibi(distance=squared)"])
def test_attention_takes_tables_and_factors_of_each_sample(word):
    """The module, whose kernel turns queries and keys where they lie; and half precision keeps its type."""
    policy = "interpolate" if "relative" in word else "yarn" if "rope" in word else None
    encoding, module = encoding_of(word, policy, "log", dtype=torch.float32), Attention(HEADS * DIM, HEADS)
    xs, half = images(SIZES, torch.float32), copy.deepcopy(module).bfloat16()
    with torch.no_grad():
        alone = [module(x, encoding(Positions.grid(s).with_prefix(PREFIX))) for x, s in zip(xs, SIZES, strict=True)]
        for layout in LAYOUTS:
            outs = layout(lambda x, at: module(x, encoding(at), together(at)), xs, SIZES)
            for out, one in zip(outs, alone, strict=True):
                torch.testing.assert_close(out, one, atol=1e-5, rtol=0)
            outs = layout(lambda x, at: half(x.bfloat16(), encoding(at), together(at)), xs, SIZES)
            assert {out.dtype for out in outs} == {torch.bfloat16}


def test_flex_has_the_factor_of_each_query():
    for layout in LAYOUTS:
        encoding, factors = encoding_of("alibi", None, "log"), []

        def run(x, at, encoding=encoding, factors=factors):
            signal = encoding(at)
            factors.append(signal.temperature)
            q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in (x, x.flip(-1), x))
            modified = flex._where(flex.score_mod(signal), flex.mask_mod(together(at)))
            theirs = attend(q, k, v, signal, FullMask(together(at)))
            torch.testing.assert_close(flex.plainly(q, k, v, modified, None), theirs, atol=1e-5, rtol=0)
            return x

        layout(run, images(SIZES), SIZES)
        assert factors[0].ndim == 4


@pytest.mark.parametrize("word", [*ENCODINGS, "alibi(distance=squared)", "alibi(slopes=learned)", "sincos+rope"])
def test_no_forward_reads_an_extent(word):
    """On fake CUDA, where everything that is looked at is written down."""
    policies = policies_for(encoding_of(word))
    for policy in policies if word == "rope" else {None, policies[-1]}:
        encoding = encoding_of(word, policy, "log", dtype=torch.float32)
        with devtrace.fake_cuda() as recorder:
            devtrace.on_fake_cuda(encoding)
            places = [make(SIZES, device="cuda").with_prefix(3) for make in (Positions.grids, Positions.packed)]
            with recorder() as recorded:
                for at in places:
                    encoding(at)
                    together(at)
        assert not recorded.traffic.reads, (policy, recorded.traffic.reads)


def test_the_recorder_of_reads_records_one():
    with devtrace.fake_cuda() as recorder:
        at = Positions.grids(SIZES, device="cuda")
        with recorder() as recorded:
            int(at.extent.sum())
    assert recorded.traffic.reads


@pytest.mark.parametrize("word", ENCODINGS)
def test_a_device_without_float64(word):
    encoding = encoding_of(word, encoding_of(word).policies[-1], "log", dtype=torch.float32)
    expected = tensors(encoding(Positions.grids(SIZES)))
    with Device("mps"):
        encoding.to("mps")
        at = Positions.grids(SIZES, device="mps")
        for name, tensor in tensors(encoding(at)).items():
            assert tensor.device.type == "mps", name
            torch.testing.assert_close(tensor.cpu(), expected[name])


def test_places_that_are_not_known_to_be_whole_are_not_looked_at():
    whole = Positions.grids(SIZES)
    at = Positions(whole.coords, whole.extent, valid=whole.valid)  # as of patches that a loader has cut
    with mock.patch.object(Bounds, "of", side_effect=AssertionError("looked at")):
        for word in ("rope", "alibi", "t5", "logcpb", "kerple", "fire", "sincos"):
            encoding = encoding_of(word)
            for name, tensor in tensors(encoding(at)).items():
                torch.testing.assert_close(tensor, tensors(encoding(whole))[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("word", ["rope", "learned", "relative", "t5", "rope_dinov3", "sincos+alibi"])
def test_jitter_moves_the_places_of_each_sample(word):
    encoding = Jitter(encoding_of(word, "interpolate"), 0.25).train()
    at = Positions.grids(SIZES)
    moved = encoding.perturb(at)(at)
    step = (moved.coords - at.coords).abs()
    assert 0 < step.max() <= 0.25
    assert moved.valid is at.valid
    if encoding.bounded:
        assert bool((moved.coords <= at.spans() - 0.5).all())
        assert moved.coords.min() >= -0.5
    with mock.patch.object(Bounds, "of", side_effect=AssertionError("looked at")):
        assert all(tensor.isfinite().all() for tensor in tensors(encoding(at)).values())


def test_what_is_done_to_tokens_is_done_to_extents_and_validity():
    at = Positions.grids(SIZES, length=31).with_prefix(1)
    assert (at.box, at.axes, at.extent.tolist()) == ((5, 6), 2, [list(size) for size in SIZES])
    assert at.held().sum(1).tolist() == [7, 31, 9]
    index = torch.stack([torch.arange(25, 31), torch.arange(6), torch.arange(5, 11)])
    some = at.take(index)
    assert some.valid.sum(1).tolist() == [0, 6, 3]
    assert (some.prefix, some.on_grid, some.box, some.extent is at.extent) == (1, True, (5, 6), True)
    assert torch.equal(at.take(index[0]).valid, at.valid[:, 25:31])
    assert at.with_prefix(0).memoize("a", lambda: 1) == 1

    row = Positions.packed(SIZES).with_prefix(6)
    assert row.segments().tolist() == [[0, 0, 1, 1, 2, 2] + [0] * 6 + [1] * 30 + [2] * 8]
    assert row.take(torch.tensor([0, 40])).segments()[0, 6:].tolist() == [0, 2]
    assert torch.equal(row.sizes()[0, :, 0], row.extent[row.segments()[0], 0].double())
    assert together(Positions.grid((2, 3))) is None
    for one in (at, row):
        leaves, spec = _pytree.tree_flatten(one)
        back = _pytree.tree_unflatten(leaves, spec)
        assert (back.extent is one.extent, back.segment is one.segment, back.valid is one.valid) == (True,) * 3
        assert (back.box, back.prefix) == (one.box, one.prefix)


def test_frozen_tells_grids_apart():
    model = Attention(HEADS * DIM, HEADS, position=encoding_of("rope", "ntk")).eval()
    places = [Positions.grids(sizes, length=30) for sizes in (SIZES, SIZES[::-1])]
    with torch.no_grad(), frozen(model):
        first, other = (model.position(at).q_rotation.cos for at in places)
        again = model.position(Positions.grids(SIZES, length=30)).q_rotation.cos
    assert not torch.equal(first, other)
    assert first is again


@pytest.mark.parametrize("word", ["rope", "rope_mixed", "alibi(distance=squared)"])
def test_a_graph_serves_other_grids(word):
    encoding, compiled = encoding_of(word, encoding_of(word).policies[-1], "log"), []

    def cosine(coords, extent, valid):
        return tensors(encoding(Positions(coords, extent, on_grid=True, valid=valid, box=(5, 6))))

    graph = torch.compile(cosine, backend=lambda g, _: compiled.append(g) or g.forward, fullgraph=True)
    for sizes in (SIZES, [(5, 6), (3, 3), (1, 2)]):
        at = Positions.grids(sizes, length=30)
        for name, tensor in graph(at.coords, at.extent, at.valid).items():
            torch.testing.assert_close(tensor, tensors(encoding(at))[name], atol=1e-10, rtol=0)
    assert len(compiled) == 1


WRONG = {
    "extents": (lambda c: Positions(c, torch.ones(2, 2).long()), r"int64 \(B, d\), B = 3.*\(2, 2\)"),
    "numbers": (lambda c: Positions(c, torch.ones(3, 2)), "int64.*torch.float32"),
    "valid": (lambda c: Positions(c, (4, 4), valid=torch.ones(3, 5).bool()), r"valid must be .*N = 6.*\(3, 5\)"),
    "segment": (lambda c: Positions(c, (4, 4), segment=torch.ones(1, 6)), "segment must be torch.int64"),
    "one extent": (lambda c: Positions.grids([(2, 3), (4, 1)]).span, "one extent for all, and these places have 2"),
    "no grid": (lambda c: Positions.grids([]), "at least one extent"),
    "axes": (lambda c: Positions.packed([(2, 3), (4,)]), "all of as many axes"),
    "empty": (lambda c: Positions.grids([(2, 0)]), "a place along each"),
    "short": (lambda c: Positions.grids([(2, 3)], length=5), "at least 6"),
    "short row": (lambda c: Positions.packed([(2, 3), (1, 1)], length=6), "at least 7"),
    "prefix": (lambda c: Positions.packed([(2, 3), (1, 1)]).with_prefix(3).segments(), "as many prefix tokens of each"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_errors_say_what_came(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.zeros(3, 6, 2))


def test_a_table_that_is_too_small_for_one_image_is_refused():
    with pytest.raises(ConfigError, match="4x3 places, and the grid has 5x6"):
        encoding_of("learned", "subtable")(Positions.grids(SIZES))
    encoding = encoding_of("learned", "subtable")
    both = encoding(Positions.grids([(2, 3), (3, 2)])).token
    for i, size in enumerate([(2, 3), (3, 2)]):
        torch.testing.assert_close(both[i : i + 1], encoding(Positions.grid(size)).token, atol=1e-10, rtol=0)
