"""One update, by hand: what reaches the optimizer is the gradient of the mean over the batch, clipped as told."""

import copy
import math

import pytest
import torch
from torch import nn

from vit2dpe import ViT
from vit2dpe.data.text import IGNORE, TextData
from vit2dpe.data.tokenizers import Bytes
from vit2dpe.errors import TrainingError
from vit2dpe.models.text.heads import TextEncoder
from vit2dpe.training.distributed import ALONE
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.task import Task
from vit2dpe.training.tasks.language import LanguageTask, token_loss
from vit2dpe.training.update import Updater

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [2.0, 2.0], [-1.0, 4.0]])
Y = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])


class Fit(Task):
    """Least squares of a line through X and Y."""

    steps_per_epoch = 4
    best = None

    def batch(self, epoch, step):
        raise NotImplementedError("a test hands batches in")

    def evaluate(self, model):
        return {}

    def describe(self):
        return {}

    def loss(self, model, batch):
        x, y = batch
        error = (model(x) - y).square()
        return error.mean(), {"largest": error.max().item()}


class Watched(Updater):
    """Keeps what the optimizer is given instead of stepping."""

    def __init__(self, model=None, run=None, **optim):
        optim = OptimConfig(**dict(lr=0.1, epochs=2, warmup_epochs=0, clip_grad=0.0) | optim)
        super().__init__(model or line(), Fit(), optim, run or RunConfig(device="cpu"), ALONE)
        self.given: list[torch.Tensor] = []
        self.optimizer.step = lambda *_: self.given.append(self.model.weight.grad.clone())  # type: ignore[method-assign]


def line():
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    return model


def by_hand(x=X, y=Y):
    """(loss, gradient) of the mean square, weights 0.5."""
    error = x.sum(1, keepdim=True) / 2 - y
    return error.square().mean().item(), (2 * error * x).mean(0, keepdim=True)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_gradient_is_that_of_the_mean_however_the_batch_is_cut(parts):
    updater = Watched(accumulate=parts)
    loss, gradient = by_hand()
    for _ in range(2):  # nothing is left of the update before
        found = updater.step((X, Y), epoch=0, step=0, done=0)
        torch.testing.assert_close(updater.given[-1], gradient)
        assert found.numbers["train_loss"] == pytest.approx(loss, rel=1e-6)
        assert found.norm == pytest.approx(gradient.norm().item(), rel=1e-6)
        assert (found.items, found.finite) == (5, True)
    cut = [by_hand(x, y)[0] for x, y in zip(X.split(1), Y.split(1), strict=True)]
    if parts == 5:  # a number that the task says is averaged over its parts
        assert found.numbers["largest"] == pytest.approx(sum(cut) / 5, rel=1e-6)


@pytest.mark.parametrize(("most", "left"), [(0.0, None), (0.25, 0.25), (1e6, None)])
def test_clipping_shortens_what_is_longer_and_says_the_length_before(most, left):
    updater = Watched(clip_grad=most)
    gradient = by_hand()[1]
    found = updater.step((X, Y), epoch=0, step=0, done=0)
    assert found.norm == pytest.approx(gradient.norm().item(), rel=1e-6)
    assert updater.given[0].norm().item() == pytest.approx(left or gradient.norm().item(), rel=1e-4)
    assert nn.functional.cosine_similarity(updater.given[0], gradient).item() == pytest.approx(1, abs=1e-5)


def test_the_model_trains_again_after_an_evaluation():
    updater = Watched()
    updater.model.eval()
    updater.step((X, Y), epoch=0, step=0, done=0)
    assert updater.model.training


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_step_is_taken_where_the_loss_or_the_gradient_alone_is_not_finite(bad):
    for x, y in ((torch.where(X == 4, bad, X), Y), (X, torch.where(Y == 5, bad, Y))):
        updater = Watched()
        assert not updater.step((x, y), epoch=0, step=0, done=0).finite
        assert not updater.given
    updater = Watched()
    updater.model.weight.register_hook(lambda gradient: gradient * bad)
    found = updater.step((X, Y), epoch=0, step=0, done=0)
    assert math.isfinite(found.numbers["train_loss"])
    assert not found.finite
    assert not updater.given


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_model_computes_in_the_precision_that_was_asked_for(precision):
    updater, seen = Watched(run=RunConfig(device="cpu", precision=precision)), []
    updater.model.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    updater.step((X, Y), epoch=0, step=0, done=0)
    assert seen == [getattr(torch, precision)]
    assert updater.model.weight.dtype == torch.float32


