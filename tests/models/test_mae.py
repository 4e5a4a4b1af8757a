"""MAE: hidden patches are not seen, visible ones keep their places, for every encoding, at any size."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from timm.optim import create_optimizer_v2

from tests.helpers import randn, shaken, within
from vit2dpe import ENCODINGS, MAE, ConfigError, Positions, ViT, to_timm, use_policy
from vit2dpe.models.layers import keep_tokens
from vit2dpe.models.mae import keep_count
from vit2dpe.testing import randomise

POSITIONS = [*ENCODINGS, "relative(shared=true)", "sincos+rope", "rope_mixed+alibi"]
SIZE, PATCH = (12, 40), (4, 8)  # a grid of 3 rows and 5 columns, patches wider than tall
N = 15


def encoder(position="sincos", **changes):
    sizes = dict(img_size=SIZE, patch_size=PATCH, in_chans=2, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return ViT(position, **{**sizes, **changes})


def micro(position="sincos", decoder_position=None, norm_pix=False, decoder=None, **changes):
    torch.manual_seed(0)
    sizes = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, norm_pix=norm_pix)
    decoder_position = position if decoder_position is None else decoder_position
    return MAE(encoder(position, **changes), decoder_position=decoder_position, **{**sizes, **(decoder or {})})


def drawn(*args, **kwargs):
    return shaken(micro(*args, **kwargs), 0.2, seed=None)


def pictures(batch=3, size=SIZE, seed=1):
    return randn(batch, 2, *size, seed=seed)


def noise(batch=3, n=N, seed=2):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed))


close = within(1e-5, relative=True)


# every encoding ---------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", POSITIONS)
def test_trains_a_step_in_both_halves_and_at_another_rectangle(position):
    model = micro(position, norm_pix=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    size, n = (16, 24), 12
    losses = []
    for _ in range(4):
        loss, prediction, mask = model(pictures(size=size), noise=noise(n=n))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert prediction.shape == (3, n, 4 * 8 * 2)
        assert mask.sum(dim=1).tolist() == [n - keep_count(n, 0.75)] * 3
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "DDP stops at parameters that get no gradient"


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_runs_at_other_sizes(position):
    model = drawn(position)
    for size in ((12, 40), (20, 16), (8, 56)):
        loss, _, _ = model(pictures(size=size))
        assert loss.isfinite()


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_the_encoder_sees_visible_patches_at_their_true_places(position):
    """Block for block by hand: the whole grid's tokens, the kept ones taken, with Positions taken alike."""
    model = drawn(position)
    vit, images = model.encoder, pictures()
    keep, _ = model.choose(images, noise=noise())
    tokens, at = vit.patch_embed(images)
    for sample, index in enumerate(keep):
        here = at.take(index).with_prefix(1)
        signal = vit.position(here)
        x = torch.cat([vit.cls_token, tokens[sample : sample + 1, index]], dim=1)
        x = x if signal.token is None else x + signal.token
        for block in vit.blocks:
            x = block(x, signal, here)
        features = vit.forward_features(images, token_filter=partial(keep_tokens, index=keep))
        close(features[sample : sample + 1], vit.norm(x))


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_a_batch_is_its_samples_alone(position):
    """Each sample hides other patches; together and alone they give the same."""
    model, images, draw = drawn(position), pictures(), noise()
    _, prediction, mask = model(images, noise=draw)
    assert not torch.equal(mask[0], mask[1])
    for i in range(3):
        _, alone, its_mask = model(images[i : i + 1], noise=draw[i : i + 1])
        close(prediction[i : i + 1], alone)
        assert torch.equal(mask[i : i + 1], its_mask)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_hidden_pixels_are_not_seen(position):
    model, images, draw = drawn(position), pictures(), noise()
    _, prediction, mask = model(images, noise=draw)
    hidden = model.unpatchify(mask[..., None].expand(-1, -1, 64), *SIZE).bool()
    changed = torch.where(hidden, torch.full_like(images, 7.0), images)
    assert torch.equal(model(changed, noise=draw)[1], prediction)
    seen = torch.where(hidden, images, torch.full_like(images, 7.0))
    assert not torch.allclose(model(seen, noise=draw)[1], prediction)


