"""Evaluations of text, of pairs and of a student: the numbers that batch by batch are read, read once on a device."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import devtrace
from vit2dpe import ViT
from vit2dpe.data.splits import scaled
from vit2dpe.data.text import IGNORE
from vit2dpe.models.text.heads import TextDecoder, TextEncoder
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.study.lengths import text_scores
from vit2dpe.training import by_class
from vit2dpe.training.distributed import ALONE, World
from vit2dpe.training.tasks.classification import ImageTask, evaluation_batches
from vit2dpe.training.tasks.distill import DistillTask, look
from vit2dpe.training.tasks.seq2seq import decoding_batch, decoding_loss, evaluate_pairs
from vit2dpe.training.tasks.sequences import answers
from vit2dpe.training.tasks.text_classification import LineTask

SIZES = dict(context=12, embed_dim=24, depth=1, num_heads=2)


def draws(*shape, most=9):
    return torch.randint(1, most, shape, generator=torch.Generator().manual_seed(sum(shape)))


def lines():
    rows = [(draws(3 + i % 7), i % 3) for i in range(23)]
    return SimpleNamespace(name="lines", classes=["a", "b", "c"], train=rows, val=rows, tokenizer=None, digest="")


PAIRS = [(draws(2 + i % 5), draws(3 + i % 4)) for i in range(17)]


def encoder():
    torch.manual_seed(0)
    return TextEncoder("rope", vocab_size=9, num_classes=3, pool="mean", **SIZES).eval()


def translator():
    torch.manual_seed(0)
    return Seq2Seq("rope", source_vocab=9, target_vocab=9, **SIZES).eval()


def student(seed):
    torch.manual_seed(seed)
    return ViT("rope", img_size=(8, 12), patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=10).eval()


def distilled(device="cpu"):
    images = devtrace.images(300, (10, 14))
    task = ImageTask(images, images.native, 24, device=device)
    return DistillTask(task, student(0), own=(8, 12), sizes=((8, 12),), temperature=2.0, classifier=True, about={})


@torch.no_grad()
def test_lines_are_those_of_batches_that_are_read_one_by_one():
    model, task = encoder(), LineTask(lines(), 5)
    rows, right, loss = sorted(task.data.val, key=lambda line: len(line[0])), 0.0, 0.0
    for start in range(0, 23, 5):
        batch = task.collate(rows[start : start + 5])
        logits = model(batch["tokens"], batch["valid"])
        right += float((logits.argmax(-1) == batch["labels"]).sum())
        loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
    assert task.evaluate(model) == dict(val_top1=100 * right / 23, val_loss=loss / 23)


@torch.no_grad()
def test_pairs_are_those_of_batches_that_are_read_one_by_one():
    model, loss, n = translator(), 0.0, 0
    for i in range(3):
        batch = decoding_batch(PAIRS[World(i, 3).share(17)], 0, 0)
        loss += float(decoding_loss(model, batch, "sum"))
        n += int((batch["labels"] != IGNORE).sum())
    assert evaluate_pairs(model, PAIRS, 0, 0, 6, ALONE, "cpu")["val_loss"] == loss / n


@torch.no_grad()
def test_a_student_is_that_of_batches_that_are_read_one_by_one():
    task, model, loss, same, n = distilled(), student(1), 0.0, 0.0, 0
    for images, _ in evaluation_batches(task.images.data):
        images = scaled(images, task.own)
        mine, teacher = look(model, images), look(task.teacher, images)
        loss += float(task.differ(teacher, mine)[0]) * len(images)
        same += float((teacher.out.argmax(-1) == mine.out.argmax(-1)).sum())
        n += len(images)
    assert n == 300, "two batches"
    assert task.evaluate(model) == dict(test_loss=loss / n, test_agreement=100 * same / n)


def on_device(run, *models):
    with devtrace.fake_cuda() as recorder:
        for model in models:
            devtrace.on_fake_cuda(model).eval()
        with recorder() as recorded:
            run()
    return recorded.traffic


def evaluated(what):
    if what == "lines":
        model = encoder()
        return on_device(lambda: LineTask(lines(), 12, device="cuda").evaluate(model), model)
    if what == "pairs":
        model = translator()
        return on_device(lambda: evaluate_pairs(model, PAIRS, 0, 0, 9, ALONE, "cuda"), model)
    if what == "a student":
        model, task = student(1), distilled("cuda")
        return on_device(lambda: task.evaluate(model), model, task.teacher)
    if what == "lengths":
        model = TextDecoder("rope", vocab_size=9, **SIZES | dict(context=80))
        return on_device(lambda: text_scores(model, draws(400 * 80 + 1), 80, "cuda"), model)
    model = TextEncoder("rope", vocab_size=10, num_classes=10, pool="", **SIZES)
    return on_device(lambda: answers(model, "reverse", 8, n=20, device="cuda"), model)


@pytest.mark.parametrize("what", ["lines", "pairs", "a student", "lengths", "sequences"])
def test_on_a_device_numbers_are_read_once(what):
    traffic = evaluated(what)
    assert traffic.reads.total() == 1, traffic.report(what)
    assert not traffic.to_host, traffic.report(what)


def test_classes_are_measured_where_and_as_the_rest_is(monkeypatch, tmp_path):
    """Images go to the device as they are, and are resized there; in the precision of training."""
    seen, session = [], SimpleNamespace(folder=tmp_path, device=torch.device("cuda"), world=ALONE, config=CONFIG)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.json").write_text("")

    def evaluate(model, batches, least, by_class):
        seen.extend((images.device.type, tuple(images.shape[-2:])) for images, _ in batches)
        seen.append(torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None)
        by_class.append(torch.ones(3, 10, dtype=torch.long))

    monkeypatch.setattr(by_class, "load_run", lambda folder, device, which: None)
    monkeypatch.setattr(by_class, "evaluate", evaluate)
    with devtrace.fake_cuda() as recorder, recorder() as recorded:
        said = by_class.measure_classes(session, devtrace.images(20, (10, 14)), (8, 12), None)
    assert seen == [("cuda", (8, 12)), torch.bfloat16]
    assert not [name for name in recorded.traffic.host if "upsample" in name], "resized on the host"
    assert said[0].startswith("test balanced accuracy")


CONFIG = SimpleNamespace(run=SimpleNamespace(precision="auto"))
