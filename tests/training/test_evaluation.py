"""Evaluation: how often, in which precision, and what it asks of a device."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

from benchmarks import devtrace
from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import OPTIM, RUN, SPEC, build, data, same, task  # noqa: F401
from vit2dpe import ViT
from vit2dpe.errors import ConfigError
from vit2dpe.resolution.sweep import evaluate
from vit2dpe.study import StudyConfig, study
from vit2dpe.study.sizes import TestBatches as Batches
from vit2dpe.training.devices import evaluation_precision
from vit2dpe.training.engine import fit
from vit2dpe.training.log import read_table
from vit2dpe.training.tasks.classification import ImageTask, evaluation_batches

OFTEN = replace(OPTIM, epochs=5, ema=0.0)


@pytest.mark.parametrize(
    ("every", "epochs"), [(None, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (0, [5]), (9, [5])]
)
def test_epochs_that_are_evaluated(data, tmp_path, every, epochs):  # noqa: F811
    seen = []
    rows = fit(build(), task(data), OFTEN, replace(RUN, eval_every=every), folder=tmp_path, spec=SPEC,
               on_epoch=lambda row, model: seen.append(row["epoch"]))  # fmt: skip
    assert [row["epoch"] for row in rows if "test_top1" in row] == epochs == seen
    table = read_table(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in table] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in table if row["test_top1"] != ""] == epochs
    assert all(row["train_loss"] > 0 for row in table)
    assert list(table[0]) == list(rows[-1])


def test_evaluations_change_no_weight_and_a_resumed_run_goes_on(data, tmp_path):  # noqa: F811
    fit(build(), task(data), OFTEN, replace(RUN, eval_every=2), folder=tmp_path / "whole", spec=SPEC)
    with after_updates({9: die}), pytest.raises(Killed):
        fit(build(), task(data), OFTEN, replace(RUN, eval_every=2), folder=tmp_path / "cut", spec=SPEC)
    fit(build(), task(data), OFTEN, replace(RUN, eval_every=2), folder=tmp_path / "cut", spec=SPEC, resume=True)
    same(tmp_path / "whole", tmp_path / "cut")


def test_patience_ends_after_an_evaluation(data, tmp_path, monkeypatch):  # noqa: F811
    scores = iter([{"test_top1": value} for value in (50.0, 40.0, 30.0)])
    monkeypatch.setattr(ImageTask, "evaluate", lambda self, model: next(scores))
    run = replace(RUN, eval_every=2, patience=3)
    rows = fit(build(), task(data), replace(OFTEN, epochs=20), run, folder=tmp_path, spec=SPEC)
    assert len(rows) == 6, "best after epoch 2, more than three epochs ago at the evaluation of epoch 6"


def test_a_study_evaluates_its_last_epoch_alone(tmp_path):
    micro = dict(encodings="none", sizes="16", epochs=2, limit_train=64, limit_test=40, width=16, depth=1, heads=2,
                 batch_size=32, jobs=1, warmup_epochs=0)  # fmt: skip
    for name, more, evaluated in (
        ("last", {}, 1),
        ("each", {"run.eval_every": 1}, 2),
        ("patience", {"patience": 9}, 2),
    ):
        study(StudyConfig.of(micro, out=str(tmp_path / name), **more))
        (table,) = (read_table(path) for path in (tmp_path / name).glob("cells/*/metrics.csv"))
        assert len(table) == 2
        assert sum(row["test_top1"] != "" for row in table) == evaluated
    results = [(tmp_path / name / "results.csv").read_text() for name in ("last", "each")]
    assert results[0] == results[1]


def test_sums_are_those_of_numbers_that_are_read_batch_by_batch(data):  # noqa: F811
    model, batches = build().eval(), list(evaluation_batches(data, (8, 12), 7))
    total, right, named = 0.0, 0, []
    with torch.no_grad():
        for images, labels in batches:
            logits = model(images)
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            named.append(logits.argmax(1))
    answers, counts = [], []
    score = evaluate(model, batches, (1, 5), answers, by_class=counts)
    assert (score["loss"], score["top1"]) == (total / 40, 100 * right / 40)
    labels = data.test.labels
    assert torch.equal(answers[0], torch.cat(named) == labels)
    for row, of in zip(counts[0], (labels, labels[answers[0]], torch.cat(named)), strict=True):
        assert row.tolist() == [int((of == c).sum()) for c in range(10)]
    assert evaluate(model, [], least=0) == {"top1": 0.0, "loss": 0.0, "n": 0}
    with pytest.raises(ConfigError, match="no images"):
        evaluate(model, [])


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"), reason="an older torch has no fake CUDA tensors of real ones"
)
def test_on_a_device_nothing_is_read_before_the_end_and_bytes_are_what_is_sent():
    model = ViT("rope", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10)
    found, copied = devtrace.images(40, (24, 16)), []
    with devtrace.fake_cuda() as recorder:
        devtrace.on_fake_cuda(model)
        seen = []
        model.head.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        device = torch.device("cuda")
        with recorder() as recorded, evaluation_precision("auto", device):
            for pixels, _ in (batches := Batches(found, 16, device)):
                copied.append(pixels.device.type)
            sent = recorded.traffic
            assert sent.to_device.total() == 3 + 3, sent.report("images")  # bytes; mean and width
            assert sent.stalls == 0, sent.report("images")
            sent.clear()
            score = evaluate(model, batches, right=[])
    traffic = recorded.traffic
    assert copied == ["cuda"] * 3
    assert seen == [torch.bfloat16] * 3
    assert score["n"] == 40
    assert traffic.reads.total() == 1, traffic.report("evaluation")
    assert traffic.to_host.total() <= 1, traffic.report("evaluation")


def test_on_the_cpu_it_stays_float32():
    assert isinstance(evaluation_precision("bfloat16", torch.device("cpu")), nullcontext)
