"""What a context sets belongs to the thread or task that entered it, and to the model it was given."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

from vit2dpe import ConfigError, Swin, ViT, attention_maps, explain, frozen, set_policy, use_policy
from vit2dpe.encodings import base
from vit2dpe.testing import randomise

SIZES = dict(img_size=(8, 12), patch_size=4, embed_dim=16, num_heads=2, depth=2, num_classes=3)
LARGER = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(1))


def vit(word="rope", **more):
    torch.manual_seed(0)
    return randomise(ViT(word, **SIZES | more)).eval()


def swin():
    torch.manual_seed(0)
    sizes = dict(img_size=(16, 24), patch_size=2, window_size=(4, 6), embed_dim=8, num_classes=3)
    return randomise(Swin("rope", depths=(2,), num_heads=(2,), **sizes)).eval()


@torch.no_grad()
def logits(model):
    return model(LARGER)


def elsewhere(function, *args):
    """The result of a call in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


POLICIES = [(vit, "interpolate"), (vit, "ntk"), (swin, "scale+interpolate")]


@pytest.mark.need("A5")
@pytest.mark.parametrize(("make", "policy"), POLICIES)
def test_a_policy_is_not_seen_by_another_thread(make, policy):
    model = make()
    plain = logits(model)
    with use_policy(model, policy, temperature="log"):
        inside = logits(model)
        assert torch.equal(elsewhere(logits, model), plain)
    assert float((inside - plain).abs().max()) > 1e-5
    assert torch.equal(logits(model), plain)


@pytest.mark.need("A5")
def test_two_threads_follow_policies_of_their_own_at_once():
    model, both_inside = vit(), threading.Barrier(2)

    def answer(policy):
        with use_policy(model, policy):
            both_inside.wait(10)
            out = logits(model)
            both_inside.wait(10)
            return out

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(answer, ["interpolate", "ntk"]))
    for policy, out in zip(["interpolate", "ntk"], found, strict=True):
        with use_policy(model, policy):
            assert torch.equal(out, logits(model))


@pytest.mark.need("A5")
def test_two_tasks_follow_policies_of_their_own_at_once():
    model = vit()

    async def answer(policy):
        with use_policy(model, policy):
            await asyncio.sleep(0)  # the other task enters its context meanwhile
            out = logits(model)
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        return out, logits(model)

    async def both():
        return await asyncio.gather(answer("interpolate"), answer("ntk"))

    plain = logits(model)
    for policy, (inside, after) in zip(["interpolate", "ntk"], asyncio.run(both()), strict=True):
        with use_policy(model, policy):
            assert torch.equal(inside, logits(model))
        assert torch.equal(after, plain)


@pytest.mark.need("A5")
@pytest.mark.parametrize(("make", "policy"), POLICIES)
def test_contexts_left_in_the_order_they_were_entered_leave_nothing_behind(make, policy):
    model = make()
    plain = logits(model)
    first, second = ExitStack(), ExitStack()
    first.enter_context(use_policy(model, policy))
    second.enter_context(use_policy(model, policy.replace("interpolate", "extrapolate"), temperature="log"))
    second.enter_context(frozen(model))
    inside = logits(model)
    first.close()
    assert torch.equal(logits(model), inside)  # the second is in force
    second.close()
    assert torch.equal(logits(model), plain)
    assert base.overrides() == ()


def test_a_policy_for_good_holds_in_every_thread():
    model = vit()
    set_policy(model, "interpolate")
    assert torch.equal(elsewhere(logits, model), logits(model))
    with use_policy(model, "extrapolate"), use_policy(model, "default"):
        assert torch.equal(logits(model), elsewhere(logits, model))


@pytest.mark.need("A5")
def test_frozen_tables_are_not_seen_by_another_thread():
    model = vit("rope_mixed")
    position = model.blocks[0].attn.position
    with torch.no_grad(), frozen(model):
        model(LARGER)
        assert len(position.cache.signals) == 1
        assert elsewhere(lambda: position.cache) is None
    assert position.cache is None


def test_a_backward_in_another_thread_recomputes_under_the_policy_of_its_forward():
    """As autograd's own threads do on a GPU."""
    model = vit("rope_mixed")
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        with use_policy(model, "interpolate"):
            loss = model(LARGER).square().sum()
        elsewhere(loss.backward)
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@contextmanager
def of_the_thread():
    """As with a torch that cannot trace context variables."""
    traceable, base._TRACEABLE = base._TRACEABLE, False
    try:
        yield
    finally:
        base._TRACEABLE = traceable


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("make", [vit, swin])
def test_a_compiled_model_follows_the_policies_of_its_thread(make, old):
    model, policy = make(), "scale+interpolate" if make is swin else "interpolate"
    torch._dynamo.reset()
    with of_the_thread() if old else ExitStack():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(logits(compiled), logits(model))
            with use_policy(model, policy):
                torch.testing.assert_close(logits(compiled), logits(model))
                torch.testing.assert_close(elsewhere(logits, compiled), elsewhere(logits, model))


