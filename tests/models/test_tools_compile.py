"""torch.compile: one graph for the first size, one for all others, and no break."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers import micro_vit
from vit2dpe import use_policy
from vit2dpe.encodings import ENCODINGS

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
