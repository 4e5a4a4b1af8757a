"""`torch.jit.trace`: graphs that other batches run through, of operations that converters of such graphs have."""

import pytest
import torch

from tests.helpers import micro_vit
from vit2dpe import MAE, Swin, TextDecoder, TextEncoder, ViT
from vit2dpe.encodings import ENCODINGS
from vit2dpe.errors import ConfigError
from vit2dpe.models.simmim import SimMIM
from vit2dpe.testing import randomise

pytestmark = [
    pytest.mark.need("C2"),
    pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning"),  # torch's on itself
]
# What CoreML or OpenVINO cannot convert.
LACKING = {"movedim", "block_diag", "complex", "view_as_real", "view_as_complex", "polar", "conj_physical", "unfold"}

V2 = dict(qk="cosine", post_norm=True)


def check(model, example, others):
    """Traced with torch's own check, with gradients on; logits at another batch are those of the model."""
    traced, others = torch.jit.trace(model, example), others if isinstance(others, tuple) else (others,)
    torch.testing.assert_close(traced(*others), model(*others), rtol=0, atol=1e-5)
    kinds = {node.kind().removeprefix("aten::") for node in traced.inlined_graph.nodes()}
    assert not kinds & LACKING


@pytest.mark.parametrize("position", [*ENCODINGS, "sincos+rope+relative"])
def test_a_vit(position):
    model = micro_vit(position, depth=1, global_pool="avg")
    check(model, torch.randn(2, 3, 16, 24), torch.randn(3, 3, 16, 24))


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ENCODINGS)
@pytest.mark.parametrize("version", [{}, pytest.param(V2, marks=pytest.mark.slow)], ids=["V1", "V2"])
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


class Masked(torch.nn.Module):
    """Images and noise to loss, pixels and mask: a ratio is no tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, noise):
        return self.model(images, 0.5, noise)


class Features(Masked):
    def forward(self, images):
        return self.model.forward_features(images)


def masked(kind, position="rope"):
    """MAE of a ViT, SimMIM of a ViT or of a Swin, in units of 8 pixels."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, num_classes=0)
    if kind == "Swin":
        sizes |= dict(patch_size=4, depths=(2, 2), num_heads=(2, 2), window_size=3)
        return randomise(SimMIM(Swin(position, **sizes), mask_unit=8)).eval()
    encoder = ViT(position, **sizes, depth=1)
    if kind == "SimMIM":
        return randomise(SimMIM(encoder, mask_unit=8)).eval()
    sizes = dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    return randomise(MAE(encoder, decoder_position=position, norm_pix=True, **sizes)).eval()


@pytest.mark.need("C2a")
@pytest.mark.parametrize("position", [w if w == "rope" else pytest.param(w, marks=pytest.mark.slow) for w in ENCODINGS])
@pytest.mark.parametrize("kind", ["MAE", "SimMIM", pytest.param("Swin", marks=pytest.mark.slow)])
def test_a_masked_model(kind, position):
    try:
        model = masked(kind, position)
    except ConfigError:  # it does not act within windows
        return
    example, others = ((torch.randn(n, 3, 32, 48), torch.rand(n, 24)) for n in (2, 3))
    check(Masked(model), example, others)


@pytest.mark.need("C2a")
@pytest.mark.parametrize("kind", ["MAE", pytest.param("Swin", marks=pytest.mark.slow)])
def test_features(kind):
    check(Features(masked(kind).encoder), (torch.randn(2, 3, 32, 48),), (torch.randn(3, 3, 32, 48),))
