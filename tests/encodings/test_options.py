"""Options: each one does something, each impossible value is refused by a line that names it and what is possible."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import randn, within
from vit2dpe import ENCODINGS, ConfigError, Dims, Positions, build
from vit2dpe.encodings import Alibi, Factorized, Fire, Jitter, LearnedTable, LogCPB, RelativeBias, WindowedTable
from vit2dpe.encodings.learned import MODES
from vit2dpe.encodings.tables import RESIZES, resize, resize_geometric
from vit2dpe.testing import randomise, tensors

DIMS = {1: Dims(48, 6, (7,), depth=4), 2: Dims(48, 6, (3, 5), depth=4)}
OTHER = {1: (9,), 2: (2, 13)}  # another extent than that of training


def drawn(word, axes=2):
    encoding = build(word, DIMS[axes]).eval()
    torch.manual_seed(0)
    return randomise(encoding)


@torch.no_grad()
def signal(encoding, axes=2):
    at = Positions.grid(OTHER[axes])
    return tensors(encoding(at))


close = within(1e-6)


# each option has an effect -----------------------------------------------------------------------------------------

# (name, option): values of which each gives another Signal with the same parameters.
TURNS = {
    ("sincos", "base"): [10_000, 100],
    ("sincos", "layout"): ["mae", "big_vision", "timm", "wzlxjtu", "tatp22"],
    ("learned", "resize"): list(MODES),
    ("learned", "keep_aspect"): ["false", "true"],
    ("factorized", "keep_aspect"): ["false", "true"],
    ("relative", "resize"): ["bicubic", "geometric"],
    ("relative", "symmetric"): ["false", "true"],
    ("t5", "max_distance"): [128, 11],
    ("t5", "bidirectional"): ["true", "false"],
    ("alibi", "distance"): ["euclidean", "squared", "manhattan", "chebyshev"],
    ("alibi", "slopes"): ["fixed", "learned", "axes"],
    ("kerple", "form"): ["log", "power"],
    ("kerple", "distance"): ["euclidean", "squared", "manhattan", "chebyshev"],
    ("lookhere", "view"): [90, 180, 45],
    ("lookhere", "slope"): [1.0, 0.5],
    ("rope", "base"): [100, 10],
    ("rope", "step"): [1.0, 0.5],
    ("rope", "start"): [0.0, 1.0],
    ("logcpb", "form"): ["swin", "cr"],
    ("rope_golden", "low"): [1, 2.5],
    ("rope_golden", "high"): [100, 30],
    ("rope_dinov3", "base"): [100, 10],
}
# (name, option): two values, and the entry of the state_dict whose shape they change.
SIZES = {
    ("windowed", "window"): (4, 3, "pos_embed_window"),
    ("fourier", "features"): (24, 8, "freqs"),
    ("fourier", "hidden"): (24, 8, "mlp.0.weight"),
    ("logcpb", "hidden"): (512, 8, "cpb_mlp.0.weight"),
    ("fire", "hidden"): (32, 8, "mlp.0.weight"),
    ("t5", "buckets"): (32, 8, "relative_attention_bias"),
}
# (name, option): two values under which parameters are drawn differently from the same seed.
DRAWS = {("fourier", "gamma"): (2.0, 8.0), ("rope_mixed", "base"): (10, 100)}
SHARED = ["relative", "logcpb", "fire", "kerple"]
SAMPLED = ["learned", "windowed", "factorized", "relative"]  # in test_between.py
IN_TRAINING = {"rescale": (2.0, 1.0), "jitter": (1.0, 1.5), "shift": (0.0, 0.5)}  # of rope_dinov3
ELSEWHERE = {("fire", "reach"), ("relative", "prefix")}  # below, on a line; test_timm_tables.py
SECTIONS = ("sections", "partial", "zeros", "order", "bank")  # test_sections.py, and these
ELSEWHERE |= {(name, key) for name in ("rope", "rope_mixed", "rope_dinov3") for key in SECTIONS}
ELSEWHERE |= {
    ("rope", "llama3"),
    ("rope", "factors"),
    ("rope_mixed", "step"),
    ("rope_mixed", "start"),
    ("rope_dinov3", "step"),
}


@pytest.mark.parametrize(("option", "values"), TURNS.items(), ids=[f"{name}-{option}" for name, option in TURNS])
def test_each_value_gives_another_signal(option, values):
    """With the same parameters; the first value is the default."""
    name, key = option
    found = [signal(drawn(f"{name}({key}={value})")) for value in values]
    default = signal(drawn(name))
    for field in default:
        close(found[0][field], default[field], 0.0)
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert any(float((one[field] - other[field]).abs().max()) > 1e-3 for field in one)


@pytest.mark.parametrize(("option", "values"), SIZES.items(), ids=[f"{name}-{option}" for name, option in SIZES])
def test_a_size_changes_the_shape_it_names(option, values):
    """Its parameter has another shape, the default being the first; the Signal is of the same shape and finite."""
    (name, key), (default, other, parameter) = option, values
    plain, one, two = drawn(name), drawn(f"{name}({key}={default})"), drawn(f"{name}({key}={other})")
    assert plain.state_dict()[parameter].shape == one.state_dict()[parameter].shape != two.state_dict()[parameter].shape
    assert other in two.state_dict()[parameter].shape or 2 * two.state_dict()[parameter].shape[-1] == other
    a, b = signal(one), signal(two)
    assert {field: tensor.shape for field, tensor in a.items()} == {field: tensor.shape for field, tensor in b.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in b.values())


@pytest.mark.parametrize(("option", "values"), DRAWS.items(), ids=[f"{name}-{option}" for name, option in DRAWS])
def test_a_spread_changes_what_is_drawn(option, values):
    """From the same seed other frequencies; gamma by exactly its ratio."""
    (name, key), frequencies = option, []
    for value in values:
        torch.manual_seed(0)
        frequencies.append(build(f"{name}({key}={value})", DIMS[2]).freqs.detach())
    assert not torch.equal(*frequencies)
    if key == "gamma":
        close(frequencies[0] / values[1], frequencies[1] / values[0])


@pytest.mark.parametrize("name", SHARED)
def test_shared_puts_one_into_the_model(name):
    """By default every block owns one."""
    assert build(name, DIMS[2]).per_block
    assert build(f"{name}(shared=false)", DIMS[2]).per_block
    assert not build(f"{name}(shared=true)", DIMS[2]).per_block


@pytest.mark.parametrize(("option", "values"), IN_TRAINING.items(), ids=IN_TRAINING)
def test_dinov3s_options_act_in_training_alone(option, values):
    """With the two others off: off gives what evaluation gives, on gives something else; evaluation never changes."""
    off = dict(rescale=1.0, jitter=1.0, shift=0.0)
    words = [", ".join(f"{key}={value}" for key, value in (off | {option: value}).items()) for value in values]
    one, two = (build(f"rope_dinov3({word})", DIMS[2]) for word in words)
    idle, busy = (one, two) if values[0] == off[option] else (two, one)
    evaluated = signal(idle.eval())["q_rotation.cos"]
    close(signal(busy.eval())["q_rotation.cos"], evaluated, 0.0)
    close(signal(idle.train())["q_rotation.cos"], evaluated, 0.0)
    assert float((signal(busy.train())["q_rotation.cos"] - evaluated).abs().max()) > 1e-3


def test_fires_reach_is_the_querys_place_on_a_line():
    """The default there; "extent" is relative, has no threshold and gives another bias."""
    query, extent = drawn("fire", 1), drawn("fire(reach=extent)", 1)
    assert (query.reach, query.relative, extent.relative) == ("query", False, True)
    assert extent.threshold is None
    assert drawn("fire", 2).reach == "extent"
    assert float((signal(query, 1)["bias[0]"] - signal(extent, 1)["bias[0]"]).abs().max()) > 1e-3


def test_lookheres_slope_falls_with_depth():
    """From 1.5 in the first block to 0.5 in the last; outside a stack it is 1."""
    here = [ENCODINGS["lookhere"](Dims(48, 6, (3, 5), block=block, depth=5)).slope_here for block in (0, 2, 4, None)]
    assert here == [1.5, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("name", sorted({name for name, _ in (*TURNS, *SIZES, *DRAWS)} | {*SHARED, "rope_dinov3"}))
def test_no_option_is_left_out(name):
    """Every option of these encodings is among those tested above."""
    builder = ENCODINGS[name]
    options = set(inspect.signature(builder.encoding).parameters) - set(builder.arguments(DIMS[2]))
    tested = {key for owner, key in (*TURNS, *SIZES, *DRAWS, *ELSEWHERE) if owner == name}
    tested |= {"shared"} if name in SHARED else set()
    tested |= {"sample"} if name in SAMPLED else set()
    tested |= set(IN_TRAINING) if name == "rope_dinov3" else set()
    assert options == tested


# what is refused ---------------------------------------------------------------------------------------------------

REFUSED = [
    # (word, axes, what came, what is possible)
    ("sincos(layout=moe)", 2, "'moe'", "did you mean 'mae'.*mae, big_vision, timm, wzlxjtu, tatp22"),
    ("sincos(base=1)", 2, "got 1", "base > 1"),
    ("sincos(base=-3)", 2, "got -3", "base > 1"),
    ("learned(resize=plan)", 2, "'plan'", "did you mean 'plain'.*antialias, plain, dino"),
    ("learned(resize=foo)", 2, "'foo'", "antialias, plain, dino"),
    ("relative(resize=cubic)", 2, "'cubic'", "bicubic, geometric"),
    ("relative(shared=maybe)", 2, "'maybe'", "bool"),
    ("relative(shared=1)", 2, "got 1", "bool"),
    ("windowed(window=0)", 2, "0$", "at least 1"),
    ("windowed(window=2.5)", 2, "2.5", "int"),
    ("windowed(window=true)", 2, "True", "int"),
    ("fourier(features=5)", 2, "features=5", "even number of features"),
    ("fourier(features=0)", 2, "features=0", "even number of features"),
    ("fourier(hidden=0)", 2, "hidden=0", "a hidden width"),
    ("fourier(gamma=0)", 2, "gamma=0", "gamma > 0"),
    ("logcpb(hidden=0)", 2, "0$", "at least 1"),
    ("fire(hidden=0)", 2, "0$", "at least 1"),
    ("fire(reach=extend)", 2, "'extend'", "did you mean 'extent'.*extent, query"),
    ("fire(reach=query)", 2, r"\(3, 5\)", "one axis"),
    ("t5(buckets=7)", 2, "buckets=7", "even number of buckets, at least 4"),
    ("t5(buckets=2)", 2, "buckets=2", "at least 4"),
    ("t5(max_distance=8)", 2, "max_distance=8", r"beyond the exact ones \(8\)"),
    ("t5(bidirectional=false, max_distance=16)", 2, "max_distance=16", r"beyond the exact ones \(16\)"),
    (
        "alibi(distance=manhatten)",
        2,
        "'manhatten'",
        "did you mean 'manhattan'.*euclidean, squared, manhattan, chebyshev",
    ),
    ("alibi(slopes=fix)", 2, "'fix'", "fixed, learned, axes"),
    ("kerple(distance=far)", 2, "'far'", "euclidean, squared, manhattan, chebyshev"),
    ("kerple(form=pow)", 2, "'pow'", "did you mean 'power'.*log, power"),
    ("lookhere(view=0)", 2, " 0 ", "0 < view <= 360"),
    ("lookhere(view=361)", 2, "361", "0 < view <= 360"),
    ("lookhere(slope=0)", 2, "0$", "slope > 0"),
    ("rope(base=1)", 2, "got 1", "base > 1"),
    ("rope(base=0.5)", 1, "got 0.5", "base > 1"),
    ("rope(base=ten)", 2, "'ten'", "number"),
    ("rope(base=1e999)", 2, "inf", "finite number"),
    ("rope(base=true)", 2, "True", "number"),
    ("rope(step=0)", 2, "got 0", "step > 0"),
    ("rope(step=(1, 2, 3))", 2, r"\(1, 2, 3\)", "one number or 2"),
    ("logcpb(form=cz)", 2, "'cz'", "swin, cr"),
    ("rope_mixed(base=1)", 2, "got 1", "base > 1"),
    ("rope_golden(low=0)", 2, "low=0", "0 < low <= high"),
    ("rope_golden(low=3, high=2)", 2, "low=3 and high=2", "0 < low <= high"),
    ("rope_dinov3(base=1)", 2, "got 1", "base > 1"),
    ("rope_dinov3(rescale=0.5)", 2, "got 0.5", "rescale >= 1"),
    ("rope_dinov3(jitter=0.5)", 2, "0.5", "jitter >= 1"),
    ("rope_dinov3(shift=-0.1)", 2, "-0.1", "shift >= 0"),
    ("none(base=3)", 2, "'base'", "takes none"),
]


@pytest.mark.parametrize(("word", "axes", "came", "possible"), REFUSED, ids=[word for word, *_ in REFUSED])
def test_an_impossible_value_is_named_with_what_is_possible(word, axes, came, possible):
    with pytest.raises(ConfigError, match=came) as error:
        build(word, DIMS[axes])
    assert error.match(possible)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_option_nobody_has_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match=r"unknown option of .* 'colour'") as error:
        build(f"{name}(colour=3)", DIMS[2])
    assert "known: " in str(error.value)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_value_of_a_wrong_type_is_refused(name):
    """No option of any encoding takes a list."""
    builder = ENCODINGS[name]
    for option in set(inspect.signature(builder.encoding).parameters) - set(builder.arguments(DIMS[2])):
        with pytest.raises(ConfigError, match=rf"option {option} of .* must be .*got \[1, 2\]"):
            build(f"{name}({option}=[1, 2])", DIMS[2])


def test_a_step_of_each_axis():
    """One number is that number for each; two are rows and columns."""
    rope, same, rows = (build(f"rope(step={step})", DIMS[2]) for step in ("0.5", "(0.5, 0.5)", "(0.5, 1.0)"))
    assert torch.equal(rope.frequencies(torch.device("cpu")), same.frequencies(torch.device("cpu")))
    assert torch.equal(rows.frequencies(torch.device("cpu"))[0], rope.frequencies(torch.device("cpu"))[0])
    assert torch.equal(rows.frequencies(torch.device("cpu"))[1], 2 * rope.frequencies(torch.device("cpu"))[1])


SIZELESS = [
    (lambda: build("sincos", Dims(6, 1, (3, 5))), "multiple of 2 x axes: got dim=6, axes=2"),
    (lambda: build("sincos(layout=big_vision)", Dims(4, 1, (3, 5))), "two frequencies an axis: got dim=4, axes=2"),
    (lambda: build("rope", Dims(10, 2, (3, 5))), "even head width, got 5"),
    (lambda: build("rope_mixed", Dims(10, 2, (3, 5))), "even head width, got 5"),
    (lambda: build("rope_dinov3", Dims(10, 2, (3, 5))), "even head width, got 5"),
    (lambda: build("rope_golden", Dims(6, 2, (3, 5))), "even head width, got 3"),
    (lambda: build("rope", Dims(13, 2, (3, 5))), "multiple of the heads: got 13 and 2"),
    (lambda: build("lookhere", Dims(12, 2, (2, 3, 4))), "1 or 2 axes, got axes=3"),
    (lambda: Alibi(0), "at least one head, got heads=0"),
    (lambda: LearnedTable(4, ()), r"each at least 1, got \(\)"),
    (lambda: LearnedTable(4, (3, 0)), r"each at least 1, got \(3, 0\)"),
    (lambda: Factorized(4, (0,)), r"each at least 1, got \(0,\)"),
    (lambda: RelativeBias(2, ()), r"each at least 1, got \(\)"),
    (lambda: WindowedTable(4, (3, 0)), r"at least 1, got \(3, 0\)"),
    (lambda: LogCPB(2, (0, 3)), r"at least 1, got \(0, 3\)"),
    (lambda: Fire(2, (0, 3)), r"at least 1, got \(0, 3\)"),
    (lambda: Jitter(build("alibi", DIMS[2]), 0.0), "amount above 0, got 0.0"),
]


@pytest.mark.parametrize(("make", "message"), SIZELESS, ids=range(len(SIZELESS)))
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# resizing ----------------------------------------------------------------------------------------------------------

TABLE_MODES = {
    **{f"learned {mode}": RESIZES[mode] for mode in MODES},
    "factorized": lambda table, sizes: resize(table, sizes, mode="bilinear", antialias=False),
    "relative bicubic": lambda table, sizes: resize(table, sizes, antialias=False),
    "relative geometric": resize_geometric,
}
FROM = {1: (7,), 2: (3, 5), 3: (3, 5, 7)}
TO = {1: [(1,), (4,), (13,)], 2: [(1, 1), (1, 9), (9, 1), (7, 5), (2, 3), (9, 13)], 3: [(5, 3, 9), (3, 1, 7)]}


@pytest.mark.parametrize("axes", FROM)
@pytest.mark.parametrize("how", TABLE_MODES.values(), ids=TABLE_MODES)
def test_the_same_size_keeps_every_bit(how, axes):
    table = randn(4, *FROM[axes])
    assert torch.equal(how(table, FROM[axes]), table)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_size_keeps_every_bit_compiled_too(mode):
    """Compiled code has no branch on the size; the training grid must still read the table as it is."""
    encoding, at = drawn(f"learned(resize={mode})"), Positions.grid((3, 5))
    torch._dynamo.reset()
    compiled = torch.compile(lambda where: encoding(where).token, fullgraph=True, backend="aot_eager")
    assert torch.equal(encoding(at).token[0], encoding.pos_embed.flatten(0, 2))
    close(compiled(at), encoding(at).token, 0.0)


@pytest.mark.parametrize("axes", FROM)
@pytest.mark.parametrize("how", TABLE_MODES.values(), ids=TABLE_MODES)
def test_a_constant_table_stays_constant(how, axes):
    values = torch.tensor([-2.0, 0.0, 0.5, 3.0]).view(4, *[1] * axes)
    for sizes in TO[axes]:
        resized = how(values.expand(4, *FROM[axes]).clone(), sizes)
        assert resized.shape == (4, *sizes)
        close(resized, values.expand(4, *sizes), 6e-6)


@pytest.mark.parametrize("extent", [(6, 7), (2, 3), (1, 9), (9, 1), (6, 5), (3, 8)])
@torch.no_grad()
def test_dinos_mode_is_its_scale_factor(extent):
    """Both axes by the factor (size + 0.1) / old, one that keeps its size among them, unless both do; not "plain"."""
    dino, plain = drawn("learned(resize=dino)"), drawn("learned(resize=plain)")
    table, at = dino.pos_embed.detach().permute(0, 3, 1, 2), Positions.grid(extent)
    factors = tuple((size + 0.1) / old for size, old in zip(extent, (3, 5), strict=True))
    expected = F.interpolate(table, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)
    close(dino(at).token, expected, 1e-6)
    assert float((dino(at).token - plain(at).token).abs().max()) > 1e-3


@pytest.mark.parametrize("mode", ["antialias", "plain"])
@pytest.mark.parametrize("extent", [(6, 7), (2, 3), (1, 9), (9, 1), (6, 5), (3, 8)])
@torch.no_grad()
def test_the_other_modes_are_a_bicubic_resize_of_the_image(mode, extent):
    """Each axis resized as the last of a picture: with antialias and a last axis of 1 torch 2.15 resizes wrongly."""
    encoding, at = drawn(f"learned(resize={mode})"), Positions.grid(extent)
    image = encoding.pos_embed.detach().permute(0, 3, 1, 2)  # (1, D, 3, 5)
    for axis, size in ((2, extent[0]), (3, extent[1])):
        if image.shape[axis] != size:
            moved = image.movedim(axis, -1)
            rows = moved.reshape(1, 1, -1, moved.shape[-1])
            rows = F.interpolate(rows, (rows.shape[-2], size), mode="bicubic", antialias=mode == "antialias")
            image = rows.reshape(*moved.shape[:-1], size).movedim(-1, axis)
    close(encoding(at).token, image.flatten(2).transpose(1, 2), 2e-6)
