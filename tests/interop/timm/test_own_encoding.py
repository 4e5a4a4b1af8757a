"""Naming a timm model's own encoding keeps its weights and options; options change only what they name."""

import pytest
import timm
import torch

from tests.helpers import randn
from vit2dpe import ViT, from_timm, to_timm
from vit2dpe.encodings import LearnedTable, RelativeBias
from vit2dpe.interop.own_encoding import with_own_options
from vit2dpe.interop.timm.read import read

SMALL = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
NAMES = {
    "vit_tiny_patch16_224": "learned",
    "vit_small_patch14_reg4_dinov2": "learned",
    "deit_tiny_distilled_patch16_224": "learned",
    "eva02_tiny_patch14_224": "learned+rope",
    "vit_small_patch16_rope_mixed_ape_224": "learned+rope_mixed",
    "vit_small_patch16_rope_224": "rope",
    "vit_small_patch16_dinov3": "rope_dinov3",
    "beit_base_patch16_224": "relative",
    "vit_relpos_small_patch16_224": "logcpb",
    "vit_srelpos_small_patch16_224": "logcpb",
    "vit_relpos_base_patch32_plus_rpn_256": "logcpb",
}


def create(name, **more):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | dict(img_size=(56, 112) if "14" in name else (64, 96)) | more)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(model):
    return randn(2, 3, *model.patch_embed.img_size)


@pytest.mark.need("B2")
@pytest.mark.parametrize(("name", "word"), NAMES.items())
@torch.no_grad()
def test_the_plain_word_is_the_model(name, word):
    theirs = create(name)
    wanted, ours = from_timm(theirs), from_timm(theirs, position=word)
    x = images(theirs)
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-4, rtol=1e-4)
    assert wanted.state_dict().keys() == ours.state_dict().keys()
    for key, value in wanted.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    back, also = to_timm(wanted), to_timm(ours)
    assert back.keys() == also.keys()
    larger = randn(1, 3, *(side * 2 for side in x.shape[-2:]))
    assert torch.equal(ours(larger), wanted(larger)), "the family's policy too"


@pytest.mark.need("B2")
@torch.no_grad()
def test_the_rule_of_resizing_is_what_an_option_changes():
    """Not the table, which is resized by that rule, from the one that was trained."""
    theirs = create("vit_tiny_patch16_224")
    ours = from_timm(theirs, position="learned(resize=dino)")
    x, larger = images(theirs), randn(1, 3, 128, 160)
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-4, rtol=1e-4)
    wanted = ViT("learned(resize=dino)", **read(theirs).arguments).eval()
    wanted.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(larger), wanted(larger))
    assert not torch.equal(ours(larger), from_timm(theirs)(larger))
    wanted.set_input_size((128, 160))
    assert torch.equal(from_timm(theirs, position="learned(resize=dino)", img_size=(128, 160))(larger), wanted(larger))


@pytest.mark.need("B2")
@torch.no_grad()
def test_a_sum_has_the_weights_of_the_terms_that_were_there():
    theirs = create("vit_tiny_patch16_224")
    table = next(part for part in from_timm(theirs).modules() if isinstance(part, LearnedTable)).pos_embed
    for word in ("learned+rope", "alibi+learned", "rope_mixed+learned+relative"):
        ours = from_timm(theirs, position=word)
        (found,) = (part for part in ours.modules() if isinstance(part, LearnedTable))
        assert torch.equal(found.pos_embed, table)
    mixed = create("vit_small_patch16_rope_mixed_ape_224")
    alone, both = from_timm(mixed, position="rope_mixed"), from_timm(mixed)
    for one, other in zip(alone.blocks, both.blocks, strict=True):
        assert torch.equal(one.attn.position.freqs, other.attn.position.freqs)
    assert alone(images(mixed)).isfinite().all()


@pytest.mark.need("B2")
@torch.no_grad()
def test_a_bias_keeps_the_entries_that_an_option_does_not_touch():
    theirs = create("beit_base_patch16_224")
    wanted = from_timm(theirs)
    ours, bare = from_timm(theirs, position="relative(resize=bicubic)"), from_timm(theirs, "relative(prefix=false)")
    x = images(theirs)
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-4, rtol=1e-4)
    for kept in (ours, bare):
        for block, other in zip(kept.blocks, wanted.blocks, strict=True):
            table = other.attn.position.relative_position_bias_table
            assert torch.equal(block.attn.position.relative_position_bias_table, table)
    assert bare.blocks[0].attn.position.prefix_bias is None
    shared = create("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    each = from_timm(shared, position="relative(shared=false)")
    torch.testing.assert_close(each(x), shared(x), atol=2e-4, rtol=1e-4)
    assert len([part for part in each.modules() if isinstance(part, RelativeBias)]) == 2


@pytest.mark.need("B2")
@torch.no_grad()
def test_another_network_is_drawn():
    theirs = create("vit_relpos_small_patch16_224")
    assert from_timm(theirs, position="logcpb(hidden=8)")(images(theirs)).isfinite().all()


@pytest.mark.need("B2")
def test_options_that_are_not_named_stay():
    own = "learned+rope(base=10000.0, start=1)"
    assert with_own_options("rope(base=7)+alibi", own) == "rope(base=7, start=1)+alibi"
    assert with_own_options("learned(resize=dino)", own) == "learned(resize=dino)"
    assert with_own_options("rope_mixed", own) == "rope_mixed"


@pytest.mark.need("B2")
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@torch.no_grad()
def test_a_swin_keeps_its_own_too(name):
    sizes = dict(img_size=32, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5)
    torch.manual_seed(0)
    theirs = timm.create_model(name, **sizes).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, v2 = randn(2, 3, 32, 32), "v2" in name
    word = "logcpb" if v2 else "relative"
    for spec in (word, f"none+{word}", "logcpb(hidden=512)" if v2 else "relative(resize=geometric)"):
        ours = from_timm(theirs, position=spec)
        torch.testing.assert_close(ours(x), theirs(x), atol=2e-4, rtol=1e-4)
    back = to_timm(from_timm(theirs, position=word))
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items() if key in back)
    if v2:
        assert from_timm(theirs, position="logcpb(hidden=8)")(x).isfinite().all()
