"""`tune` finds what was hidden in a model, on images whose labels it does not see, and says when nothing helps."""

import math

import pytest
import torch
from torch import nn

from tests.resolution.test_resolution import micro
from vit2dpe import ConfigError, set_policy, tune, use_policy
from vit2dpe.encodings import Dims, build
from vit2dpe.models.timm_api import recorded_policies
from vit2dpe.study import tune as also

SIZE = (24, 48)


class Hidden(nn.Module):
    """Logits that are those of the size 12x16 where policy and temperature are the hidden ones, and lose contrast, by
    how far they are, elsewhere."""

    num_classes, train_grid = 5, (3, 4)

    def __init__(self, word, best):
        super().__init__()
        self.position, self.best, self.seen = build(word, Dims(16, 2, (3, 4))), best, 0
        self.head = nn.Linear(3, 5)
        nn.init.normal_(self.head.weight, std=8.0)

    def forward(self, images):
        self.seen += len(images)
        logits = self.head(images.mean((-2, -1)))
        grid = tuple(side // 4 for side in images.shape[-2:])
        return logits if grid == self.train_grid else logits * math.exp(-self.distance(grid))

    def distance(self, grid):
        policy, temperature = self.position.policy, self.position.temperature
        name = "extrapolate" if policy is None else policy.name
        power = getattr(policy, "power", 1.0)
        rows, columns = power if isinstance(power, tuple) else (power, power)
        factor = 1.0 if temperature is None else temperature(grid)
        wanted = self.best["power"]
        missed = (rows - wanted[0]) ** 2 + (columns - wanted[1]) ** 2 if name == self.best["policy"] else 4.0
        missed += 4 * (math.log(factor) / math.log(math.log(72) / math.log(12)) - self.best["temperature"]) ** 2
        return missed + (getattr(policy, "mode", None) != self.best.get("mode"))


def images(n=40, batch=8):
    return list(torch.randn(n, 3, 12, 16, generator=torch.Generator().manual_seed(3)).split(batch))


def hidden(word="rope", policy="interpolate", power=(1.0, 1.0), temperature=0.0, mode=None):
    torch.manual_seed(0)
    return Hidden(word, dict(policy=policy, power=power, temperature=temperature, mode=mode))


@pytest.mark.parametrize(
    ("planted", "policy", "temperature"),
    [
        (dict(policy="ntk"), "ntk", "none"),
        (dict(policy="yarn", temperature=1.0), "yarn", "log"),
        (dict(power=(0.5, 1.25)), "interpolate(power=(0.5, 1.25))", "none"),
        (dict(power=(0.25, 0.25), temperature=-0.5), "interpolate(power=0.25)", "log(power=-0.5)"),
        (
            dict(word="learned", policy="resize", power=(1.5, 1.5), mode="plain"),
            "resize(mode=plain, power=1.5)",
            "none",
        ),
    ],
)
def test_what_is_hidden_is_found(planted, policy, temperature):
    model = hidden(**planted)
    found = tune(model, images(), SIZE, train_size=(12, 16))
    assert (found.policy, found.temperature, found.helps) == (policy, temperature, True)
    assert found.gain.low > 0
    assert found.gain.nats == pytest.approx(told(found, "default") - told(found, policy), rel=1e-6)
    last = [row for row in found.rows if row.half == "told from"][-1]
    assert (last.policy, last.agreement, last.n) == (policy, 100.0, 20)
    assert last.kl < 1e-3
    assert not recorded_policies(model), "the model is left as it was"
    assert model.position.policy is None


def told(found, policy):
    return next(row.kl for row in found.rows if row.policy == policy and row.half == "told from")


def test_where_nothing_differs_nothing_helps():
    model = hidden(policy="extrapolate")
    found = tune(model, images(), SIZE, train_size=(12, 16))
    assert (found.policy, found.temperature, found.helps) == ("default", "none", False)
    assert found.gain == (0.0, 0.0, 0.0)


def test_noise_alone_does_not_help():
    """Every setting gives other random answers: the best one of the half it is chosen on is none of the other half."""

    class Noise(Hidden):
        def forward(self, images):
            policy, temperature = self.position.policy, self.position.temperature
            own = tuple(images.shape[-2:]) == (12, 16)
            generator = torch.Generator().manual_seed(hash((policy, temperature)) % 2**31)
            return torch.randn(len(images), 5, generator=generator) * (0.0 if own else 1.0)

    torch.manual_seed(0)
    found = tune(Noise("rope", {}), images(64), SIZE, train_size=(12, 16), seed=1)
    assert found.policy == "default" or found.gain.low > 0
    half = {row.half: row.n for row in found.rows}
    assert half == {"chosen on": 32, "told from": 32}


def test_the_same_images_and_seed_give_the_same_choice_whatever_batches_and_labels():
    model, one = micro("rope"), images(16)
    first = tune(model, one, SIZE)
    labelled = [(x, torch.randint(5, (len(x),))) for x in torch.cat(one).split(7)]
    second = tune(model, labelled, SIZE)
    assert [row[:3] for row in first.rows] == [row[:3] for row in second.rows]
    torch.testing.assert_close([row.kl for row in first.rows], [row.kl for row in second.rows], rtol=1e-4, atol=1e-7)
    assert first[:4] == second[:4]
    assert also is tune
    assert [row.kl for row in tune(model, one, SIZE, seed=5).rows] != [row.kl for row in first.rows]


def test_the_divergence_is_that_of_the_model_at_both_sizes():
    model, x = micro("learned"), torch.cat(images(16))
    found = tune(model, images(16), SIZE)
    row = next(row for row in found.rows if row.policy == "resize(mode=plain)" and row.temperature == "none")
    told = torch.zeros(16, dtype=torch.bool)
    told[torch.randperm(16, generator=torch.Generator().manual_seed(0))[:8]] = True
    with torch.no_grad(), use_policy(model, "resize(mode=plain)"):
        big = nn.functional.interpolate(x[~told], SIZE, mode="bicubic", antialias=True)
        student, teacher = model(big).log_softmax(-1), model(x[~told]).log_softmax(-1)
    kl = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    assert row.kl == pytest.approx(float(kl), rel=1e-3)
    assert row.half == "chosen on"


def test_a_model_with_a_policy_of_its_own_starts_from_it():
    model = hidden(power=(0.5, 1.25))
    set_policy(model, "interpolate(power=(0.5, 1.25))")
    found = tune(model, images(), SIZE, train_size=(12, 16))
    assert not found.helps
    assert found.policy == "default"


def test_the_teacher_answers_once_and_each_setting_once_for_its_half():
    model = hidden()
    found = tune(model, images(), SIZE, train_size=(12, 16))
    assert model.seen == 40 + 20 * len(found.rows)
    assert len({row[:3] for row in found.rows}) == len(found.rows)


def test_a_sum_and_windows_are_tuned_by_their_parts():
    found = tune(micro("learned+rope"), images(16), SIZE)
    assert {"extrapolate+resize", "interpolate+resize", "ntk+resize", "yarn+resize"} <= {
        row.policy for row in found.rows
    }
    from tests.models.swin.test_swin import micro as swin

    model = swin("rope_mixed")
    size = tuple(side * patch for side, patch in zip(model.train_grid, model.patch_embed.patch_size, strict=True))
    found = tune(model, [torch.randn(8, model.in_chans, *size)], (size[0] * 2, size[1]))
    assert {"keep+extrapolate", "scale+extrapolate", "keep+yarn", "scale+ntk"} <= {row.policy for row in found.rows}


def headless():
    model = micro("rope")
    model.reset_classifier(0)
    return model


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (lambda: micro("none"), SIZE, "nothing to tune: this ViT has no encoding"),
        (lambda: micro("rope"), (12, 16), "12x16 is the model's own size"),
        (lambda: micro("rope"), (25, 16), "25"),
        (lambda: headless(), SIZE, "has no classes to agree on"),
        (lambda: nn.Linear(2, 2), SIZE, "does not say the size|no train_grid"),
    ],
)
def test_what_cannot_be_tuned_is_refused(model, size, message):
    with pytest.raises(ValueError, match=message):
        tune(model(), images(16), size)


def test_too_few_images_and_images_that_run_out_are_refused():
    with pytest.raises(ConfigError, match="at least 8 images, got 4"):
        tune(micro(), images(4), SIZE)
    with pytest.raises(ConfigError, match="the same at each iteration: first 16, now 0"):
        tune(micro(), iter(images(16)), SIZE)