def test_float16_leaves_out_what_overflows_and_halves_its_factor():
    """That is no bad loss: the factor starts at 65,536 and is halved until the gradient can be held."""
    updater = Watched(run=RunConfig(device="cpu", precision="float16"))
    factors = []
    for done in range(20):
        factors.append(updater.scaler.get_scale())
        found = updater.step((X, Y), epoch=0, step=done, done=done)
        assert found.finite
        if updater.given:
            break
        assert not math.isfinite(found.norm)
    assert factors == [65536 / 2**n for n in range(len(factors))]
    assert len(factors) > 1
    torch.testing.assert_close(updater.given[0], by_hand()[1], rtol=1e-2, atol=1e-2)
    assert not updater.step((X * math.nan, Y), epoch=0, step=20, done=20).finite
    assert updater.step((X, Y), epoch=0, step=21, done=21).finite


def test_an_average_follows_with_the_count_of_updates():
    """The first update copies the weights; timm's warm-up lets the decay grow from there."""
    updater = Watched(ema=0.9)
    value, decays = 0.5, [updater.ema.get_decay(n) for n in (1, 2, 3)]
    for done, decay in enumerate(decays):
        with torch.no_grad():
            updater.model.weight.fill_(2.0 + done)
        updater.step((X, Y), epoch=0, step=done, done=done)
        value = decay * value + (1 - decay) * (2.0 + done)
        assert updater.averaged.weight[0, 0].item() == pytest.approx(value, rel=1e-6)
    assert decays[0] == 0 < decays[1] < decays[2] < 0.9
    assert Watched(ema=0.9, ema_warmup=False).ema.get_decay(2) == 0.9
    assert Watched().averaged is None


def test_the_learning_rate_that_is_told_is_the_schedules():
    """With layer decay the groups have others, the first of them the lowest."""
    model = ViT("none", img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=2)
    updater = Updater(
        model, Fit(), OptimConfig(lr=0.1, layer_decay=0.5, warmup_epochs=0), RunConfig(device="cpu"), ALONE
    )
    updater.schedule.step_update(0)
    assert updater.optimizer.param_groups[0]["lr"] < 0.1
    assert updater.lr == pytest.approx(0.1)


def test_blocks_are_computed_again_where_that_is_asked():
    model = ViT("none", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=2)
    Updater(model, Fit(), OptimConfig(), RunConfig(device="cpu", grad_checkpointing=True), ALONE)
    assert model.grad_checkpointing
    with pytest.raises(ValueError, match="Linear cannot compute its blocks again"):
        Watched(run=RunConfig(device="cpu", grad_checkpointing=True))


def test_out_of_memory_advises_twice_as_many_parts(monkeypatch):
    updater = Watched(accumulate=2)

    def full(*_):
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(Fit, "loss", full)
    with pytest.raises(TrainingError, match=r"epoch 1, step 3 with 3 items at a time: try --optim\.accumulate 4"):
        updater.step((X, Y), epoch=1, step=3, done=7)


