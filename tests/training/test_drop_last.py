"""`--optim.drop_last`: batches of one size; an epoch that would be left with none is refused."""

from dataclasses import replace

import pytest

from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import OPTIM, RUN, SPEC, build, same
from vit2dpe.cli import main
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.errors import ConfigError
from vit2dpe.training.distributed import ALONE, World
from vit2dpe.training.engine import fit
from vit2dpe.training.log import read_table
from vit2dpe.training.settings import OptimConfig, RunConfig, drop_last
from vit2dpe.training.task import count_steps
from vit2dpe.training.tasks.classification import ImageTask

UNCOMPILED, BLOCKS = RunConfig(), RunConfig(compile="blocks")


@pytest.mark.parametrize(("count", "steps"), [(32, 2), (33, 3), (15, 1)])
def test_the_rest_is_a_step_unless_it_is_dropped(count, steps):
    assert count_steps(count, 16, ALONE) == steps
    assert count_steps(count, 16, ALONE, None) == max(1, count // 16)
    assert count_steps(count, 16, World(0, 2), None) == max(1, count // 16)
    if count >= 16:
        assert count_steps(count, 16, ALONE, True) == count // 16
    else:
        with pytest.raises(ConfigError, match=r"15 items, a batch 16; give --optim.batch_size 15 or less"):
            count_steps(count, 16, ALONE, True)


def test_one_graph_takes_one_size_unless_settings_say_otherwise():
    assert drop_last(OptimConfig(), UNCOMPILED) is False
    assert drop_last(OptimConfig(), BLOCKS) is None
    for choice in (True, False):
        assert drop_last(OptimConfig(drop_last=choice), UNCOMPILED) is choice
        assert drop_last(OptimConfig(drop_last=choice), BLOCKS) is choice


def test_every_batch_has_one_size_and_a_stopped_run_goes_on(tmp_path):
    def run(folder, resume=False):
        data = load_images("digits", limit_train=60, limit_test=20)
        task = ImageTask(data, (8, 12), 24, augment=AugmentConfig(1, True), drop_last=True)
        assert {
            len(task.batch(epoch, step)["labels"]) for epoch in range(2) for step in range(task.steps_per_epoch)
        } == {24}
        return fit(build(), task, replace(OPTIM, epochs=2), RUN, folder=folder, spec=SPEC, resume=resume)

    assert [row["step"] for row in run(tmp_path / "whole")] == [2, 4]
    with after_updates({3: die}), pytest.raises(Killed):
        run(tmp_path / "cut")
    run(tmp_path / "cut", resume=True)
    same(tmp_path / "whole", tmp_path / "cut")


def test_the_command_drops_and_refuses(tmp_path, capsys):
    words = ["train", "--limit_train", "300", "--limit_test", "20", "--epochs", "1", "--device", "cpu"]
    words += ["--depth", "1", "--width", "8", "--heads", "1", "--out", str(tmp_path / "run"), "--drop_last"]
    assert main([*words, "--batch_size", "140"]) == 0
    assert read_table(tmp_path / "run/metrics.csv")[-1]["step"] == 2
    assert main([*words, "--batch_size", "400", "--out", str(tmp_path / "none")]) == 2
    assert "--optim.batch_size 300 or less, or leave drop_last out" in capsys.readouterr().err
