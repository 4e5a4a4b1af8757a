"""Powers of a scale, ways of resizing and powers of a temperature: what they are, and what is refused."""

import math

import pytest
import torch

from tests.resolution.test_resolution import LARGE, TRAIN, micro
from vit2dpe import ConfigError, set_policy
from vit2dpe.encodings import Dims, build
from vit2dpe.encodings.tables import RESIZES, channels_first
from vit2dpe.positions import Positions
from vit2dpe.resolution.apply import use_policy
from vit2dpe.resolution.policies import NTK, Interpolate, LogTemperature, Resize, YaRN, YaRNTemperature

WIDE = (2, 3, 24, 40)  # 6x10 patches


@torch.no_grad()
def test_power_0_extrapolates_and_power_1_is_the_policy_itself():
    model, x = micro("sincos+rope"), torch.randn(WIDE)
    with use_policy(model, "extrapolate"):
        raw = model(x)
    for policy, same in [
        ("interpolate(power=0)", raw),
        ("interpolate(power=1)", None),
        ("interpolate(power=(1, 1))", None),
    ]:
        with use_policy(model, "interpolate"):
            whole = model(x)
        with use_policy(model, policy):
            assert torch.equal(model(x), whole if same is None else same), policy
        assert not torch.equal(raw, whole)


def test_each_axis_has_its_power():
    at = Positions.grid(LARGE)
    places = Interpolate(TRAIN, power=(0.5, 2)).place(at).coords[0]
    rows, columns = (at.coords[0].double() + 0.5).unbind(-1)
    expected = torch.stack([rows * (3 / 6) ** 0.5 - 0.5, columns * (4 / 10) ** 2 - 0.5], -1)
    torch.testing.assert_close(places.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [NTK, YaRN])
def test_frequencies_of_a_power_are_those_of_the_scale_to_that_power(kind):
    w = build("rope(base=50)", Dims(32, 2, (4, 4))).frequencies(torch.device("cpu"))
    by_power = kind((4, 4), power=0.5).rescale(w, (16, 4))  # s = 4^0.5 = 2 along rows, 1 along columns
    torch.testing.assert_close(by_power, kind((4, 4)).rescale(w, (8, 4)), rtol=1e-12, atol=0)
    assert torch.equal(kind((4, 4), power=0).rescale(w, (16, 4)), w)


def test_powers_of_a_temperature():
    log = math.log(60) / math.log(12)
    assert LogTemperature(TRAIN, 0.5)(LARGE) == pytest.approx(log**0.5, rel=1e-12)
    assert LogTemperature(TRAIN, -1)(LARGE) == pytest.approx(1 / log, rel=1e-12)
    assert YaRNTemperature(TRAIN, 0.5)(LARGE) == pytest.approx(YaRNTemperature(TRAIN)(LARGE) ** 0.5, rel=1e-12)
    assert LogTemperature(TRAIN, 3)(TRAIN) == 1
    assert LogTemperature(TRAIN, 2)((1, 1)) == 0
    with pytest.raises(ConfigError, match="a grid of training of one place has 0"):
        LogTemperature((1, 1))
    with pytest.raises(ConfigError, match="divides by ln N, and one place has 0"):
        LogTemperature(TRAIN, -1)((1, 1))


@pytest.mark.parametrize("word", ["learned", "factorized", "windowed", "relative"])
@torch.no_grad()
def test_every_way_that_a_table_names_is_a_way_it_can_be_resized(word):
    model, x = micro(word), torch.randn(WIDE)
    (encoding, *_) = [m for m in model.modules() if getattr(m, "resizes", ())]
    seen = [model(x)]
    for mode in encoding.resizes:
        with use_policy(model, f"resize(mode={mode})"):
            seen.append(model(x))
    assert torch.equal(seen[0], seen[1]), "the first one is its own"
    assert len({round(float(out.abs().sum()), 4) for out in seen}) == len(encoding.resizes)