@pytest.mark.need("A6")
def test_maps_are_those_of_the_model_that_was_given():
    a, b = vit(), vit(depth=3)
    with attention_maps(a) as maps:
        b(LARGER)
        assert maps == {}
        a(LARGER)
        kept = {name: one.clone() for name, one in maps.items()}
        b(LARGER + 1)
        elsewhere(a, LARGER + 1)
        elsewhere(b, LARGER + 1)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(torch.equal(one, kept[name]) for name, one in maps.items())


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.stock = model, nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

    def forward(self, images):
        self.stock(torch.ones(1, 3, 8))
        return self.model(images)


@pytest.mark.need("A6a")
@torch.no_grad()
def test_copies_of_a_model_that_is_looked_into_are_other_models():
    """Made inside the context, as averages of weights and saved models are."""
    model = Holder(vit()).eval()
    with attention_maps(model) as maps:
        model(LARGER)
        kept = {name: one.clone() for name, one in maps.items()}
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for one in copies:
            one(LARGER + 1)
        assert len(maps) == 3
        assert all(torch.equal(one, kept[name]) for name, one in maps.items())
    for one in copies:
        torch.testing.assert_close(pickle.loads(pickle.dumps(one))(LARGER), model(LARGER))
        with attention_maps(one) as maps:
            one(LARGER)
        assert all(torch.equal(one, kept[name]) for name, one in maps.items())


@pytest.mark.need("A6")
def test_two_threads_look_into_one_model_at_once():
    model, both_inside = vit(), threading.Barrier(2)

    def look(images):
        with attention_maps(model) as maps:
            both_inside.wait(10)
            model(images)
            both_inside.wait(10)
        return maps

    inputs = [LARGER, LARGER + 1]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(look, inputs))
    for images, maps in zip(inputs, found, strict=True):
        with attention_maps(model) as alone:
            model(images)
        assert all(torch.equal(maps[name], one) for name, one in alone.items())
        assert len(maps) == len(alone) == 2


@pytest.mark.need("A6")
def test_a_task_looks_into_a_model_while_another_runs_it():
    model, seen = vit(), {}

    async def look():
        with attention_maps(model) as maps:
            await asyncio.sleep(0)
            seen.update(maps)
            await asyncio.sleep(0)

    async def run():
        model(LARGER)
        await asyncio.sleep(0)
        model(LARGER)

    async def both():
        await asyncio.gather(look(), run())

    asyncio.run(both())
    assert seen == {}


@pytest.mark.need("A6")
@torch.no_grad()
def test_explain_reports_its_own_thread_and_model():
    a, b = vit(), vit("alibi", depth=3)

    def run_others(*_):
        if threading.current_thread() is threading.main_thread():
            b(LARGER)
            elsewhere(logits, a)

    a.blocks[0].norm1.register_forward_hook(run_others)
    lines = explain(a, LARGER)
    assert [line.name for line in lines] == ["blocks.0.attn", "blocks.1.attn"]
    assert [line.bias.path for line in lines] == ["none", "none"]


def test_observers_do_not_nest_and_say_so():
    a, b = vit(), vit()
    with attention_maps(a):
        with pytest.raises(ConfigError, match="do not nest"), attention_maps(b):
            pass
        with pytest.raises(ConfigError, match="do not nest"):
            explain(b, LARGER)
        assert elsewhere(lambda: len(explain(b, LARGER))) == 2
    assert len(explain(b, LARGER)) == 2


def test_compiled_models_are_compiled_again_once_nobody_looks():
    model = vit()
    first, second = ExitStack(), ExitStack()
    elsewhere(first.enter_context, attention_maps(model))
    second.enter_context(attention_maps(model))
    first.close()
    second.close()
    torch._dynamo.reset()
    graphs = []
    torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)(LARGER)
    assert graphs


def test_an_observer_of_a_forward_sees_no_later_recomputation():
    model = vit()
    model.set_grad_checkpointing(True)
    with attention_maps(model) as maps:
        loss = model(LARGER).sum()
        maps.clear()
    loss.backward()
    assert maps == {}
