"""The bench on a GPU, without one: clocks, graphs and memory by stand-ins, devices by fake tensors."""

import json
import sys
from contextlib import ExitStack, nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch

from benchmarks import BenchConfig, bench, contenders, devtrace, measure, rotation, ways
from benchmarks import run as bench_run
from benchmarks.table import line, markdown
from vit2dpe import Swin, ViT, explain

MICRO = "embed_dim=48, num_heads=3, patch_size=8"
ROPE, MIXED = f"vit_small_patch16_rope_224({MICRO})", f"vit_small_patch16_rope_mixed_224({MICRO})"
BIAS = f"vit_relpos_small_patch16_224(rel_pos_type=bias, {MICRO})"
MAE = "transformers_vitmae(hidden_size=32, num_attention_heads=2, intermediate_size=64, patch_size=8)"
SWIN = "swin_tiny_patch4_window7_224(depths=(2,), num_heads=(3,), embed_dim=12)"


def rows(tmp_path, **settings):
    small = dict(sizes="32x48", batch=1, depth=1, repeats=1, block=0, modes="inference", out=str(tmp_path / "b.json"))
    return bench(BenchConfig(**small | settings))


# Devices


@pytest.mark.parametrize(
    ("model", "level"),
    [
        (ROPE, "op"), (ROPE, "attention"), (MIXED, "block"), (MIXED, "table"), (BIAS, "table"), (BIAS, "attention"),
        (ROPE, "encoder"), (SWIN, "attention"), ("x_transformers_text(dim=32, heads=2)", "encoder"),
        pytest.param(MAE, "encoder", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_contender_runs_on_the_device_that_it_is_placed_on(model, level, monkeypatch):
    """Nothing that a part holds beside its parameters stays on the CPU: fake tensors refuse two devices at once."""
    recorders = []

    def place(modules, device):
        assert device == "cuda"
        recorders.append(stack.enter_context(devtrace.fake_cuda()))
        return {kind: devtrace.on_fake_cuda(module.eval()) for kind, module in modules.items()}

    size = (1, 8) if "text" in model else (56, 56) if "swin" in model else (32, 32)
    monkeypatch.setattr(contenders, "placed", place)
    with ExitStack() as stack:
        found = contenders.contenders(model, size, 2, None if "swin" in model else 1, level, 0, "cuda")
        x = torch.empty(contenders.tokens(found, 2, size).shape, device="cuda")
        for kind, module in found.items():
            with recorders[0]() as recorded:
                outputs = measure.outputs(measure.infer(module, x))
            assert {y.device.type for y in outputs} == {"cuda"}
            assert not recorded.traffic.to_host
            assert kind == "peer" or not recorded.traffic.to_device, recorded.traffic.report(kind)


@pytest.mark.parametrize(("word", "kernel"), [("rope", "flash_attention"), ("relative", "efficient_attention")])
def test_the_fused_attention_that_runs_on_a_gpu_is_named(word, kernel):
    """By the operation that is dispatched: torch's order of choices differs between cards."""
    model = ViT(word, img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    with devtrace.fake_cuda():
        devtrace.on_fake_cuda(model)
        with torch.autocast("cuda", torch.bfloat16):
            (told,) = explain(model, torch.empty(2, 3, 16, 16, device="cuda"))
    assert told.kernel.path == kernel


# Clocks, graphs, memory


class Stream(list):
    """Stands in for torch.cuda: writes down what is asked of it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now, self.ms = 0.0, iter((3.0, 5.0, 7.0))
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.append(name))
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: self.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1700)

    def event(self, enable_timing=False):
        assert enable_timing
        event = SimpleNamespace(elapsed_time=lambda other: other.at - event.at)

        def record():
            self.append("record")
            event.at = self.now

        event.record = record
        return event

    def run(self):
        self.append("run")
        self.now += next(self.ms, 1.0)


def test_times_on_a_gpu_are_those_between_events(monkeypatch):
    stream = Stream(monkeypatch)
    assert measure.timed(stream.run, "cuda:0") == 0.003
    assert stream == ["synchronize", "record", "run", "record", "synchronize"]
    assert measure.interleaved(dict(a=stream.run), 2, "cuda") == dict(a=[0.005, 0.007])


def test_memory_is_what_a_step_adds_and_is_read_when_it_has_ended(monkeypatch):
    stream = Stream(monkeypatch)
    assert ways.allocated_bytes(stream.run, "cuda") == 700
    assert stream == ["synchronize", "reset_peak_memory_stats", "run", "synchronize"]
    assert ways.allocated_bytes(stream.run, "cpu") is None
    assert stream[4:] == []


def test_eight_runs_warm_a_gpu_up(monkeypatch):
    stream = Stream(monkeypatch)
    ways.warm_up(stream.run, "cuda")
    assert stream == ["run"] * 8
    ways.warm_up(stream.run, "cpu")
    assert stream == ["run"] * 9


def test_a_graph_is_captured_once_warm_and_then_only_replayed(monkeypatch):
    happened, current = [], SimpleNamespace(wait_stream=lambda other: happened.append("wait"))
    graph = SimpleNamespace(replay=lambda: happened.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda which: nullcontext(happened.append("capture")))
    cached = []

    def step(module, x):
        happened.append("step")
        cached.append(torch.is_autocast_cache_enabled())

    run = ways.runner(torch.nn.Identity(), step, torch.ones(1), "graph", "autocast", "cpu")
    assert happened == ["wait", "step", "step", "step", "wait", "capture", "step"]
    run()
    assert happened[7:] == ["replay"]
    assert cached == [False] * 4  # weights that were cast outside of a graph would not be cast when it is replayed


def test_autocast_is_entered_anew_by_every_run():
    """Else weights are cast once for all repetitions, which no training does."""
    linear, x = torch.nn.Linear(3, 3), torch.ones(1, 3)
    counts = []

    def step(module, x):
        with measure._Count() as count:
            module(x)
        counts.append(count.number)

    run = ways.runner(linear, step, x, "eager", "autocast", "cpu")
    run()
    run()
    assert counts == [4, 4]  # x, weight and bias are cast, each time


# Ways


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (ViT("rope", img_size=16, patch_size=8, embed_dim=48, depth=3, num_heads=3), 3),
        (timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), 2),
        (Swin("relative", img_size=28, patch_size=4, embed_dim=12, depths=(2, 1), num_heads=(1, 2), window_size=7), 3),
        (contenders._peer("torchvision_swin_t", {}, (224, 224), None), 12),
    ],
)
def test_blocks_are_found_and_each_is_compiled(model, count, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    run = ways.runner(model, lambda m, x: "ran", torch.ones(1), "blocks", "float32", "cpu")
    run()
    assert len(compiled) == len(set(compiled)) == count


def test_a_row_for_each_way_and_level(tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append("whole") or module)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append("block"))
    found = rows(tmp_path, models=ROPE, level="model", how="eager,compiled,blocks", depth=2)
    assert compiled == ["whole"] * 3 + ["block"] * 6
    assert [(row["compiled"], row.get("how")) for row in found] == [(False, None), (True, None), (False, "blocks")]
    assert all(len(row["peer_ours"]) == 3 and row["backend"] == "flash_attention" for row in found)
    assert "1 images" not in capsys.readouterr().out
    found = rows(tmp_path, models=ROPE, level="op,attention,block,encoder", repeats=0)
    assert [row["level"] for row in found] == ["op", "attention", "block", "encoder"]
    assert all(row["difference"] < 1e-5 for row in found)


def test_a_model_without_blocks_says_so(tmp_path):
    (row,) = rows(tmp_path, models="x_transformers_text(dim=32, heads=2)", sizes="1x8", how="blocks")
    assert "no blocks that the bench finds" in row["failed"]


def test_a_whole_model_is_proved_equal_with_two_images(tmp_path, monkeypatch):
    seen, original = [], bench_run.difference
    monkeypatch.setattr(bench_run, "difference", lambda a, b, x: seen.append(len(x)) or original(a, b, x))
    rows(tmp_path, models=ROPE, batch=3, repeats=0)
    rows(tmp_path, models=ROPE, batch=3, repeats=0, level="attention")
    assert seen == [2, 2, 3, 3]


def test_past_its_seconds_no_row_begins_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: float(next(clock)))
    settings = dict(models=f"{ROPE},{BIAS}", repeats=0, modes="inference,training", seconds=2.5)
    assert len(rows(tmp_path, **settings)) == 2
    assert "2 rows for another run of the same command: 2.5 s are over" in capsys.readouterr().out
    assert len(rows(tmp_path, **settings)) == 4
    assert len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 4


def test_what_does_not_fit_says_so_and_the_next_row_goes_on(tmp_path, monkeypatch):
    def full(module, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")

    monkeypatch.setattr(measure, "kernels", full)
    found = rows(tmp_path, models=ROPE, modes="inference,training")
    assert [row["failed"] for row in found] == ["out of memory: CUDA out of memory"] * 2


def test_a_table_has_what_a_gpu_measures_where_it_was_measured():
    row = dict(model="m", height=8, width=8, mode="training", batch=2, peer_ours=(1.5, 1.4, 1.6), how="graph")
    (heads, *_), on_gpu = markdown([row]), row | dict(ms_peer=3.0, ms_ours=2.0, backend="cudnn_attention")
    assert "ms" not in heads
    on_gpu |= dict(allocated_peer=3 * 2**20, allocated_ours=2**20)
    heads, _, values = markdown([on_gpu])
    assert "| operations | allocated MiB | ms | backend | wanted |" in heads
    assert "| 3.0, 1.0 | 3.0, 2.0 | cudnn_attention |" in values
    assert "m, 8x8, training, graph, batch 2" in values
    assert "cudnn_attention" in line(on_gpu)


# Peers that run on a GPU alone


def liger(q, k, cos, sin):
    """Liger's: pairs (i, i + Dh/2), q and k (B, H, N, Dh), tables (1, N, Dh), each half the same."""
    assert cos.shape == (1, q.shape[2], q.shape[3])

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    return turned(q), turned(k)


def flash(qkv, cos, sin, interleaved=False):
    """flash-attn's: (B, N, 3, H, Dh), tables (N, Dh/2), in place in q and k."""
    assert interleaved
    assert qkv.is_contiguous()
    both, (cos, sin) = qkv[:, :, :2].unflatten(-1, (-1, 2)), (t[:, None, None] for t in (cos, sin))
    a, b = both.unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([turned, qkv[:, :, 2:]], dim=2)


@pytest.mark.parametrize(
    ("word", "module", "name", "function"),
    [
        ("liger_kernel", "liger_kernel.transformers.rope", "liger_rotary_pos_emb", liger),
        ("flash_attn", "flash_attn.layers.rotary", "apply_rotary_emb_qkv_", flash),
    ],
)
def test_kernels_of_others_are_given_what_they_take(word, module, name, function, tmp_path, monkeypatch):
    (row,) = rows(tmp_path, models=word, level="op")
    assert f"{word} rotates on CUDA alone, by Triton; got device=cpu" in row["failed"]
    monkeypatch.setattr(rotation, "ON_CUDA", {})
    monkeypatch.setitem(sys.modules, module, None)
    (row,) = rows(tmp_path, models=word, level="op")
    assert row["failed"].startswith(f"{word} is not installed here")
    assert f"pip install {word.replace('_', '-')}" in row["failed"]
    for parent in (module.partition(".")[0], module.rpartition(".")[0]):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    stand_in = ModuleType(module)
    setattr(stand_in, name, function)
    monkeypatch.setitem(sys.modules, module, stand_in)
    inference, training = rows(tmp_path, models=word, level="op", modes="inference,training", batch=2)
    assert inference["difference"] < 1e-6
    assert training["gradient_difference"] < 1e-5
    (row,) = rows(tmp_path, models=word, level="op", precision="bfloat16", batch=2)
    assert 0 < row["difference"] < 0.1