def test_draws_within_the_model_are_keyed_by_the_update():
    class Noisy(nn.Linear):
        def forward(self, x):
            self.drawn = torch.rand(()).item()
            return super().forward(x)

    drawn = []
    for seed, epoch, done in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        updater = Watched(Noisy(2, 1, bias=False), RunConfig(device="cpu", seed=seed))
        updater.step((X, Y), epoch=epoch, step=0, done=done)
        drawn.append(updater.model.drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


class Hidden(Fit):
    """Least squares over the rows that are hidden; the mean of none is not a number, nor is its gradient."""

    def count(self, batch):
        return int(batch[2].sum())

    def loss(self, model, batch):
        x, y, hidden = batch
        error = ((model(x) - y).square()[:, 0] * hidden).sum() / hidden.sum()
        return error, {"twice": 2 * error}


@pytest.mark.need("D5")
@pytest.mark.parametrize("hidden", [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 1, 0, 1, 0]])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_part_without_an_item_adds_nothing(parts, hidden):
    """Such as a part of masked tokens in which none is hidden."""
    updater, rows = Watched(accumulate=parts), torch.tensor(hidden, dtype=torch.bool)
    updater.task = Hidden()
    found = updater.step((X, Y, rows), epoch=0, step=0, done=0)
    loss, gradient = by_hand(X[rows], Y[rows])
    torch.testing.assert_close(updater.given[0], gradient)
    assert found.numbers == {"train_loss": pytest.approx(loss, rel=1e-6), "twice": pytest.approx(2 * loss, rel=1e-6)}
    assert (found.items, found.finite) == (sum(hidden), True)


@pytest.mark.need("D5")
def test_a_batch_without_an_item_takes_no_step_and_is_no_bad_loss():
    updater = Watched(accumulate=2)
    updater.task = Hidden()
    found = updater.step((X, Y, torch.zeros(5, dtype=torch.bool)), epoch=0, step=0, done=0)
    assert not updater.given
    assert (found.numbers, found.items, found.finite) == ({}, 0, True)


@pytest.mark.need("D5")
@pytest.mark.parametrize("parts", [1, 4, 8])
def test_masked_tokens_in_parts_are_those_of_the_batch(parts):
    """The library's own task: of 8 sequences of 4 tokens about half have none that is hidden."""
    tokenizer = Bytes()
    text = TextData("bytes", torch.arange(60) * 7 % 50, torch.arange(20), tokenizer, "")
    task = LanguageTask(text, 4, 8, 4, mask=tokenizer.size)
    batch = task.batch(0, 0)
    empty = (batch["labels"] == IGNORE).all(1).sum().item()
    assert 0 < empty < 8, "else this shows nothing"
    torch.manual_seed(0)
    model = TextEncoder(
        vocab_size=tokenizer.size + 1,
        position="rope",
        context=4,
        embed_dim=8,
        depth=1,
        num_heads=2,
        pool="",
        masked_lm=True,
    )
    wanted = copy.deepcopy(model)
    token_loss(wanted(batch["tokens"]), batch["labels"]).backward()
    optim = OptimConfig(epochs=2, warmup_epochs=0, clip_grad=0.0, accumulate=parts, batch_size=8)
    updater = Updater(model, task, optim, RunConfig(device="cpu"), ALONE)
    updater.optimizer.step = lambda *_: None
    found = updater.step(batch, epoch=0, step=0, done=0)
    assert found.finite
    for one, other in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_what_encodings_learn_has_a_rate_of_its_own(layer_decay):
    """A factor on what it would have had, at each step of the schedule; everything else as without it."""
    rates = []
    for factor in (1.0, 10.0):
        torch.manual_seed(0)
        model = ViT("relative+learned", img_size=(8, 12), patch_size=4, embed_dim=16, depth=2, num_heads=2)
        optim = OptimConfig(lr=1e-3, epochs=4, warmup_epochs=1, layer_decay=layer_decay, position_lr=factor)
        updater = Updater(model, Fit(), optim, RunConfig(device="cpu"), ALONE)
        updater.schedule.step_update(6)
        of = {id(one): group for group in updater.optimizer.param_groups for one in group["params"]}
        assert len(of) == sum(len(group["params"]) for group in updater.optimizer.param_groups)
        assert updater.lr == pytest.approx(of[id(model.head.weight)]["lr"])
        rates.append({name: (of[id(one)]["lr"], of[id(one)]["weight_decay"]) for name, one in model.named_parameters()})
    assert rates[0].keys() == rates[1].keys()
    for name, (rate, decay) in rates[0].items():
        assert rates[1][name] == (pytest.approx(rate * (10 if "position" in name else 1)), decay)
