"""`--run.compile`: the same losses as without, checkpoints that either way of running goes on with."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import OPTIM, RUN, SPEC, same, task
from vit2dpe import load_run
from vit2dpe.data.datasets import load_images
from vit2dpe.models.spec import ModelSpec
from vit2dpe.seeding import derive_seed
from vit2dpe.training.engine import Trainer, fit
from vit2dpe.training.log import read_table

# A compiler may draw dropout from another stream: that is no error, and no equality.
PLAIN = ModelSpec("ViT", SPEC.arguments | dict(drop_path_rate=0.0, drop_rate=0.0, depth=1))
SHORT = replace(OPTIM, epochs=2)


def run(folder, *, resume=False, compiled=True):
    torch.manual_seed(derive_seed(0, "init"))
    data = load_images("digits", limit_train=96, limit_test=40)
    return fit(
        PLAIN.build(), task(data), SHORT, replace(RUN, compile=compiled), folder=folder, spec=PLAIN, resume=resume
    )


def numbers(rows):
    return [row[name] for row in rows for name in ("train_loss", "test_loss")]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_training(backend, tmp_path, monkeypatch):
    """Through the whole of the compiler but, in the quick case, for the code that it writes last."""
    torch.compiler.reset()  # sizes that an earlier test saw would make those here dynamic
    used, compiled = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda net: used.append(net) or partial(compiled, fullgraph=True, backend=backend)(net)
    )
    eager = run(tmp_path / "eager", compiled=False)
    assert not used
    whole = run(tmp_path / "whole")
    assert len(used) == 1
    assert numbers(whole) == pytest.approx(numbers(eager), abs=1e-5)
    assert load_run(tmp_path / "whole").about["state"]["step"] == 8, "names in the checkpoint are the model's own"

    with after_updates({2: Trainer.save, 3: die}), pytest.raises(Killed):
        run(tmp_path / "cut")
    run(tmp_path / "cut", resume=True)
    same(tmp_path / "whole", tmp_path / "cut")
    assert numbers(read_table(tmp_path / "cut/metrics.csv")) == numbers(whole)
