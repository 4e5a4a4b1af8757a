"""`frozen` computes nothing twice, changes no number, and is never stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from benchmarks import devtrace
from tests.helpers import randn
from vit2dpe import ENCODINGS, ConfigError, ViT, frozen, use_policy
from vit2dpe.encodings import PositionEncoding
from vit2dpe.encodings import frozen as module
from vit2dpe.positions import Positions

SIZES = dict(img_size=(8, 12), patch_size=4, embed_dim=16, num_heads=2, depth=2, num_classes=3)
IMAGES = randn(2, 3, 8, 12)
LARGER = randn(2, 3, 12, 16, seed=1)


def micro(word, seed=0):
    torch.manual_seed(seed)
    model = ViT(word, **SIZES).eval()
    for encoding in model.modules():
        if isinstance(encoding, PositionEncoding):
            for parameter in encoding.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def made(monkeypatch):
    """Names of the encodings that made a Signal, one entry each time."""
    names = []
    for kind in {PositionEncoding, *PositionEncoding.__subclasses__()}:
        if "_signal" in vars(kind):
            original = kind._signal

            def counted(self, q, k, original=original):
                names.append(type(self).__name__)
                return original(self, q, k)

            monkeypatch.setattr(kind, "_signal", counted)
    return names


@pytest.mark.parametrize("word", [*ENCODINGS, "sincos+relative"])
@torch.no_grad()
def test_nothing_is_made_twice_and_no_number_changes(word, made):
    model = micro(word)
    expected = [model(IMAGES), model(LARGER), model(IMAGES)]
    made.clear()
    with frozen(model):
        found = [model(IMAGES), model(LARGER)]
        first = len(made)
        found += [model(IMAGES), model(LARGER)]
        assert len(made) == first > 0
    for ours, theirs in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    made.clear()
    model(IMAGES)
    assert made  # outside, nothing is kept
    assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())


@torch.no_grad()
def test_another_policy_is_another_signal():
    model = micro("rope")
    with frozen(model):
        plain = model(LARGER)
        with use_policy(model, "interpolate", temperature="log"):
            scaled = model(LARGER)
        torch.testing.assert_close(model(LARGER), plain)
    with use_policy(model, "interpolate", temperature="log"):
        torch.testing.assert_close(scaled, model(LARGER))
    assert (scaled - plain).abs().max() > 1e-4


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(IMAGES).square().sum().backward()
    optimizer.step()


CHANGES = {
    "an optimizer's step": step,
    "in-place data": lambda model: [p.data.add_(1e-3) for p in model.parameters()],
    "another tensor as data": lambda model: [setattr(p, "data", p.data + 1e-3) for p in model.parameters()],
    "load_state_dict": lambda model: model.load_state_dict(micro("rope_mixed", seed=1).state_dict()),
    "another dtype": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_parameter_is_an_error_not_a_stale_table(change):
    model = micro("rope_mixed")
    with frozen(model):
        with torch.no_grad():
            model(IMAGES)
        change(model)
        with torch.no_grad(), pytest.raises(ConfigError, match=r"freqs of MixedRoPE changed inside"):
            model(IMAGES.to(next(model.parameters()).dtype))
    with torch.no_grad():
        model(IMAGES.to(next(model.parameters()).dtype))


def test_training_inside_goes_on_as_ever(made):
    model = micro("relative").train()
    with frozen(model):
        for _ in range(2):
            model(IMAGES).sum().backward()
    assert made.count("RelativeBias") == 2 * SIZES["depth"]
    table = model.blocks[0].attn.position.relative_position_bias_table
    assert table.grad.abs().max() > 0


@torch.no_grad()
def test_a_large_matrix_of_biases_is_not_kept(monkeypatch):
    model = micro("relative")
    kept = lambda: model.blocks[0].attn.position.cache.signals[0][-1].bias[0]  # noqa: E731
    for budget, kind in ((10**6, "Dense"), (10, "Table")):
        monkeypatch.setattr(module, "BUDGET", budget)
        with frozen(model):
            model(IMAGES)
            assert type(kept()).__name__ == kind


@torch.no_grad()
def test_an_encoding_that_is_called_by_itself_is_compared_each_time():
    """At one and the same Positions, which a forward of the model would not hand out twice."""
    model, at = micro("rope_mixed"), Positions.grid((2, 3))
    own = model.blocks[1].attn.position
    with frozen(model):
        assert own(at) is own(at)
        model.blocks[0].attn.position.freqs.add_(1)
        own(at)
        own.freqs.add_(1)
        with pytest.raises(ConfigError, match=r"freqs of MixedRoPE changed inside"):
            own(at)


@torch.no_grad()
def test_a_forward_that_fails_leaves_nothing_compared():
    model = micro("relative")
    with frozen(model):
        with pytest.raises(ConfigError, match="multiple of the patch"):
            model(IMAGES[..., 1:])
        model(IMAGES)
        model.blocks[1].attn.position.relative_position_bias_table.add_(1)
        with pytest.raises(ConfigError, match=r"relative_position_bias_table of RelativeBias changed inside"):
            model(IMAGES)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("word", ["relative", "rope_mixed", "learned+relative", "rope"])
def test_on_cuda_a_forward_reads_two_flags(word):
    """One of all parameters, of which a formula has none, and one of the places, whichever block asks for them."""
    model = ViT(word, **SIZES | dict(depth=12)).eval()
    with devtrace.fake_cuda() as recorder:
        devtrace.on_fake_cuda(model)
        images = torch.empty(2, 3, 8, 12, device="cuda")
        with torch.no_grad(), recorder() as recorded:
            model(images)
            plain = recorded.traffic.kernels.total()
            with frozen(model):
                for places in (0, 1, 1):
                    recorded.traffic.clear()
                    model(images)
                    reads, kernels = recorded.traffic.reads, recorded.traffic.kernels.total()
                    assert reads.total() == places + (word != "rope"), recorded.traffic.report(word)
                    assert recorded.traffic.stalls == reads.total()
    assert kernels < plain


@torch.no_grad()
def test_a_model_is_pickled_and_copied_inside():
    """Hooks come along and keep nothing; the original goes on."""
    model, x = micro("relative"), randn(1, 3, 16, 24)
    with frozen(model):
        wanted = model(x)
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(other(x), wanted)
            next(other.position.parameters(), next(other.blocks[0].attn.position.parameters())).add_(1.0)
            assert not torch.equal(other(x), wanted), "the copy keeps nothing"
        assert torch.equal(model(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
