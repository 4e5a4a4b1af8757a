"""Weights of a wrapped model go into the plain one: compiled, DDP, FSDP, averaged, of Lightning, and these nested."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from vit2dpe import MAE, Swin, ViT, from_timm
from vit2dpe.models.simmim import SimMIM
from vit2dpe.models.text.heads import TextDecoder, TextEncoder
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.models.unwrap import unwrapped
from vit2dpe.training.initial_weights import load_weights

SIZES = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2)
TEXT = dict(vocab_size=11, context=8, embed_dim=16, depth=1, num_heads=2)
MODELS = {
    "vit": lambda: ViT("learned+rope_mixed", num_classes=3, **SIZES),
    "swin": lambda: Swin(
        "relative", img_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    ),
    "mae": lambda: MAE(
        ViT("rope", num_classes=0, **SIZES), decoder_position="learned", decoder_embed_dim=16, decoder_num_heads=2
    ),
    "simmim": lambda: SimMIM(ViT("learned", num_classes=0, **SIZES), mask_unit=8),
    "encoder": lambda: TextEncoder("learned", **TEXT),
    "decoder": lambda: TextDecoder("rope", **TEXT),
    "seq2seq": lambda: Seq2Seq(
        "rope", source_vocab=11, target_vocab=7, **{k: v for k, v in TEXT.items() if k != "vocab_size"}
    ),
}


class Holder(nn.Module):
    """As a LightningModule or DDP holds a model."""

    def __init__(self, model, name):
        super().__init__()
        self.add_module(name, model)


def compiled_blocks(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("attn", "mlp"):
                module.add_module(name, torch.compile(child))
    return model


def checkpointed(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name == "mlp":
                module.add_module(name, checkpoint_wrapper(child))
    return model


WRAPPERS = {
    "compiled": torch.compile,
    "ddp": lambda model: Holder(model, "module"),
    "lightning": lambda model: Holder(model, "model"),
    "fabric": lambda model: Holder(model, "_forward_module"),
    "fsdp": lambda model: Holder(model, "_fsdp_wrapped_module"),
    "averaged": AveragedModel,
    "blocks compiled": compiled_blocks,
    "blocks recomputed": lambda model: checkpointed(model),
    "compiled in ddp in lightning": lambda model: Holder(Holder(torch.compile(model), "module"), "model"),
    "ddp compiled": lambda model: torch.compile(Holder(model, "module")),
    "average of a compiled one": lambda model: AveragedModel(torch.compile(model)),
    "all": lambda model: Holder(
        torch.compile(Holder(Holder(compiled_blocks(model), "module"), "_forward_module")), "model"
    ),
}


@pytest.mark.need("B8")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_plain_model_takes_them(kind, wrapper, tmp_path):
    torch.manual_seed(1)
    source = MODELS[kind]()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    wanted = {name: value.clone() for name, value in source.state_dict().items()}
    state = {name: value.clone() for name, value in WRAPPERS[wrapper](source).state_dict().items()}
    model = MODELS[kind]()
    model.load_state_dict(state)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    for form in ({"state_dict": state}, {"model": {"state_dict": state}}, {"state_dict": {"model": state}}):
        assert unwrapped(form).keys() == wanted.keys()
    save_file(state, tmp_path / "weights.safetensors")
    model = MODELS[kind]()
    loaded = load_weights(model, tmp_path / "weights.safetensors")
    assert (loaded.left, loaded.unused) == ([], [])
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.need("B8")
def test_names_that_only_look_like_a_wrapper_stay():
    state = {"model.layers.0": torch.zeros(1), "head": torch.zeros(1)}
    assert unwrapped(state).keys() == state.keys()


@pytest.mark.need("B8a")
@pytest.mark.parametrize(
    "form",
    [
        lambda trained, average: {"model": trained, "model_ema": average},
        lambda trained, average: {"state_dict": trained, "state_dict_ema": average, "epoch": 3},
        lambda trained, average: {
            "state_dict": trained,
            "state_dict_ema": {f"module.{n}": v for n, v in average.items()},
        },
        lambda _, average: {"module": average, "step": 7},
        lambda _, average: {"model": average, "model_ema": None},
    ],
)
@torch.no_grad()
def test_of_a_file_with_an_average_every_door_takes_it_as_timm_does(form, tmp_path):
    name, sizes = (
        "vit_tiny_patch16_224",
        dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=5),
    )
    theirs = timm.create_model(name, **sizes).eval()
    average = {name: value + 0.1 for name, value in theirs.state_dict().items()}
    file = form(theirs.state_dict(), average)
    torch.save(file, tmp_path / "file.pth")
    theirs.load_state_dict(average)
    models = [ViT("learned", **sizes) for _ in range(3)]
    models[0].load_state_dict(file)
    load_weights(models[1], tmp_path / "file.pth")
    timm.models.load_checkpoint(models[2], str(tmp_path / "file.pth"))
    models += [from_timm(name, weights=weights, **sizes) for weights in (file, tmp_path / "file.pth")]
    for model in models:
        torch.testing.assert_close(model.eval()(x := torch.ones(1, 3, 32, 32)), theirs(x))