@pytest.mark.parametrize("position", [p for p in POSITIONS if p != "none"])
@torch.no_grad()
def test_places_matter_in_the_encoder_and_in_the_decoder(position):
    """The same visible content elsewhere, and the painting changes; with `none` in a half that half cannot tell."""
    images, draw = pictures(1), noise(1)
    for half in ("encoder", "decoder"):
        model = drawn(position, "none") if half == "encoder" else drawn("none", position)
        keep, _ = model.choose(images, noise=draw)
        if half == "encoder":
            tokens = model.encoder.patch_embed(images)[0]
            swapped = tokens.clone()
            swapped[:, keep[0, 0]], swapped[:, keep[0, 1]] = tokens[:, keep[0, 1]], tokens[:, keep[0, 0]]
            latent, other = (features(model.encoder, x, keep) for x in (tokens, swapped))
            other[:, [1, 2]] = other[:, [2, 1]]  # back to where the content was
            assert float((latent - other).abs().max()) > 1e-4
        else:
            painted = model(images, noise=draw)[1]
            hidden = [i for i in range(N) if i not in keep[0]]
            spread = painted[0, hidden].std(dim=0).max()
            assert float(spread) > 1e-4, "all hidden patches are painted alike"


def features(vit, tokens, keep):
    at = Positions.grid((3, 5)).take(keep).with_prefix(1)
    signal = vit.position(at)
    x = torch.cat([vit.cls_token, tokens.gather(1, keep[..., None].expand(-1, -1, 32))], dim=1)
    x = x if signal.token is None else x + signal.token
    for block in vit.blocks:
        x = block(x, signal, at)
    return x


@torch.no_grad()
def test_without_position_hidden_patches_are_painted_alike():
    model = drawn("none")
    _, painted, mask = model(pictures(1), noise=noise(1))
    hidden = painted[0, mask[0].bool()]
    close(hidden, hidden[:1].expand_as(hidden))


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ["sincos+relative", *(pytest.param(p, marks=pytest.mark.slow) for p in POSITIONS)])
@torch.no_grad()
def test_compiles_whole(position):
    model, images, draw = drawn(position, depth=1, decoder=dict(decoder_depth=1)), pictures(), noise()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(images, noise=draw)[1], model(images, noise=draw)[1])


