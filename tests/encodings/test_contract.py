"""Every name in ENCODINGS keeps the contract; the contract turns red for encodings that do not."""

import pytest
import torch

from vit2dpe.encodings import ENCODINGS, Dims, PositionEncoding, build
from vit2dpe.errors import ConfigError
from vit2dpe.positions import distance, exact
from vit2dpe.testing import ContractError, check_encoding

# An idea that exists for some numbers of axes only says so here.
AXES = {"lookhere": (1, 2)}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_keeps_the_contract(name):
    check_encoding(name, axes=AXES.get(name, (1, 2, 3)))


@pytest.mark.parametrize(
    "word", ["sincos+rope", "relative+alibi+learned", "sincos(layout=timm)", "relative(shared=true)"]
)
def test_sums_and_options_keep_it_too(word):
    check_encoding(word, axes=(2,))


class Penalty(PositionEncoding):
    """A correct little encoding: minus the distance. The faults below are variations of it and of Wave."""

    relative = True
    gives = frozenset({"bias"})

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def bias(self, q, k):
        return -distance(q, k)[:, None].expand(-1, self.heads, -1, -1)


class Wave(PositionEncoding):
    gives = frozenset({"token"})

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def token(self, at):
        k = torch.arange(1, self.dim + 1, dtype=torch.float64)
        return (exact(at.coords).sum(-1, keepdim=True) / k).sin()


def test_correct_examples_pass():
    check_encoding(lambda d: Penalty(d.heads), axes=(1, 2))
    check_encoding(lambda d: Wave(d.width), axes=(1, 2))


class Turned(PositionEncoding):
    """Right: fixed angles, learned slopes, and a parameter that is frozen."""

    relative = True
    gives = frozenset({"rotation", "bias"})

    def __init__(self, head_dim, heads):
        super().__init__()
        self.head_dim = head_dim
        self.slope = torch.nn.Parameter(torch.ones(heads))
        self.unit = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def angle(self, at):
        turns = torch.arange(1, self.head_dim // 2 + 1, dtype=torch.float64) / 10
        return exact(at.coords).sum(-1)[:, None, :, None] * turns

    def bias(self, q, k):
        return -distance(q, k)[:, None] * (self.unit * self.slope).double()[:, None, None]


@pytest.mark.need("A3")
@pytest.mark.parametrize("word", ["alibi+relative", "relative+rope", "rope+relative", "rope+rope_golden", "logcpb+t5"])
def test_what_is_fixed_and_what_learns_go_together_in_any_order(word):
    check_encoding(word, axes=(2,))


@pytest.mark.need("A4")
@pytest.mark.parametrize(
    "encoding", [Turned, Turned(6, 2), Penalty, Penalty(5), Wave, Wave(10), ENCODINGS["relative"]],
    ids=["class", "instance", "class", "instance", "class", "instance", "builder"],
)  # fmt: skip
def test_a_class_an_instance_and_a_builder_are_taken(encoding):
    check_encoding(encoding)


@pytest.mark.need("A4")
def test_an_instance_is_checked_for_the_axes_it_accepts():
    built = build("relative", Dims(24, 2, (5, 7)))
    state = {name: value.clone() for name, value in built.state_dict().items()}
    check_encoding(built)
    assert all(torch.equal(value, state[name]) for name, value in built.state_dict().items())
    with pytest.raises(ValueError, match="2"):
        check_encoding(built, axes=(3,))


@pytest.mark.need("A4")
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (3, "got int"),
        (torch.nn.Linear(2, 3), "got Linear"),
        (torch.nn.Linear, "'in_features', which no model knows"),
        (lambda dims: None, "builds a NoneType"),
    ],
)
def test_what_is_no_encoding_is_refused_by_name(encoding, message):
    with pytest.raises(ConfigError, match=message):
        check_encoding(encoding)


class WrongFact(Penalty):
    relative = False


class FalselyRelative(Wave):
    relative = True


class UndeclaredField(Penalty):
    gives = frozenset({"token"})


class CountsTokens(Wave):
    def token(self, at):  # the grid guessed from how many tokens there are
        return super().token(at) + at.coords.shape[1]


class Remembers(Wave):
    def token(self, at):
        self.calls = getattr(self, "calls", 0) + 1
        return super().token(at) * self.calls


class HalfPrecision(Wave):
    def token(self, at):
        return super().token(at).bfloat16()


class SinglePrecision(Wave):
    def token(self, at):  # float32 angles
        k = torch.arange(1, self.dim + 1, dtype=torch.float32)
        return (at.coords.sum(-1, keepdim=True) * (1 / k)).sin()


class DeadParameter(Penalty):
    def __init__(self, heads):
        super().__init__(heads)
        self.unused = torch.nn.Parameter(torch.ones(3))


class DropsGradient(Penalty):
    def __init__(self, heads):
        super().__init__(heads)
        self.slope = torch.nn.Parameter(torch.ones(heads))

    def bias(self, q, k):
        return super().bias(q, k) * (self.slope + self.slope.detach())[:, None, None]


class DetachedAngle(Turned):
    def angle(self, at):
        return super().angle(at) * self.slope.detach().sum()


class IgnoresAxes(Wave):
    def token(self, at):
        k = torch.arange(1, self.dim + 1, dtype=torch.float64)
        return (exact(at.coords)[..., :2].sum(-1, keepdim=True) / k).sin()


class Rounds(Wave):
    def token(self, at):
        k = torch.arange(1, self.dim + 1, dtype=torch.float64)
        return (exact(at.coords).add(0.25).round().sum(-1, keepdim=True) / k).sin()


class CountsFromTheKeysGiven(Penalty):
    """Right for all keys in any order, wrong as soon as one is missing."""

    def bias(self, q, k):
        middle = exact(k.coords) - exact(k.coords).mean(dim=1, keepdim=True)
        return -middle.norm(dim=-1)[:, None, None].expand(-1, self.heads, q.coords.shape[1], -1)


FAULTS = [
    (lambda d: CountsFromTheKeysGiven(d.heads), "not the gather"),
    (lambda d: WrongFact(d.heads), "not declared relative"),
    (lambda d: FalselyRelative(d.width), "declared relative"),
    (lambda d: UndeclaredField(d.heads), "gives"),
    (lambda d: CountsTokens(d.width), "not the gather"),
    (lambda d: Remembers(d.width), "gather|second call|not the same|behind"),
    (lambda d: HalfPrecision(d.width), "off by"),
    (lambda d: SinglePrecision(d.width), "off by"),
    (lambda d: DeadParameter(d.heads), "no gradient"),
    (lambda d: DropsGradient(d.heads), "gradients are wrong"),
    (lambda d: DetachedAngle(d.head_dim, d.heads), "gradients are wrong"),
    (lambda d: IgnoresAxes(d.width), "ignored"),
    (lambda d: Rounds(d.width), "jumps"),
]


@pytest.mark.parametrize(("make", "message"), FAULTS, ids=range(len(FAULTS)))
def test_a_broken_promise_is_named(make, message):
    with pytest.raises(ContractError, match=message):
        check_encoding(make, axes=(2,))
