"""What others do to a model works on ours: LoRA, int8 weights, pruning, averages of weights, copies."""

import copy

import peft
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.nn.utils import prune

import vit2dpe.models  # noqa: F401
from tests.helpers import micro_vit, randn
from vit2dpe import Swin, TextDecoder
from vit2dpe.encodings import ENCODINGS, PositionEncoding, encoding_parameters

try:
    import torchao.quantization as ao
except ImportError:  # its wheels follow torch's versions, and may lag behind one
    ao = None

X = randn(4, 3, 32, 48)
SERVE_IN_WINDOWS = ("none", "relative", "logcpb", "fire", "t5", "alibi", "rope", "rope_mixed", "fourier", "learned")
SERVE_TEXT = tuple(word for word in ENCODINGS if word not in ("windowed", "rope_golden"))
Y = torch.tensor([0, 1, 2, 3])
SUM = "learned+relative+rope_mixed"


def run(model):
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("position", [SUM, "rope"])
def test_lora_trains_and_merges_back(position):
    model = micro_vit(position)
    before, plain = {n: p.clone() for n, p in model.named_parameters()}, run(model)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv", "proj"]))
    assert torch.equal(run(lora), plain), "LoRA starts as nothing"
    optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = cross_entropy(lora.train()(X), Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    tuned = run(lora.eval())
    assert (tuned - plain).abs().max() > 0.05
    merged = lora.merge_and_unload()
    torch.testing.assert_close(run(merged), tuned, rtol=1e-4, atol=1e-4)
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    changed = {n.removesuffix(".weight") for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"patch_embed.proj"} | {f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("qkv", "proj")}


@pytest.mark.skipif(ao is None, reason="torchao is not installed: it has no wheel for this torch")
@pytest.mark.parametrize("position", [SUM, "logcpb+fourier"])
def test_int8_weights_leave_positions_alone(position):
    model = micro_vit(position)
    plain = run(model)
    inside = {n for n, m in model.named_modules() if isinstance(m, PositionEncoding)}
    tables = {n: p.clone() for n, p in model.named_parameters() if any(n.startswith(f"{i}.") for i in inside)}
    assert tables
    ao.quantize_(
        model, ao.Int8WeightOnlyConfig(), lambda part, name: type(part) is nn.Linear and "position" not in name
    )
    assert type(model.blocks[0].attn.qkv.weight.data) is not torch.Tensor
    now = dict(model.named_parameters())
    assert all(type(now[n].data) is torch.Tensor and torch.equal(now[n], table) for n, table in tables.items())
    assert not torch.equal(run(model), plain)
    assert cosine_similarity(run(model), plain).min() >= 0.999


def in_int8(model):
    ao.quantize_(model, ao.Int8WeightOnlyConfig())


def in_dynamic_int8(model):
    quantize_dynamic(model, {nn.Linear}, inplace=True)


def swin(position):
    return Swin(position, img_size=32, patch_size=4, embed_dim=48, depths=(1, 1), num_heads=(3, 3), window_size=4)


def text(position):
    return TextDecoder(position, vocab_size=13, context=16, embed_dim=48, depth=1, num_heads=2)


IN_MODELS = {"ViT": (micro_vit, ENCODINGS), "Swin": (swin, SERVE_IN_WINDOWS), "text": (text, SERVE_TEXT)}


@pytest.mark.need("B13")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("make", IN_MODELS)
@pytest.mark.parametrize("quantize", [in_int8, in_dynamic_int8])
def test_int8_without_a_filter_leaves_positions_alone(quantize, make):
    """By their type: every encoding, in every model; what the networks hold keeps its name, and every bit."""
    build, positions = IN_MODELS[make]
    for position in positions:
        torch.manual_seed(0)
        model = build(position).eval()
        x = torch.arange(16)[None] % 13 if make == "text" else X[..., :32]
        kept = {name: p.clone() for name, p in model.named_parameters() if name in encoding_parameters(model)}
        with torch.no_grad():
            plain = model(x)
            quantize(model)
            now = dict(model.named_parameters())
            assert all(type(now[n].data) is torch.Tensor and torch.equal(now[n], p) for n, p in kept.items()), position
            found = model(x)
        assert not torch.equal(found, plain), position
        assert cosine_similarity(found.flatten(1), plain.flatten(1)).min() >= 0.99, position


def test_pruning_masks_what_attention_computes_with():
    model, by_hand = micro_vit(SUM), micro_vit(SUM)
    kept = {}
    for i, block in enumerate(model.blocks):
        prune.l1_unstructured(block.attn.qkv, "weight", amount=0.5)
        prune.random_unstructured(block.mlp.fc1, "weight", amount=0.3)
        for name in ("attn.qkv", "mlp.fc1"):
            kept[i, name] = block.get_submodule(name).weight_mask.clone()
            by_hand.blocks[i].get_submodule(name).weight.data.mul_(kept[i, name])
    assert torch.equal(run(model), run(by_hand))
    model.train()(X).sum().backward()
    assert (model.blocks[0].attn.qkv.weight_orig.grad[kept[0, "attn.qkv"] == 0] == 0).all()
    for block in model.blocks:
        prune.remove(block.attn.qkv, "weight")
        prune.remove(block.mlp.fc1, "weight")
    assert set(model.state_dict()) == set(by_hand.state_dict())
    assert torch.equal(run(model.eval()), run(by_hand))


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ENCODINGS)
def test_copies_and_averages_after_a_forward(position):
    model = micro_vit(position)
    model.train()(X).sum().backward()
    twin = copy.deepcopy(model)
    ema = ModelEmaV3(model, decay=0.5)
    old = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    ema.update(model)
    for name, p in ema.module.named_parameters():
        torch.testing.assert_close(p, 1.05 * old[name])
    assert all(torch.equal(p, old[n]) for n, p in twin.named_parameters())
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    model.load_state_dict(old)
    assert torch.equal(run(twin.eval()), run(model.eval()))
    assert torch.isfinite(run(ema.module.eval())).all()
