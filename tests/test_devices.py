"""On devices that are not here: nothing is left on another one, and nothing is float64 where there is none."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.devices import Device, WrongDevice
from vit2dpe import MAE, Swin, ViT, attention_maps, explain, frozen, load_run, stock, sweep, use_policy
from vit2dpe.attention.maps import mean_distance, summary
from vit2dpe.attention.masks import window
from vit2dpe.data.augment import erase, mix, resized_crop, shift_and_flip
from vit2dpe.data.datasets import load_images, normalize
from vit2dpe.data.rand_augment import rand, trivial
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.encodings import ENCODINGS, Dims, Jitter, build
from vit2dpe.errors import ConfigError
from vit2dpe.models.simmim import SimMIM
from vit2dpe.models.spec import ModelSpec
from vit2dpe.models.text.generate import beam_search, generate
from vit2dpe.models.text.heads import TextDecoder, TextEncoder
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.plots import attention, reconstruction
from vit2dpe.positions import Positions, float64_device
from vit2dpe.resolution.apply import policies_of
from vit2dpe.testing import tensors
from vit2dpe.training.engine import fit
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.tasks.masked_images import MaskedTask

pytestmark = pytest.mark.need("A10")

DEVICES = ("mps", pytest.param("cuda", marks=pytest.mark.slow))
OPTIONS = (
    "alibi(distance=squared)", "learned(resize=dino)", "relative(prefix=true)", "relative(resize=geometric)",
    "relative(shared=true)", "logcpb(form=cr)", "fire(shared=true)", "sincos(layout=timm)", "rope(start=1)",
    "rope_dinov3(jitter=2, shift=0.1)", "sincos+rope_mixed",
)  # fmt: skip
WORDS = [*ENCODINGS, pytest.param(OPTIONS[-1], marks=pytest.mark.slow)]
GRIDS = ((12,), (3, 4), (2, 3, 2))


def encodings(word):
    """On each number of axes, jittered and not, with its grid, where there is such a one."""
    found = []
    for grid in GRIDS:
        for wrap in (lambda encoding: encoding, Jitter):
            try:
                found.append((wrap(build(word, Dims(72, 3, grid, block=0, depth=2))), grid))
            except ConfigError:
                continue
    return found


def places(grid, device):
    whole = Positions.grid(tuple(size + 1 for size in grid), device)
    some = whole.take(torch.tensor([[0, 2, 3], [1, 2, 5]], device=device)).with_prefix(1)
    return [(whole, None), (some, None), (whole, some)]


@pytest.mark.parametrize("word", [*ENCODINGS, *OPTIONS])
@pytest.mark.parametrize("name", DEVICES)
def test_tables_are_those_of_the_cpu(word, name):
    for encoding, grid in encodings(word):
        expected = [tensors(encoding.eval()(*at)) for at in places(grid, None)]
        with Device(name):
            encoding.to(name)
            for at, table in zip(places(grid, name), expected, strict=True):
                found = tensors(encoding.train()(*at))
                assert {x.device.type for x in found.values()} <= {name}
                if learned := [x.masked_fill(x.isinf(), 0).sum() for x in found.values() if x.requires_grad]:
                    sum(learned).backward()
                found = tensors(encoding.eval()(*at))
                assert all(torch.equal(x.cpu(), table[key]) for key, x in found.items()), "not those of float64"
            encoding.reset_parameters()


def classifier(model, images, policies=("default",)):
    """Forward and backward in training, at another size too, under policies; kept, looked at, resized, drawn anew."""
    larger = torch.cat([images, images], dim=-1)
    for x in (images, larger):
        model.train()(x).sum().backward()
    for policy in policies:
        with use_policy(model, policy, temperature="log"):
            model(larger).sum().backward()
    with torch.no_grad(), frozen(model.eval()), attention_maps(model):
        assert torch.equal(model(larger), model(larger))
    explain(model, images.shape[-2:])
    model.set_input_size(tuple(larger.shape[-2:]))
    model.load_state_dict({name: x.to(images.device) for name, x in model.state_dict().items()})
    model.init_weights()
    model(images)


def vit(word, images):
    model = ViT(word, **SIZES, class_token=False, global_pool="avg", num_classes=3).to(images.device, images.dtype)
    classifier(model, images, policies_of(model))
    summary(model, images)


def swin(word, images):
    sizes = SIZES | dict(patch_size=4, depths=(2,), num_heads=(2,), window_size=3, num_classes=3)
    del sizes["depth"]
    try:
        model = Swin(word, **sizes, qk="cosine", post_norm=True).to(images.device, images.dtype)
    except ConfigError:  # it does not act within windows
        return
    classifier(model, images)


def masked(word, images):
    encoder = ViT(word, **SIZES, num_classes=0).to(images.device, images.dtype)
    mae = MAE(encoder, decoder_position=word, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    for model in (mae, SimMIM(encoder, mask_unit=8)):
        assert all(p.device.type == images.device.type for p in model.parameters()), "made beside the encoder"
        model(images, 0.5)[0].backward()
        model.eval().reconstruct(images, 0.5)


def text(word, images):
    device, dtype = images.device, images.dtype
    sizes = dict(context=6, embed_dim=24, depth=1, num_heads=2)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=device)
    valid = torch.tensor([[True] * 4, [True, True, False, False]], device=device)
    encoder = TextEncoder(word, vocab_size=9, num_classes=3, window=2, **sizes).to(device, dtype)
    encoder(ids, valid).sum().backward()
    decoder = TextDecoder(word, vocab_size=9, **sizes).to(device, dtype)
    decoder(torch.cat([ids, ids], 1)).sum().backward()
    generate(decoder.eval(), ids, 3, valid=valid, stop=8, top_k=3, top_p=0.9)
    beam_search(decoder, ids, 2, stop=8, beams=2)
    translator = Seq2Seq(word, source_vocab=9, target_vocab=9, **sizes).to(device, dtype)
    translator(ids, ids, valid).sum().backward()
    generate(translator.eval().decoder, ids[:, :1], 2, memory=translator.encode(ids, valid))


SIZES = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)
HALF = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)]
KINDS = (vit, swin, masked, text)


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", DEVICES)
def test_models_stay_on_their_device(word, name, kind, dtype):
    with Device(name):
        kind(word, torch.randn(2, 3, 16, 16, device=name, dtype=dtype))


@pytest.mark.parametrize("word", ["lookhere", "logcpb", "rope_golden", "alibi(distance=squared)"])
@pytest.mark.parametrize("has", [True, False])
def test_some_of_intels_devices_have_float64(word, has, monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has))
    assert float64_device(torch.device("xpu")).type == ("xpu" if has else "cpu")
    encoding = build(word, Dims(24, 2, (4, 4), block=0))
    with Device("xpu", float64=has):
        found = tensors(encoding.to("xpu")(Positions.grid((4, 4), "xpu")))
        assert {table.device.type for table in found.values()} == {"xpu"}


@pytest.mark.parametrize(("name", "where"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("meta", "meta"), ("mps", "cpu")])
def test_where_float64_is_computed(name, where):
    assert float64_device(torch.device(name)) == torch.device(where)


@pytest.mark.need("A10a")
@pytest.mark.parametrize("name", DEVICES)
def test_masks_and_distances(name):
    at = Positions.grid((3, 4))
    maps = torch.rand(1, 2, 12, 12)
    expected = window(at, at, 1), mean_distance(maps, at)
    with Device(name):
        here = Positions.grid((3, 4), name)
        found = window(here, here, 1), mean_distance(maps.to(name), here)
        assert {x.device.type for x in found} == {name}
        assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


def augmented(images):
    draws = torch.Generator().manual_seed(0)
    images = rand(resized_crop(images, (8, 8), 0.5, True, draws), draws)
    images = shift_and_flip(trivial(images, draws), 1, True, draws)
    images = erase(normalize(images / 255, (0.5,) * 3, (0.5,) * 3), 0.5, draws)
    labels = torch.arange(len(images), device=images.device) % 3
    return mix(images, labels, 3, 0, mixup=0.8, cutmix=1.0)


@pytest.mark.need("A10a")
@pytest.mark.parametrize("name", DEVICES)
def test_augmentation_is_that_of_the_cpu(name):
    images = torch.randint(256, (64, 3, 9, 9), dtype=torch.uint8)
    expected = augmented(images)
    with Device(name):
        found = augmented(images.to(name))
        assert {x.device.type for x in found} == {name}
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-6)


@pytest.mark.need("A10a")
@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_a_training_and_what_it_leaves(name, tmp_path):
    data = load_images("digits", limit_train=24, limit_test=10)
    sizes = SIZES | dict(img_size=8, patch_size=4, in_chans=1, num_classes=10, class_token=False, global_pool="avg")
    spec = ModelSpec("ViT", sizes | dict(position="rope_mixed+lookhere+learned"))
    optim = OptimConfig(epochs=1, warmup_epochs=0, batch_size=12, ema=0.9, layer_decay=0.8, accumulate=2)
    run = RunConfig(device=name, precision="float32", save_minutes=0)
    with Device(name):
        for epochs in (1, 2):
            task = ImageTask(data, (8, 8), 12, augment=AugmentConfig(1, True), device=name)
            fit(spec.build(), task, replace(optim, epochs=epochs), run, folder=tmp_path, spec=spec, resume=epochs > 1)
        model = load_run(tmp_path, name)
        assert {p.device.type for p in model.parameters()} == {name}
        batch = torch.randn(4, 1, 8, 8), torch.arange(4)
        assert len(sweep(model, [batch], [(8, 12)], modes=("scale", "canvas"), temperatures=("none", "log"))) == 4
        attention.draw(model, batch[0][:1].to(name), mean=0.5, std=0.5)


@pytest.mark.need("A10a")
@pytest.mark.parametrize("name", DEVICES)
def test_a_masked_training(name, tmp_path):
    data = load_images("digits", limit_train=24, limit_test=10)
    encoder = ViT("rope", **SIZES | dict(img_size=8, patch_size=4, in_chans=1, num_classes=0))
    model = MAE(encoder, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2, norm_pix=True)
    with Device(name):
        task = MaskedTask(ImageTask(data, (8, 8), 12, device=name), (2, 2))
        optim = OptimConfig(epochs=1, warmup_epochs=0, batch_size=12)
        fit(model, task, optim, RunConfig(device=name, precision="float32"), folder=tmp_path)
        reconstruction.draw(model, torch.randn(2, 1, 8, 8), mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("word", ["alibi", "sincos+relative", "lookhere"])
@pytest.mark.parametrize("name", DEVICES)
def test_a_stock_transformer(word, name):
    layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with Device(name):
        stock.attach(encoder.to(name), word, grid=(2, 3))
        assert {p.device.type for p in encoder.parameters()} == {name}
        x = torch.randn(2, 6, 24, device=name)
        encoder(x).sum().backward()
        encoder.eval()(x)
        turned = stock.RotaryEncoderLayer(24, 2, 48, position="rope", grid=(2, 3), batch_first=True).to(name)
        turned(x, src_key_padding_mask=torch.zeros(2, 6, dtype=torch.bool, device=name)).sum().backward()


def test_the_rules_are_kept_here_too():
    """What the simulation refuses, in forward and backward, and what it lets pass."""
    with Device("mps") as device:
        here, there = torch.ones(2, 3), torch.ones(2, 3, device="mps", requires_grad=True)
        assert (here.device.type, there.device.type, there[0].device.type) == ("cpu", "mps", "mps")
        assert there.is_mps
        assert not there.is_cpu
        assert (there * torch.tensor(2.0)).device.type == "mps"
        for wrong in (
            lambda: here + there,
            lambda: there.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: there.to("cpu", torch.float64),
            lambda: there.detach().numpy(),
            lambda: torch.rand(2, device="mps", generator=torch.Generator()),
            lambda: Forgetful.apply(there).sum().backward(),
        ):
            with pytest.raises(WrongDevice):
                wrong()
        there.cpu().double().sum().backward()
        assert there.grad.device.type == "mps"
        assert nn.Linear(3, 2).to("mps").weight.device == device.of(there)


class Forgetful(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.full(gradient.shape, 2.0)