@torch.no_grad()
def test_a_mode_is_the_option_of_the_encoding():
    x, plain = torch.randn(WIDE), micro("learned(resize=plain)")
    other = micro("learned")
    other.load_state_dict(plain.state_dict())
    with use_policy(other, "resize(mode=plain)"):
        assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize(("power", "between"), [(1.5, (8, 16)), (0, (4, 4)), ((2, 1), (12, 10))])
@torch.no_grad()
def test_a_power_resizes_a_table_to_another_size_and_takes_its_middle(power, between):
    """3x4 places at 6x10: T s^1.5 = 8.5 and 15.8, the even sizes next to them leave as much on both sides."""
    encoding = build("learned", Dims(8, 2, TRAIN))
    encoding.own_policy = Resize(TRAIN, power=power)
    table = RESIZES["antialias"](channels_first(encoding.pos_embed[0]), between)
    for axis, size in enumerate(LARGE, start=1):
        index = torch.arange(size) - (size - table.shape[axis]) // 2
        table = table.index_select(axis, index.clamp(0, table.shape[axis] - 1))
    assert torch.equal(encoding(Positions.grid(LARGE)).token[0], table.flatten(1).t())


@torch.no_grad()
def test_power_0_of_a_table_over_offsets_keeps_its_entries_and_repeats_the_last():
    encoding = build("relative", Dims(8, 2, (3, 3)))
    encoding.own_policy = Resize((3, 3), power=0)
    table = encoding._resized((9, 5))
    old = encoding.relative_position_bias_table
    assert torch.equal(table[:, 2:7], old)
    assert torch.equal(table[:, 0], old[:, 0])
    assert torch.equal(table[:, 8], old[:, 4])


@torch.no_grad()
def test_each_of_a_sum_takes_the_first_of_several_policies_that_it_can():
    model, x = micro("learned+rope"), torch.randn(WIDE)
    with use_policy(model, "resize+interpolate(power=0.5)"):
        table, rotation = model.position.terms
        assert (table.policy.name, rotation.policy.name, rotation.policy.power) == ("resize", "interpolate", 0.5)
        assert not torch.equal(model(x), micro("learned+rope")(x))
    with pytest.raises(ConfigError, match="AxialRoPE cannot resize"), use_policy(model, "resize"):
        pass


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("interpolate(power=9)", "power of interpolate must be one number or 2.*within 8 of 0; got 9"),
        ("interpolate(power=(1, 1, 1))", "one number or 2"),
        ("ntk(power=fast)", "must be a finite number or tuple"),
        ("resize(mode=cubic)", "unknown mode of resize 'cubic'.*antialias"),
        ("extrapolate(power=1)", "unknown option of extrapolate 'power'"),
    ],
)
def test_what_is_no_power_and_no_mode_is_refused(policy, message):
    with pytest.raises(ConfigError, match=message), use_policy(micro("rope"), policy):
        pass


def test_a_way_that_a_table_has_not_is_refused_by_name():
    with (
        pytest.raises(ConfigError, match=r"LearnedTable has no table that is resized by geometric.*antialias, plain"),
        use_policy(micro("learned"), "resize(mode=geometric)"),
    ):
        pass


@pytest.mark.parametrize("temperature", ["log(power=9)", "log(base=2)", "log+yarn", "hot"])
def test_what_is_no_temperature_is_refused(temperature):
    with pytest.raises(ConfigError, match=r"temperature|option of log"), use_policy(micro(), temperature=temperature):
        pass


@pytest.mark.parametrize(
    ("word", "policy"),
    [
        ("learned", "resize(power=1.5)"),
        pytest.param("rope", "yarn(power=(0.5, 2))", marks=pytest.mark.slow),
        pytest.param("sincos", "interpolate(power=0.25)", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_compiled_models_follow_powers(word, policy):
    model, x = micro(word), torch.randn(WIDE)
    set_policy(model, policy, temperature="log(power=0.5)")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=2e-5)


def test_a_table_of_dino_has_its_gradient_where_an_axis_keeps_its_size():
    """Resizing is linear; torch's backward copies such an axis, which the forward moves by 0.1 patch."""
    table = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: RESIZES["dino"](t, (4, 13)), table)
    assert torch.autograd.gradcheck(lambda t: RESIZES["dino"](t, (5, 6)), table)
