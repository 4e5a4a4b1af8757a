"""timm's training tasks, which its train.py runs a step through, and the calls of its benchmark.py, on our models."""

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver

from tests.helpers import randn
from vit2dpe import from_timm
from vit2dpe.encodings import ENCODINGS

MICRO = dict(embed_dim=48, depth=2, num_heads=3, num_classes=6)
SWIN = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=6)
X, Y = randn(4, 3, 32, 32), torch.arange(4)


def vit(position="rope_mixed+learned", **kwargs):
    return create_model("vit2dpe_tiny_patch4_32", position=position, **{**MICRO, **kwargs})


def swin():
    return create_model("vit2dpe_swin_tiny_patch2_window4_32", position="logcpb", **SWIN)


def distilled():
    theirs = create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=4, **MICRO)
    return from_timm(theirs, position="rope")


# The student's task; a teacher of another encoding, or of timm's own, where there is one.
CASES = {
    "a class": (vit, lambda student: ClassificationTask(student, verbose=False)),
    "a class, Swin": (swin, lambda student: ClassificationTask(student, verbose=False)),
    "logits of ours": (vit, lambda student: LogitDistillationTask(student, vit("relative"), verbose=False)),
    "logits of a Swin": (vit, lambda student: LogitDistillationTask(student, swin(), verbose=False)),
    "features of another width": (
        vit,
        lambda student: FeatureDistillationTask(student, vit("alibi", embed_dim=60), verbose=False),
    ),
    "features, Swin": (swin, lambda student: FeatureDistillationTask(student, vit(), verbose=False)),
    "a token": (distilled, lambda student: TokenDistillationTask(student, vit("none"), verbose=False)),
}


@pytest.mark.parametrize(("make", "task_of"), CASES.values(), ids=CASES)
def test_a_task_of_timm_trains_saves_and_resumes_ours(tmp_path, make, task_of):
    torch.manual_seed(0)
    task = task_of(make()).train()
    task.setup_ema(decay=0.5)
    part = task.get_trainable_module()
    optimizer = create_optimizer_v2(part, opt="adamw", lr=3e-3, layer_decay=0.7)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) >= 4, "stem, blocks and head have rates of their own"
    losses = []
    for _ in range(4):
        loss = task(X, Y)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.update_ema()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    saver = CheckpointSaver(part, optimizer, checkpoint_dir=tmp_path, recovery_dir=tmp_path, task=task)
    saver.save_checkpoint(0, metric=losses[-1])
    again = task_of(make())
    again.setup_ema(decay=0.5)
    resume_task_checkpoint(again, tmp_path / "last.pth.tar", log_info=False)
    load_task_ema_checkpoint(again, tmp_path / "last.pth.tar")
    with torch.no_grad():
        for ema in (False, True):
            expected = task.get_eval_model(ema=ema).eval()(X)
            assert torch.equal(again.get_eval_model(ema=ema).eval()(X), expected)
        assert not torch.equal(task.get_eval_model(ema=True)(X), task.get_eval_model().eval()(X))


@pytest.mark.parametrize("position", ENCODINGS)
def test_what_the_benchmark_of_timm_asks_of_a_model(position):
    """Its arguments, its order: made, moved with a memory format, measured in eval, then an SGD step in train."""
    dtype = torch.bfloat16
    wanted = dict(num_classes=6, in_chans=3, global_pool=None, scriptable=False, drop_rate=0.0, drop_path_rate=None)
    made = timm.create_model("vit2dpe_tiny_patch4_32", position=position, drop_block_rate=None, **MICRO | wanted)
    made.to(device="cpu", dtype=dtype, memory_format=torch.channels_last)
    size = resolve_data_config(dict(img_size=None), model=made, use_test_size=True)["input_size"]
    x = torch.randn((2, *size), dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert made.eval()(x).dtype == dtype
    optimizer = create_optimizer_v2(made.train(), opt="sgd", lr=1e-2)
    output = made(x)
    torch.nn.functional.cross_entropy(output, torch.empty(2, dtype=torch.long).random_(made.num_classes)).backward()
    before = made.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(made.head.weight, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")  # torch's on itself
@pytest.mark.parametrize("position", ENCODINGS)
@torch.no_grad()
def test_a_counter_of_operations_can_trace_the_model(position):
    """fvcore, which the benchmark counts with, records one call by `torch.jit`."""
    model = vit(position, depth=1).eval()
    traced = torch.jit.trace(model, X, check_trace=False)
    torch.testing.assert_close(traced(X), model(X))
    assert any(node.kind() == "aten::_convolution" for node in traced.inlined_graph.nodes())