@pytest.mark.parametrize("position", ["sincos", "relative", "rope", "alibi"])
def test_bfloat16_and_checkpointing(position):
    model, images, draw = drawn(position), pictures(), noise()
    plain = model(images, noise=draw)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, noise=draw)[0]
    assert half.dtype == torch.float32
    close(half, plain, 0.05)
    plain.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    again = model(images, noise=draw)[0]
    again.backward()
    assert torch.equal(again, plain)
    assert all(torch.equal(grads[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)


# masks ------------------------------------------------------------------------------------------------------------


def test_keep_counts_are_exact():
    for n in (2, 3, 10, 15, 20, 64, 196, 197, 576):
        for percent in range(1, 100):
            kept = keep_count(n, percent / 100)
            assert kept == min(max(n * (100 - percent) // 100, 1), n - 1), (n, percent)
    assert keep_count(20, 0.9) == 2  # int(20 * (1 - 0.9)) is 1
    assert keep_count(196, 0.75) == 49
    assert keep_count(3, 0.9999) == 1
    assert keep_count(3, 0.0001) == 2


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 75, float("nan")])
def test_ratios_that_hide_nothing_or_all_are_refused(ratio):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        micro()(pictures(), ratio)


def test_one_patch_cannot_be_masked():
    with pytest.raises(ConfigError, match="one patch"):
        micro()(pictures(size=PATCH))


def test_the_smallest_noise_is_kept_and_the_generator_decides():
    model, images = micro(), pictures()
    draw = noise()
    keep, mask = model.choose(images, 0.75, draw)
    assert keep.shape == (3, 3)
    for sample in range(3):
        assert set(keep[sample].tolist()) == set(draw[sample].topk(3, largest=False).indices.tolist())
        assert (mask[sample] == 0).nonzero().flatten().tolist() == sorted(keep[sample].tolist())
    first, second, third = (
        model.choose(images, 0.75, generator=torch.Generator().manual_seed(seed))[1] for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    # every patch is as likely to be kept: 2,000 samples, a standard deviation of 0.9%
    often = model.choose(torch.empty(2000, 2, *SIZE), 0.75, generator=torch.Generator().manual_seed(0))[1]
    assert float((often.mean(dim=0) - 0.8).abs().max()) < 0.04
    with pytest.raises(ValueError, match=r"\(B, N\) = \(3, 15\)"):
        model(images, noise=noise(n=14))


# pixels and loss --------------------------------------------------------------------------------------------------


def test_pixels_of_a_patch_in_the_originals_order():
    model, images = micro(), pictures()
    pixels = model.patchify(images)
    for row in range(3):
        for col in range(5):
            for i in range(4):
                for j in range(8):
                    for c in range(2):
                        assert pixels[1, row * 5 + col, (i * 8 + j) * 2 + c] == images[1, c, 4 * row + i, 8 * col + j]
    assert torch.equal(model.unpatchify(pixels, *SIZE), images)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_loss_by_a_loop(norm_pix):
    model, images = drawn(norm_pix=norm_pix), pictures()
    loss, prediction, mask = model(images, noise=noise())
    terms = []
    for b in range(3):
        for n in range(N):
            patch = images[b, :, 4 * (n // 5) : 4 * (n // 5) + 4, 8 * (n % 5) : 8 * (n % 5) + 8]
            values = patch.permute(1, 2, 0).flatten().double()
            if norm_pix:
                mean = values.sum() / 64
                variance = (values - mean).square().sum() / 63
                values = (values - mean) / (variance + 1e-6).sqrt()
            if mask[b, n]:
                terms.append((prediction[b, n].double() - values).square().mean())
    assert len(terms) == 3 * 12
    close(loss.double(), torch.stack(terms).mean(), 1e-6)


def test_a_flat_patch_is_finite_under_norm_pix():
    loss, _, _ = micro(norm_pix=True)(torch.zeros(2, 2, *SIZE))
    assert loss.isfinite()


@pytest.mark.parametrize("norm_pix", [False, True])
@torch.no_grad()
def test_reconstructions_are_in_the_scale_of_the_images(norm_pix):
    model, images, draw = drawn(norm_pix=norm_pix), pictures() * 3 + 5, noise()
    seen = model.reconstruct(images, noise=draw)
    _, prediction, mask = model(images, noise=draw)
    hidden = model.unpatchify(mask[..., None].expand(-1, -1, 64), *SIZE).bool()
    assert torch.equal(seen.hidden.expand_as(hidden), hidden)
    assert torch.equal(seen.pasted[~hidden], images[~hidden])
    assert torch.equal(seen.pasted[hidden], seen.painted[hidden])
    if norm_pix:  # normalising the painting with the target's statistics gives the prediction back
        mean = model.patchify(images).mean(-1, keepdim=True)
        std = (model.patchify(images).var(-1, keepdim=True) + 1e-6).sqrt()
        close((model.patchify(seen.painted) - mean) / std, prediction, 1e-4)
    else:
        assert torch.equal(seen.painted, model.unpatchify(prediction, *SIZE))


# the module -------------------------------------------------------------------------------------------------------


def test_the_decoder_has_the_originals_names():
    names = {name for name in micro("rope").state_dict() if not name.startswith("encoder.")}
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    inside = [f"decoder_blocks.{i}.{part}" for i in (0, 1) for part in block]
    linear = ["decoder_embed", "decoder_norm", "decoder_pred", *inside]
    assert names == {"mask_token", *(f"{name}.{part}" for name in linear for part in ("weight", "bias"))}


def test_the_encoder_is_not_altered_until_asked():
    vit = encoder("learned")
    before = copy.deepcopy(vit.state_dict())
    model = MAE(vit, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    assert model.encoder is vit
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())
    model.init_weights()
    changed = [name for name, value in vit.state_dict().items() if not torch.equal(before[name], value)]
    assert "blocks.0.attn.qkv.weight" in changed
    assert "patch_embed.proj.weight" in changed
    assert "position.pos_embed" not in changed
    weight = model.decoder_blocks[0].attn.qkv.weight
    bound = (6 / (16 + 48)) ** 0.5
    assert bound * 0.9 < float(weight.detach().abs().max()) <= bound
    assert 0.01 < float(model.mask_token.detach().std()) < 0.03


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("position", ["learned", "rope_mixed", "relative"])
def test_state_dict_round_trip(position, norm_pix):
    model, again = drawn(position, norm_pix=norm_pix), micro(position, norm_pix=norm_pix)
    again.load_state_dict(model.state_dict())
    images, draw = pictures(), noise()
    with torch.no_grad():
        assert torch.equal(again(images, noise=draw)[1], model(images, noise=draw)[1])


@pytest.mark.parametrize("position", ["learned", "relative", "windowed", "factorized"])
def test_tables_of_another_grid_are_resized_at_load(position):
    model, larger = drawn(position), micro(position, img_size=(20, 48))
    larger.load_state_dict(model.state_dict())
    model.set_input_size((20, 48))
    assert model.train_grid == larger.train_grid == (5, 6)
    images, draw = pictures(size=(20, 48)), noise(n=30)
    with torch.no_grad():
        close(larger.eval()(images, noise=draw)[1], model(images, noise=draw)[1])


def test_the_encoder_goes_on_as_a_classifier():
    model = drawn("learned")
    state = to_timm(model.encoder)
    classifier = encoder("learned", num_classes=7, global_pool="avg", fc_norm=False).eval()
    missing, unexpected = classifier.load_state_dict(state, strict=False)
    assert missing == ["head.weight", "head.bias"]
    assert not unexpected
    with torch.no_grad():
        assert torch.equal(classifier.forward_features(pictures()), model.encoder.forward_features(pictures()))


def test_no_weight_decay_on_tokens_and_tables():
    model = micro("learned+rope_mixed")
    names = model.no_weight_decay()
    assert names <= {name for name, _ in model.named_parameters()} | {"encoder.reg_token"}
    assert {"mask_token", "encoder.cls_token", "encoder.position.pos_embed", "decoder_position.pos_embed"} <= names
    assert any(name.startswith("decoder_blocks.1.attn.position.") for name in names)


def test_registers_and_no_class_token():
    for changes in (dict(reg_tokens=2), dict(class_token=False, global_pool="avg", fc_norm=False)):
        for position in ("sincos", "relative", "rope"):
            loss, prediction, _ = micro(position, **changes)(pictures())
            assert prediction.shape == (3, N, 64)
            loss.backward()


def test_decoder_of_its_own_kind():
    model = micro("rope", "learned", decoder=dict(decoder_embed_dim=24, decoder_num_heads=3, decoder_depth=1))
    assert model.decoder_position.pos_embed.shape == (1, 3, 5, 24)
    model = micro("none", "none", decoder=dict(decoder_block_position="rope"))
    assert model.decoder_blocks[1].attn.position is not None
    model(pictures())[0].backward()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(num_classes=3), "num_classes=0"),
        (dict(global_pool="avg"), "fc_norm=False"),
        (dict(global_pool="map"), "attention pooling"),
        (dict(patch_drop_rate=0.5), "patch_drop_rate"),
        (dict(dynamic_img_pad=True), "dynamic_img_pad"),
    ],
)
def test_encoders_that_cannot_be_masked_are_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        micro(**changes)


def test_other_refusals():
    with pytest.raises(ConfigError, match=r"vit2dpe\.ViT, got Linear"):
        MAE(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="more than one value"):
        micro(patch_size=1, in_chans=1, norm_pix=True)
    with pytest.raises(ConfigError, match="multiple of decoder_num_heads"):
        micro("rope", decoder=dict(decoder_num_heads=5))


def test_meta_and_double():
    with torch.device("meta"):
        model = MAE(encoder("learned"), decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    assert all(p.is_meta for p in model.parameters())
    model = randomise(micro("rope")).double()
    assert model(pictures().double())[1].dtype == torch.float64


def test_a_policy_acts_on_both_halves():
    encoder = ViT("rope", img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    model = MAE(encoder, decoder_position="sincos", decoder_block_position="rope_mixed", **decoder).eval()
    halves = model.encoder.position, model.decoder_position, model.decoder_blocks[0].attn.position
    with use_policy(model, "interpolate", temperature="log"):
        assert [half.policy.train for half in halves] == [(4, 4)] * 3
        assert model.encoder.position.temperature is not None
        assert model.decoder_position.temperature is not None
    assert all(half.policy is None and half.temperature is None for half in halves)
    with pytest.raises(ConfigError, match="SinCos cannot ntk"), use_policy(model, "ntk"):
        pass
    with use_policy(model.encoder, "ntk"):
        assert (halves[0].policy.name, halves[1].policy) == ("ntk", None)
    assert halves[0].policy is None
