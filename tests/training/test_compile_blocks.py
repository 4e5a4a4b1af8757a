"""`--run.compile blocks`: one graph for all blocks, whatever their rates and slopes; then the model is as it was."""

from functools import partial

import pytest
import torch
import yaml
from timm.layers import DropPath
from torch._dynamo.testing import CompileCounterWithBackend

from tests.training import test_compile
from tests.training.test_resume import SPEC
from vit2dpe import MAE, Swin, TextDecoder, ViT, load_run
from vit2dpe.cli.options import settings
from vit2dpe.encodings import ENCODINGS
from vit2dpe.errors import ConfigError
from vit2dpe.spec import plain
from vit2dpe.training.compiling import CompiledBlocks, TensorDropPath, blocks_of
from vit2dpe.training.settings import RunConfig, TrainConfig

# The compiler looks for gradients of inputs, and hides the warning from users alone.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SIZES = dict(img_size=(16, 24), patch_size=8, embed_dim=48, num_heads=3)
IMAGES = torch.randn(4, 3, 16, 24)


def vit(word, depth=4):
    return ViT(word, depth=depth, num_classes=2, drop_path_rate=0.3, class_token=False, global_pool="avg", **SIZES)


def graphs(model, given, monkeypatch):
    """Graphs of all blocks after three training steps."""
    torch.compiler.reset()
    counter, compiled = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compiled(forward, backend=counter, fullgraph=True))
    blocks, before = CompiledBlocks(model.train()), (repr(model), list(model.state_dict()))
    for _ in range(3):
        with blocks.in_use():
            found = model(given)
            (found[0] if isinstance(found, tuple) else found).square().mean().backward()
    assert (repr(model), list(model.state_dict())) == before
    assert not any("forward" in vars(part) for part in model.modules())
    torch.compiler.reset()
    return counter.frame_count


QUICK = ("rope_mixed", "lookhere", "fire")
WORDS = [word if word in QUICK else pytest.param(word, marks=pytest.mark.slow) for word in ENCODINGS]


@pytest.mark.parametrize("word", WORDS)
def test_one_graph_serves_all_blocks(word, monkeypatch):
    assert graphs(vit(word), IMAGES, monkeypatch) == 1


NARROW = dict(embed_dim=24, num_heads=2)
OTHERS = {
    "text": (lambda: TextDecoder("rope", vocab_size=9, context=8, depth=3, drop_path_rate=0.2, **NARROW), 1),
    "mae": (lambda: MAE(ViT("rope", depth=2, num_classes=0, **SIZES), decoder_embed_dim=24, decoder_num_heads=2), 2),
    "swin": (
        lambda: Swin("relative", img_size=(32, 48), patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 2),
                     window_size=4), 4,
    ),
}  # fmt: skip
GIVEN = dict(text=torch.randint(9, (2, 8)), mae=IMAGES, swin=torch.randn(2, 3, 32, 48))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_have_a_graph_for_each_kind_of_block(kind, monkeypatch):
    make, most = OTHERS[kind]
    assert 1 <= graphs(make(), GIVEN[kind], monkeypatch) <= most


@pytest.mark.skipif(not hasattr(torch.compiler.config, "recompile_limit"), reason="this torch has no public limit")
def test_one_process_compiles_the_blocks_of_many_encodings(monkeypatch):
    """torch's own limit is of graphs of a class, whichever model they are of, and behind it nothing is compiled."""
    torch.compiler.reset()
    counter, compiled = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compiled(forward, backend=counter))
    with torch._dynamo.config.patch(recompile_limit=1):
        for word in ("none", "relative"):
            model = vit(word, depth=1)
            with CompiledBlocks(model).in_use():
                model(IMAGES)
    assert counter.frame_count == 2
    torch.compiler.reset()


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("scaled", [True, False])
def test_depth_by_a_tensor_leaves_out_whole_samples_as_often_as_timm(rate, scaled):
    layer = TensorDropPath(DropPath(rate, scaled), torch.device("cpu")).train()
    out = layer(torch.ones(40_000, 2, 3))
    kept = out[:, 0, 0] != 0
    assert (out == out[:, :1, :1]).all(), "a sample is left out as a whole"
    assert kept.float().mean() == pytest.approx(1 - rate, abs=0.01)
    assert torch.equal(out[kept], torch.full_like(out[kept], 1 / (1 - rate) if scaled else 1.0))
    x = torch.randn(3, 2, 3, dtype=torch.bfloat16)
    assert layer(x).dtype == x.dtype
    assert layer.eval()(x) is x


def test_the_blocks_of_a_model_are_its_innermost_repeated_layers():
    vision = vit("fire+fire", depth=3)
    assert blocks_of(vision) == list(vision.blocks)
    swin = OTHERS["swin"][0]()
    assert blocks_of(swin) == [block for stage in swin.layers for block in stage.blocks]
    masked = OTHERS["mae"][0]()
    assert blocks_of(masked) == [*masked.encoder.blocks, *masked.decoder_blocks]
    with pytest.raises(ConfigError, match="Linear has no list of blocks; take model"):
        CompiledBlocks(torch.nn.Linear(2, 2))


def test_training_by_blocks_is_training(tmp_path, monkeypatch):
    """The losses of a run without; evaluations are those of the model as it was built, whose names a checkpoint has."""
    torch.compiler.reset()
    compiled, used = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda net: used.append(net) or partial(compiled, fullgraph=True, backend="aot_eager")(net)
    )
    monkeypatch.setattr(test_compile, "PLAIN", SPEC._replace(arguments=test_compile.PLAIN.arguments | dict(depth=2)))
    eager = test_compile.run(tmp_path / "eager", compiled=False)
    found = test_compile.run(tmp_path / "blocks", compiled="blocks")
    assert len(used) == 2
    assert test_compile.numbers(found) == pytest.approx(test_compile.numbers(eager), abs=1e-5)
    assert list(load_run(tmp_path / "blocks").state_dict()) == list(load_run(tmp_path / "eager").state_dict())
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("given", "kept"),
    [(False, False), (True, True), ("none", False), ("model", True), ("blocks", "blocks")],
)
def test_ways_to_compile(given, kept):
    assert RunConfig(compile=given).compile is kept or kept == "blocks"
    assert RunConfig(compile=given).one_size == (kept == "blocks")
    with pytest.raises(ConfigError, match=r"unknown way to compile 'block'.*did you mean 'blocks'"):
        RunConfig(compile="block")


@pytest.mark.parametrize(
    ("words", "kept"),
    [([], False), (["--compile"], True), (["--compile", "blocks"], "blocks"), (["--run.compile=none"], False),
     (["--compile", "false"], False), (["--compile", "true"], True), (["--compile", "model"], True)],
)  # fmt: skip
def test_ways_to_compile_in_words(words, kept, tmp_path):
    """As the command line has them and as config.yaml keeps them; files of before hold true and false."""
    config = settings("train", TrainConfig, words)
    assert config.run.compile == kept
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    assert settings("train", TrainConfig, ["--config", str(tmp_path / "config.yaml")]).run.compile == kept
