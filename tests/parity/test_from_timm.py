"""timm's ViTs become ours with the same logits, run at rectangles, take other encodings, and train alike."""

import pytest
import timm
import torch

from vit2dpe import from_timm
from vit2dpe.testing import randomise

SMALL = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
# Architecture names, made small: the parts are what differs between them.
NAMES = [
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch8_224",
    "vit_small_patch16_36x1_224",
    "vit_medium_patch16_gap_240",
    "vit_medium_patch16_reg4_gap_256",
    "vit_base_patch16_siglip_224",
    "vit_wee_patch16_reg1_gap_256",
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_small_patch14_dinov2",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
]


def create(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs})
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_timms_at_the_native_size_and_a_rectangle(name):
    theirs = create(name, dynamic_img_size=True)
    ours = from_timm(theirs)
    patch = theirs.patch_embed.patch_size[0]
    for size in (theirs.patch_embed.img_size, (4 * patch, 7 * patch)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not ours.training


@pytest.mark.parametrize("position", ["rope", "alibi", "none", "sincos+rope_mixed"])
@pytest.mark.parametrize("name", NAMES[::4])
def test_its_weights_with_another_encoding(name, position):
    theirs = create(name)
    ours = from_timm(theirs, position)
    x = torch.randn(1, 3, *theirs.patch_embed.img_size)
    with torch.no_grad():
        logits = ours(x)
        assert logits.isfinite().all()
        assert not torch.allclose(logits, theirs(x), rtol=0, atol=1e-6)
    assert torch.equal(ours.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer, which is not covered yet"),
        ("vit_base_patch16_clip_224", "a norm before the blocks"),
        ("vit_dwee_patch16_reg1_gap_256", "attention of another kind"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("vit_base_patch16_rope_224", "Eva"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(name, reason):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    with pytest.raises(ValueError, match=reason):
        from_timm(theirs)


def test_fifty_steps_of_adamw_are_timms():
    """Same weights, same data: losses within 1e-5, relative, all the way.

    Without a class token: timm adds a row of its table to it, two parameters that Adam moves faster than our one.
    """
    theirs = create("vit_medium_patch16_gap_240", img_size=(32, 48)).train()
    ours = from_timm(theirs)
    losses = []
    for model in (theirs, ours):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        losses.append([])
        for _ in range(50):
            x = torch.randn(4, 3, 32, 48, generator=generator)
            loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-6)
