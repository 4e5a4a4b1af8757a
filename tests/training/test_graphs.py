"""`run.graph`: what is captured, replayed and refused; capturing itself needs a GPU and is stood in for."""

import pytest
import torch

from tests.training.test_update import Fit
from vit2dpe import MAE, ViT
from vit2dpe.errors import ConfigError
from vit2dpe.training import graphs
from vit2dpe.training.distributed import ALONE, World
from vit2dpe.training.graphs import GraphedModel, check_graph
from vit2dpe.training.settings import OptimConfig, RunConfig, drop_last
from vit2dpe.training.update import Updater

SIZES = dict(img_size=(16, 24), patch_size=8, embed_dim=48, num_heads=3, depth=2)


@pytest.fixture
def captures(monkeypatch):
    """Calls of `make_graphed_callables`, whose stand-in draws as its warm-up does and runs what it was given."""
    found = []

    def capture(call, sample, allow_unused_input):
        assert allow_unused_input
        assert all(isinstance(x, torch.Tensor) for x in sample)
        torch.rand(5)
        found.append((call, sample))

        def replay(*tensors):
            assert [t.shape for t in tensors] == [s.shape for s in sample]
            for kept, new in zip(sample, tensors, strict=True):
                kept.copy_(new)
            return call(*sample)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return found


def gradients(model, forward, images):
    model.zero_grad()
    forward(images).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_a_graph_is_captured_once_and_gives_the_same_gradients(captures):
    model = ViT("rope_mixed", num_classes=3, **SIZES).train()
    forward = GraphedModel(model)
    first, second = torch.randn(2, 2, 3, 16, 24)
    given = first.clone()
    for images in (first, second, first):
        for ours, theirs in zip(gradients(model, forward, images), gradients(model, model, images), strict=True):
            assert torch.equal(ours, theirs)
    assert len(captures) == 1
    assert torch.equal(first, given)  # the graph has inputs of its own


def test_capturing_draws_nothing_that_a_resumed_run_would_not(captures):
    forward = GraphedModel(torch.nn.Dropout(0.5).train())
    forward(torch.ones(8))
    for _ in range(2):  # the first one is captured in one run, replayed in the other
        torch.manual_seed(3)
        drawn = forward(torch.ones(8))
        torch.manual_seed(3)
        assert torch.equal(GraphedModel(torch.nn.Dropout(0.5).train())(torch.ones(8)), drawn)


def test_numbers_are_constants_of_the_graph(captures):
    model = MAE(ViT("rope", num_classes=0, **SIZES), decoder_embed_dim=24, decoder_num_heads=2).train()
    forward, noise = GraphedModel(model), torch.rand(2, 6)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(forward(images, 0.5, noise)[0], model(images, 0.5, noise)[0])
    assert len(captures[0][1]) == 2  # the images and the noise
    with pytest.raises(
        ConfigError, match=r"one size: the first was \[2, 3, 16, 24\], 0.5, \[2, 6\], this one is .*0.75"
    ):
        forward(images, 0.75, noise)


def test_another_size_is_refused_by_what_to_do(captures):
    forward = GraphedModel(ViT("rope", num_classes=3, **SIZES).train())
    forward(torch.randn(4, 3, 16, 24))
    for shape in ((3, 3, 16, 24), (4, 3, 24, 24)):
        with pytest.raises(ConfigError, match=r"run.graph takes batches of one size.*optim.drop_last"):
            forward(torch.randn(shape))


def test_frozen_blocks_stay_in_evaluation_mode(captures):
    model = ViT("rope", num_classes=3, **SIZES).train()
    model.blocks[0].eval()
    GraphedModel(model)(torch.randn(2, 3, 16, 24))
    assert captures[0][0].training
    assert not model.blocks[0].training
    assert model.blocks[1].training


def test_what_no_graph_is_made_of_is_refused():
    run, cuda = RunConfig(graph=True), torch.device("cuda")
    check_graph(run, cuda, ALONE)
    with pytest.raises(ConfigError, match="needs a CUDA device, this training is on cpu"):
        Updater(torch.nn.Linear(1, 1), Fit(), OptimConfig(), RunConfig(graph=True, device="cpu"), ALONE)
    with pytest.raises(ConfigError, match="for one process"):
        check_graph(run, cuda, World(0, 2))
    for name in ("compile", "grad_checkpointing"):
        with pytest.raises(ConfigError, match=f"goes without run.{name}"):
            check_graph(RunConfig(graph=True, **{name: True}), cuda, ALONE)


def test_the_updater_replays_and_leaves_autocast_no_cache(captures, monkeypatch):
    monkeypatch.setattr(graphs, "check_graph", lambda *_: None)
    monkeypatch.setattr("vit2dpe.training.update.check_graph", lambda *_: None)
    run = RunConfig(graph=True, device="cpu", precision="bfloat16")
    updater = Updater(torch.nn.Linear(1, 1), Fit(), OptimConfig(), run, ALONE)
    assert isinstance(updater.forward, GraphedModel)
    with updater._precision():
        assert not torch.is_autocast_cache_enabled()
    assert drop_last(OptimConfig(), run) is None  # the smaller last batch is left out
