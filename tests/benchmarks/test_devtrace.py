"""On fake CUDA tensors: a forward copies nothing and never waits, a training step does both a few times."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from benchmarks import backward, devmemory, devtrace
from vit2dpe import ViT, use_policy
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.data.text import TextData
from vit2dpe.data.tokenizers import Bytes
from vit2dpe.encodings.base import PositionEncoding
from vit2dpe.encodings.registry import ENCODINGS
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.spec import parse_term
from vit2dpe.training.tasks.language import LanguageTask

SIZE = (32, 32)


def vit(position, depth=12):
    return ViT(
        position, img_size=SIZE, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10,
        class_token=False, global_pool="avg",
    )  # fmt: skip


# Twelve blocks, bfloat16 autocast; 8 casts of weights and biases a block are autocast's own.
@pytest.mark.parametrize(
    ("position", "kernels"), [("none", 253), ("learned", 260), ("rope", 273), ("rope_mixed", 337), ("relative", 283)]
)
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_copies_nothing_and_waits_for_nothing(position, kernels, training):
    traffic = devtrace.trace_forward(vit(position), SIZE, training=training)
    assert 0 < traffic.kernels.total() <= kernels, traffic.report(position)
    assert not traffic.to_device, traffic.report(position)
    assert traffic.stalls == 0, traffic.report(position)


# Forward, loss and backward; timm's rotary ViT launches 1,231, the one with learned frequencies 1,409.
@pytest.mark.parametrize(
    ("position", "kernels"),
    [("none", 644), ("rope", 664), ("rope_mixed", 764), ("fire(shared=true)", 746), ("fire", 1153)],
)
def test_a_training_step_launches_few_kernels(position, kernels):
    traffic = devtrace.trace_launches(vit(position), SIZE)
    assert 0 < traffic.kernels.total() <= kernels, traffic.report(position)


def test_memory_of_training_with_biases_at_1024_tokens():
    """Forward and backward of six blocks of ViT-S/16 at 512 pixels, to that of no encoding."""

    def peak(position):
        sizes = dict(img_size=512, embed_dim=384, depth=6, num_heads=6, num_classes=10)
        return devmemory.trace_memory(ViT(position, **sizes), (512, 512), batch=16)

    nothing = peak("none")
    assert nothing > 2**30
    assert peak("relative") < 1.08 * nothing
    assert peak("lookhere") < 1.01 * nothing  # computed beside the logits


OPTIONS = (
    "alibi(distance=squared)",
    "logcpb(form=cr)",
    "relative(resize=geometric)",
    "rope(sections=(4, 3), order=interleaved, start=(0.5, 1.0))",
    "rope(order=head)",
    "rope_dinov3(jitter=1.5, shift=0.1)",
    "sincos+rope",
)


@pytest.mark.parametrize("word", [*ENCODINGS, *OPTIONS])
def test_no_encoding_copies_or_waits(word):
    """In training, and where one once did in evaluation: at its own size and another, under each policy; nor does it
    draw on the host, which a CUDA graph repeats."""
    modes = (True, False) if word in ("rope_golden", "logcpb", "rope_dinov3", OPTIONS[0]) else (True,)
    sizes = dict(img_size=(16, 24), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
    model = ViT(word, **sizes)
    encodings = [part for part in model.modules() if isinstance(part, PositionEncoding)]
    policies = {
        policy for part in encodings for policy in part.policies if all(policy in p.policies for p in encodings)
    }
    with devtrace.fake_cuda() as recorder:
        devtrace.on_fake_cuda(model)
        settings = ((None, (16, 24)), *((policy, (32, 40)) for policy in sorted(policies - {"default"})))
        for training, (policy, size) in itertools.product(modes, settings):
            setting = nullcontext() if policy is None else use_policy(model, policy, temperature=True)
            grad = torch.set_grad_enabled(training)
            with setting, grad, recorder() as recorded, torch.autocast("cuda", torch.bfloat16):
                model.train(training)(torch.empty(2, 3, *size, device="cuda"))
            traffic = recorded.traffic
            assert not traffic.to_device, (policy, traffic.report(word))
            assert traffic.stalls == 0, (policy, traffic.report(word))
            assert not {name for name in traffic.host if "rand" in name or "uniform" in name}, (policy, traffic.host)


def test_the_backward_pass_in_python_gives_the_gradients_of_the_engine():
    model, images = vit("rope_mixed", depth=2), torch.randn(2, 3, *SIZE)
    found = []
    for run in (backward.backward, torch.Tensor.backward):
        model.zero_grad()
        run(model(images).square().sum())
        found.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def step():
    return devtrace.trace_step(vit("rope", depth=2), SIZE)


def test_a_batch_is_copied_to_the_device_and_not_back(step):
    batch = step["batch"]
    assert batch.to_device.total() <= 4, batch.report("batch")  # images, labels, where pixels come from, mean and width
    assert batch.stalls == 0, batch.report("batch")
    assert batch.kernels.total() <= 6, batch.report("batch")


HEAVY = AugmentConfig(
    4, True, policy=parse_term("rand(ops=2, magnitude=9)"), erase=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1
)


@pytest.mark.parametrize(
    ("augment", "kernels", "copies"),
    [(HEAVY, 270, 8), (AugmentConfig(4, True, policy=parse_term("trivial")), 122, 5), (AugmentConfig(crop=0.3), 29, 4)],
)
def test_augmentation_is_few_launches_and_never_waits(augment, kernels, copies):
    batch = devtrace.trace_step(vit("none", depth=1), SIZE, 64, augment)["batch"]
    assert 0 < batch.kernels.total() <= kernels, batch.report("batch")
    assert 0 < batch.to_device.total() <= copies, batch.report("batch")
    assert batch.stalls == 0, batch.report("batch")


def test_an_update_reads_nothing_and_its_numbers_once_later(step):
    update, numbers = step["update"], step["numbers"]
    assert not update.to_device, update.report("update")
    assert update.stalls == 0, update.report("update")
    assert list(update.late.values()) == [1], update.report("update")
    assert list(numbers.reads.values()) == [1], numbers.report("numbers")
    assert not numbers.to_host


def test_an_update_of_text_counts_its_labels_on_the_host():
    tokenizer = Bytes()
    text = TextData("bytes", torch.arange(200) % 50, torch.arange(20), tokenizer, "")
    model = TextDecoder(vocab_size=50, position="rope", context=16, embed_dim=48, depth=1, num_heads=3)
    step = devtrace.trace_task(model, LanguageTask(text, 16, 4, 4, device="cuda"))
    assert step["batch"].to_device.total() == 2, step["batch"].report("batch")
    update = step["update"]
    assert update.stalls == 0, update.report("update")
    assert list(step["numbers"].reads.values()) == [1]


class Chatty(torch.nn.Module):
    def forward(self, x):
        scale = torch.tensor([2.0]).to(x.device)
        x = x * scale
        if x.sum() > 0:
            x = x + 1
        x = x * x.mean().item() + x.cpu().sum().to("cuda") + len(x.amax(dim=(1, 2, 3)).tolist())
        return x + torch.multinomial(x.flatten(1).softmax(1), 1)[..., None, None]


def test_copies_and_reads_are_seen():
    traffic = devtrace.trace_forward(Chatty(), SIZE)
    assert traffic.to_device.total() == traffic.blocking.total() == 2
    assert traffic.to_host.total() == 1
    assert sorted(read.split()[0] for read in traffic.reads.elements()) == [
        "__bool__",
        "item",
        "multinomial.default",
        "tolist",
    ]
    report = traffic.report("chatty")
    assert report.startswith("chatty: ")
    assert "2 copies to the device, 1 to the host, 4 reads" in report


def test_nothing_stays_patched():
    before = torch.nn.functional.scaled_dot_product_attention, torch.Tensor.item, torch.nn.Module.to
    devtrace.trace_forward(vit("rope", depth=1), SIZE)
    assert before == (torch.nn.functional.scaled_dot_product_attention, torch.Tensor.item, torch.nn.Module.to)
    assert torch.ones(1).item() == 1


def test_the_command_prints_totals_and_lines(capsys):
    devtrace.main(["rope", "--depth", "1", "--batch", "4", "--rows", "1", "--policy", "rand(ops=1, magnitude=9)"])
    said = capsys.readouterr().out
    assert [line.partition(":")[0] for line in said.splitlines() if " kernels, " in line] == [
        "forward",
        "batch",
        "update",
        "numbers",
    ]
    assert "rand_augment.py:" in said
