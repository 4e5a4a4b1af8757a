"""Training: augmentation draws for each sample, seeds decide everything, half precision and bad losses behave."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vit2dpe import ViT
from vit2dpe.data.augment import shift_and_flip
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.errors import ConfigError, TrainingError
from vit2dpe.seeding import derive_seed
from vit2dpe.training.devices import pick_device
from vit2dpe.training.engine import fit
from vit2dpe.training.optimizer import make_optimizer
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.task import Task
from vit2dpe.training.tasks.classification import ImageTask

OPTIM = OptimConfig(lr=3e-3, warmup_epochs=1, epochs=2, batch_size=32)
RUN = RunConfig(device="cpu")


def model(**kwargs):
    torch.manual_seed(0)
    return ViT(
        "rope_mixed+learned", img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=1,
        num_heads=2, class_token=False, global_pool="avg", **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load_images("digits", limit_train=96, limit_test=40)


def test_each_sample_is_shifted_and_flipped_for_itself():
    rows, cols = torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij")
    x = torch.stack([rows, cols]).expand(64, 2, 6, 9)
    out = shift_and_flip(x, 2, True, torch.Generator().manual_seed(0))
    centre = out[:, :, 3, 4]
    shifts, flips = {tuple(c.tolist()) for c in centre}, out[:, 1, 3, 5] < out[:, 1, 3, 4]
    assert len(shifts) > 15
    assert {r for r, _ in shifts} == {1, 2, 3, 4, 5}
    assert 15 < int(flips.sum()) < 49
    assert out.min() >= 0, "edges are reflected, so every pixel is one of the image"
    same = shift_and_flip(x, 2, True, torch.Generator().manual_seed(0))
    assert torch.equal(out, same)
    assert torch.equal(shift_and_flip(x, 0, False, torch.Generator()), x)


def test_reflection_by_hand():
    x = torch.arange(5)[:, None].expand(1, 1, 5, 5)
    draws = (shift_and_flip(x, 2, False, torch.Generator().manual_seed(seed)) for seed in range(40))
    seen = {tuple(draw[0, 0, :, 3].tolist()) for draw in draws}
    assert seen == {(2, 1, 0, 1, 2), (1, 0, 1, 2, 3), (0, 1, 2, 3, 4), (1, 2, 3, 4, 3), (2, 3, 4, 3, 2)}


def task(data, seed=0):
    return ImageTask(data, (16, 16), 32, seed=seed, augment=AugmentConfig(1, label_smoothing=0.1))


def test_a_seed_decides_everything(data, tmp_path):
    runs = []
    for name, seed, noise in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        net = model(drop_path_rate=0.2)
        torch.manual_seed(noise)  # the caller's generator does not matter
        torch.randperm(noise)
        fit(net, task(data, seed), OPTIM, replace(RUN, seed=seed), folder=tmp_path / name)
        runs.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert len((tmp_path / "a/metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_that_is_not_finite_stops_the_run(precision, data, tmp_path):
    net = model()
    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="3 times in a row, last at epoch 0, step 2"):
        fit(net, task(data), OPTIM, replace(RUN, precision=precision), folder=tmp_path)


def test_bfloat16_trains(data, tmp_path):
    net = model()
    rows = fit(net, task(data), OPTIM, replace(RUN, precision="bfloat16"), folder=tmp_path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_tables_and_frequencies_do_not_decay():
    net = model()
    optimizer = make_optimizer(net, OptimConfig(weight_decay=0.05))
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    exempt = {name for name, p in net.named_parameters() if id(p) in free}
    assert {"position.pos_embed", "blocks.0.attn.position.freqs"} <= exempt
    assert "blocks.0.attn.qkv.weight" not in exempt


def test_a_task_that_lacks_something_is_refused_by_name(tmp_path):
    class Half(Task):
        steps_per_epoch = 1

        def batch(self, epoch, step):
            return torch.zeros(2, 3)

        def loss(self, model, batch):
            return model(batch).square().mean(), {}

        def describe(self):
            return {}

    with pytest.raises(TypeError, match=r"abstract class Half .*evaluate"):
        Half()

    class Whole(Half):
        best = ("test_los", "min")

        def evaluate(self, model):
            return {"test_loss": 0.0}

    with pytest.raises(ConfigError, match=r"Whole\.best.*'test_los'.*'test_loss'"):
        fit(torch.nn.Linear(3, 1), Whole(), OptimConfig(epochs=1, warmup_epochs=0), RunConfig(), folder=tmp_path)


def test_keys_and_devices():
    assert derive_seed(0, 1, "order") == derive_seed(0, 1, "order") != derive_seed(0, 1, "augment")
    assert 0 <= derive_seed("x") < 2**63
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device cpu"):
        pick_device("warp")


def test_names_of_the_room_are_imported_on_first_use():
    code = "import sys, vit2dpe.training as room; print('torch' in sys.modules)\n"
    code += "print(all(callable(getattr(room, name)) for name in room.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["False", "True"]
