"""`--run.deterministic`: what is set for a training and set back; that no encoding's training needs what it refuses."""

import os
from dataclasses import replace

import pytest
import torch

from benchmarks import devtrace
from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import OPTIM, RUN, SPEC, build, data, same, task  # noqa: F401
from tests.training.test_update import Fit as Line
from tests.training.test_update import X, Y, line
from vit2dpe import ViT
from vit2dpe.data.text import TextData
from vit2dpe.data.tokenizers import Bytes
from vit2dpe.encodings import ENCODINGS
from vit2dpe.errors import ConfigError
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.training.devices import WORKSPACE, deterministic
from vit2dpe.training.engine import fit
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.tasks.language import LanguageTask

SETTINGS = replace(RUN, deterministic=True)


def flags():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
        os.environ.get(WORKSPACE),
    )


@pytest.mark.parametrize(("workspace", "inside"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")])
def test_flags_are_set_for_a_training_and_set_back(workspace, inside, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if workspace is not None:
        monkeypatch.setenv(WORKSPACE, workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = flags()
    assert before[-1] == workspace
    with deterministic(False):
        assert flags() == before
    found = []

    def fail():
        with deterministic(True):
            found.append(flags())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert found == [(True, False, False, False, False, inside)]
    assert flags() == before


def test_a_run_sets_them_and_leaves_none(data, tmp_path):  # noqa: F811
    before, seen = flags(), []
    run = task(data)
    run.evaluate, evaluate = lambda model: seen.append(flags()) or evaluate(model), run.evaluate
    optim = replace(OPTIM, epochs=2)
    with after_updates({6: die}), pytest.raises(Killed):
        fit(build(), run, optim, SETTINGS, folder=tmp_path / "cut", spec=SPEC)
    assert flags() == before
    fit(build(), task(data), optim, SETTINGS, folder=tmp_path / "cut", spec=SPEC, resume=True)
    fit(build(), run, optim, SETTINGS, folder=tmp_path / "whole", spec=SPEC)
    assert {state[0] for state in seen} == {True}
    assert flags() == before
    same(tmp_path / "whole", tmp_path / "cut")


class Put(Line):
    best = None

    def batch(self, epoch, step):
        return X, Y

    def evaluate(self, model):
        return {}

    def loss(self, model, batch):
        found, _ = super().loss(model, batch)
        return found + torch.zeros(3).put_(torch.tensor([1]), torch.ones(1)).sum(), {}


def test_an_operation_without_such_an_algorithm_is_refused_by_name(tmp_path):
    optim = OptimConfig(epochs=1, warmup_epochs=0)
    with pytest.raises(ConfigError, match=r"run\.deterministic: put_ does not have a deterministic implementation"):
        fit(line(), Put(), optim, RunConfig(device="cpu", deterministic=True), folder=tmp_path)
    fit(line(), Put(), optim, RunConfig(device="cpu"), folder=tmp_path)


# On CUDA, by the documentation of torch.use_deterministic_algorithms.
REFUSED = (
    "_upsample", "upsample", "adaptive_avg", "adaptive_max", "avg_pool3d", "fractional_max", "reflection_pad",
    "grid_sampler_2d_backward", "grid_sampler_3d_backward", "nll_loss2d", "_ctc_loss_backward", "put_", "histc",
    "bincount", "median", "kthvalue", "scatter_reduce", "max_unpool",
)  # fmt: skip


def refused(traffic):
    assert traffic.kernels.total() > 50
    return [name for name in traffic.kernels if name.startswith(REFUSED)]


@pytest.mark.parametrize("word", ENCODINGS)
def test_no_training_at_its_own_size_needs_one(word):
    sizes = dict(img_size=(16, 24), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
    assert not refused(devtrace.trace_launches(ViT(word, **sizes), (16, 24), 2))


def test_a_table_that_is_resized_would_be_found():
    model = ViT("learned", img_size=(16, 24), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
    assert refused(devtrace.trace_launches(model, (24, 32), 2))


def test_training_of_text_needs_none():
    text = TextData("bytes", torch.arange(200) % 50, torch.arange(20), Bytes(), "")
    model = TextDecoder(vocab_size=50, position="rope", context=16, embed_dim=48, depth=1, num_heads=3)
    steps = devtrace.trace_task(model, LanguageTask(text, 16, 4, 4, device="cuda"))
    assert not refused(steps["update"])
