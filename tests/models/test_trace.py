"""`torch.jit.trace`: graphs that other batches run through, of operations that converters of such graphs have."""

import pytest
import torch

from tests.helpers import micro_vit
from vit2dpe import Swin, TextDecoder, TextEncoder
from vit2dpe.encodings import ENCODINGS
from vit2dpe.errors import ConfigError
from vit2dpe.testing import randomise

pytestmark = [
    pytest.mark.need("C2"),
    pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning"),  # torch's on itself
]
# What CoreML or OpenVINO cannot convert.
LACKING = {"movedim", "block_diag", "complex", "view_as_real", "view_as_complex", "polar", "conj_physical", "unfold"}


def check(model, example, others):
    """Traced with torch's own check, with gradients on; logits at another batch are those of the model."""
    traced = torch.jit.trace(model, example)
    torch.testing.assert_close(traced(others), model(others), rtol=0, atol=1e-5)
    kinds = {node.kind().removeprefix("aten::") for node in traced.inlined_graph.nodes()}
    assert not kinds & LACKING


@pytest.mark.parametrize("position", [*ENCODINGS, "sincos+rope+relative"])
def test_a_vit(position):
    model = micro_vit(position, depth=1, global_pool="avg")
    check(model, torch.randn(2, 3, 16, 24), torch.randn(3, 3, 16, 24))


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ENCODINGS)
@pytest.mark.parametrize("version", [{}, dict(qk="cosine", post_norm=True)], ids=["V1", "V2"])
def test_a_swin(position, version):
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depths=(2,), num_heads=(2,), window_size=3, num_classes=3)
    try:
        model = randomise(Swin(position, **sizes, **version)).eval()
    except ConfigError:  # it does not act within windows
        return
    check(model, torch.randn(2, 3, 16, 24), torch.randn(3, 3, 16, 24))


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ENCODINGS)
@pytest.mark.parametrize("kind", [TextEncoder, TextDecoder])
def test_a_text_model(position, kind):
    torch.manual_seed(0)
    model = randomise(kind(position, vocab_size=9, context=6, embed_dim=24, depth=1, num_heads=2)).eval()
    check(model, torch.randint(9, (2, 6)), torch.randint(9, (3, 6)))
