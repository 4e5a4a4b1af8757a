"""torch.compile: one graph for the first size, one for all others, or one for all of them, and no break."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers import micro_vit
from vit2dpe import Swin, TextDecoder, TextEncoder, use_policy
from vit2dpe.encodings import ENCODINGS
from vit2dpe.errors import ConfigError

# Pooled over patches: at depth 1 a class token, which stands nowhere, sees no bias.
SIZES = ((32, 32), (48, 48), (32, 48), (48, 20), (24, 64), (64, 64), (40, 56), (16, 16), (60, 20), (28, 28))
QUICK = [("rope", "default", "none"), ("learned+relative", "default", "none"), ("sincos+alibi", "interpolate", "log")]
ALL = [(word, "default", "none") for word in ENCODINGS]
ALL += [(word, "default", heat) for word in ("none", "rope", "relative", "alibi") for heat in ("log", "yarn")]
ALL += [(word, policy, "none") for word in ("rope", "rope_mixed") for policy in ("interpolate", "ntk", "yarn")]
create = partial(micro_vit, depth=1, global_pool="avg")


def graphs(model, policy="default", temperature="none", sizes=SIZES, **how):
    """How many graphs the sizes take; `fullgraph` makes a break an error. Logits are those of the plain model."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, **how)
    with torch.no_grad(), use_policy(model, policy, temperature=temperature):
        for height, width in sizes:
            images = torch.randn(2, 3, height, width)
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    return counter.frame_count


@pytest.mark.parametrize(
    ("position", "policy", "temperature"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in dict.fromkeys(QUICK + ALL)],
)
def test_two_graphs_for_ten_sizes(position, policy, temperature):
    assert graphs(create(position), policy, temperature) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("position", ["none", "rope", "learned"])
def test_dynamic_from_a_rectangle_on_is_one_graph(position):
    """From a square on it is two: the tracer takes equal sides for one number."""
    oblong = [size for size in SIZES if size[0] != size[1]]
    assert graphs(create(position), sizes=oblong, dynamic=True) == 1
    assert graphs(create(position), dynamic=True) == 2


def counted(model, inputs, marked=(), **how):
    """Graphs after each of the inputs, of whose first the marked axes are free from the start."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, counts = torch.compile(model.eval(), backend=counter, fullgraph=True, **how), []
    for axis in marked:
        torch._dynamo.mark_dynamic(inputs[0], axis)
    for x in inputs:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    torch.compiler.reset()
    return counts


def images(*shapes):
    return [torch.randn(batch, 3, height, width) for batch, height, width in shapes]


def ids(*shapes):
    return [torch.randint(9, shape) for shape in shapes]


@pytest.mark.need("C4")
@pytest.mark.parametrize("word", [w if w == "learned" else pytest.param(w, marks=pytest.mark.slow) for w in ENCODINGS])
def test_marked_axes_are_one_graph(word):
    """From a square on, of every batch but 1, with gradients on."""
    shapes = (2, 32, 32), (2, 48, 48), (3, 32, 48), (5, 48, 20), (2, 24, 64)
    assert counted(create(word), images(*shapes), (0, 2, 3)) == [1] * 5


TRAINED = [*ENCODINGS, "learned+rope", "learned(resize=plain)"]


@pytest.mark.need("C4a")
@pytest.mark.parametrize("word", [w if w == "learned" else pytest.param(w, marks=pytest.mark.slow) for w in TRAINED])
@pytest.mark.parametrize("marked", [(0, 2, 3), pytest.param((), marks=pytest.mark.slow)], ids=["marked", "unmarked"])
def test_gradients_at_free_sizes_are_those_of_the_plain_model(word, marked):
    """Not of the first size alone: torch has no backward pass of bicubic with antialias to a size that is free."""
    torch.compiler.reset()
    model = create(word)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for i, x in enumerate(images((2, 32, 40), (3, 48, 24), (2, 56, 64))):
        for axis in marked if i == 0 else ():
            torch._dynamo.mark_dynamic(x, axis)
        loss, expected = compiled(x).square().sum(), model(x).square().sum()
        given, right = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
        torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.need("C4")
@pytest.mark.slow
@pytest.mark.parametrize("word", ENCODINGS)
@pytest.mark.parametrize("kind", [TextDecoder, TextEncoder])
def test_lengths_take_two_graphs_or_one(word, kind):
    model = kind(word, vocab_size=9, context=8, embed_dim=24, depth=1, num_heads=2)
    shapes = (2, 6), (2, 3), (2, 8), (2, 9), (2, 20)
    assert counted(model, ids(*shapes))[-1] <= 2
    assert counted(model, ids(*shapes), dynamic=True)[-1] == 1
    assert counted(model, ids(*shapes), (0, 1))[-1] == 1


@pytest.mark.need("C4")
@pytest.mark.slow
@pytest.mark.parametrize("word", ["relative", "rope", "learned"])
def test_windows_take_two_graphs_or_one(word):
    try:
        sizes = dict(img_size=48, patch_size=4, embed_dim=24, depths=(2,), num_heads=(2,), window_size=5)
        model = Swin(word, num_classes=7, **sizes)
    except ConfigError:  # it does not act within windows
        return
    shapes = (2, 48, 48), (2, 64, 64), (2, 48, 72), (2, 44, 60)
    assert counted(model, images(*shapes))[-1] <= 2
    assert counted(model, images(*shapes), (0, 2, 3))[-1] == 1


@pytest.mark.need("C4")
@pytest.mark.slow
@pytest.mark.parametrize("word", ["none", "relative"])
def test_an_axis_is_free_from_the_first_time_that_it_differs(word):
    """torch's rule: width alone differs first, then height, then the batch; a batch of 1 is a number in any case."""
    shapes = (2, 32, 32), (2, 32, 48), (2, 48, 20), (3, 24, 64), (5, 40, 56), (1, 32, 48)
    counts = counted(create(word), images(*shapes))
    assert counts[:2] == [1, 2]
    assert counts[-1] <= 5
