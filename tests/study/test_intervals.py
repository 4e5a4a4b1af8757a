"""Intervals against closed forms, brute force over all resamples, and their coverage in simulations."""

import itertools
import math

import pytest
import torch

from vit2dpe.study.answers import read_answers, write_answers
from vit2dpe.study.intervals import (
    critical_values,
    images_needed,
    largest_deviation,
    normal_quantile,
    of_mean,
    over_images,
    over_seeds,
    seeds_needed,
    t_quantile,
    wilson,
)

# Two-sided 95%, from the tables of t; then quantiles far out.
T = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 9: 2.2621572, 30: 2.0422725, 120: 1.9799304}


@pytest.mark.parametrize(("df", "value"), T.items())
def test_quantiles_of_t_are_those_of_the_tables(df, value):
    assert t_quantile(0.975, df) == pytest.approx(value, abs=1e-6)
    assert t_quantile(0.5, df) == pytest.approx(0, abs=1e-9)


def test_quantiles_of_t_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")  # comes with scikit-learn
    for df, p in itertools.product((1, 2, 3, 4, 5, 8, 11, 50, 301), (0.6, 0.8, 0.95, 0.999, 0.99999)):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-7)


def test_wilson_is_the_published_one():
    """R. G. Newcombe, Statistics in Medicine 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in (
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
    ):
        assert wilson(100 * right / n, n) == (pytest.approx(low, abs=6e-3), pytest.approx(high, abs=6e-3))


def test_a_mean_has_the_interval_that_its_values_allow():
    assert of_mean([50.0], 100, percent=True) == wilson(50, 100)
    assert of_mean([3.5], 100, percent=False) is None
    assert of_mean([50.0], None, percent=True) is None
    assert of_mean([99.0, 100.0], 100, percent=True)[1] == 100, "no share is above 100%"
    low, high = of_mean([1.0, 2.0, 3.0], None, percent=False)
    assert high - 2 == pytest.approx(2 - low)
    assert high - 2 == pytest.approx(T[2] / math.sqrt(3))


def test_several_intervals_over_seeds_are_wider_and_two_equal_seeds_are_not_certain():
    values = [1.0, 2.0, 4.0, 4.5]
    assert over_seeds(values, m=6).low < over_seeds(values).low
    assert over_seeds([3.0, 3.0]) == (3.0, 3.0)
    assert over_seeds([3.0, 3.0], least=2.5).has_zero


def test_the_largest_deviation_is_that_of_every_resample_of_a_tiny_set():
    """All 5^5 draws of five images, one by one in plain Python; and the bootstrap comes near their quantile."""
    differences = torch.tensor([[1, 0, -1, 1, 0], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    rows, n = differences.tolist(), 5
    errors = [math.sqrt(sum((x - sum(row) / n) ** 2 for x in row) / n / n) for row in rows]
    brute = []
    for draw in itertools.product(range(n), repeat=n):
        off = [abs(sum(row[i] for i in draw) / n - sum(row) / n) / e for row, e in zip(rows, errors, strict=True) if e]
        brute.append(max(off))
    weight = torch.tensor([[draw.count(i) for i in range(n)] for draw in itertools.product(range(n), repeat=n)])
    ours = largest_deviation(differences.double(), torch.tensor(errors).double(), weight.double())
    torch.testing.assert_close(ours, torch.tensor(brute).double())
    (critical,) = critical_values([differences], level=0.8, draws=20_000)
    brute.sort()
    assert brute[int(0.79 * len(brute))] - 1e-9 <= critical <= brute[int(0.81 * len(brute))] + 1e-9
    assert critical > 1.2816, "two comparisons: more than the one of a normal distribution"
    assert critical_values([differences]) == critical_values([differences]), "a verdict is the same each time"
    assert critical_values([torch.zeros(2, 5)]) == [pytest.approx(1.959964)]
    assert critical_values([]) == []


def test_a_handful_of_images_is_no_proof():
    """Four images that only one of two models has right: McNemar's exact test gives p = 0.125, the plain interval 0."""
    z = normal_quantile(0.975)
    for alone, told in ((4, False), (5, True), (8, True)):
        difference = torch.zeros(60)
        difference[:alone] = 1
        assert (over_images(difference, z).low > 0) is told


def simulated(n, models, seed, accuracy):
    """(models, n) answers, right more often where an image is easy, so that models agree more than by chance."""
    generator = torch.Generator().manual_seed(seed)
    easy = torch.rand(n, generator=generator) ** 0.5
    return torch.rand(models, n, generator=generator) < easy * accuracy[:, None]


def test_intervals_over_images_hold_together_as_often_as_they_say():
    """Of five models; all four differences to a fixed one are inside at once in 95% of 300 test sets."""
    accuracy = torch.tensor([0.9, 0.9, 0.85, 0.6, 0.3])
    truth = 100 * (accuracy[0] - accuracy[1:]) * 2 / 3  # E √u = 2/3
    inside = 0
    for seed in range(300):
        right = simulated(150, 5, seed, accuracy).long()
        difference = right[0] - right[1:]
        (critical,) = critical_values([difference], draws=300, seed=seed)
        found = [over_images(one, critical) for one in difference]
        inside += all(low <= value <= high for (low, high), value in zip(found, truth.tolist(), strict=True))
    assert 0.92 <= inside / 300 <= 0.985


def test_intervals_over_seeds_hold_together_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    for seeds, m in ((2, 1), (3, 4)):
        values = torch.randn(500, m, seeds, generator=generator, dtype=torch.float64) + 1
        inside = sum(
            all(over_seeds(v, m=m).low <= 1 <= over_seeds(v, m=m).high for v in one) for one in values.tolist()
        )
        assert 0.93 <= inside / 500 <= 0.98


def test_so_many_images_and_seeds_show_the_difference_that_they_promise():
    z = normal_quantile(0.975)
    variance = 0.2  # a fifth of the images differ, either way
    difference = torch.tensor([1, -1, 0, 0, 0, 0, 0, 0, 0, 0]).repeat(10)
    need = images_needed(difference, z)
    assert need == math.ceil((z + 0.8416212) ** 2 * variance / 0.05**2)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(400, need, generator=generator)
    shown = sum(over_images((d < 0.125).long() - (d > 0.925).long(), z).low > 0 for d in draws)
    assert 0.74 <= shown / 400 <= 0.86
    s = seeds_needed(2.0, m=3)
    found = torch.randn(800, s, generator=generator, dtype=torch.float64) * 2 + 5
    assert sum(over_seeds(one, m=3).low > 0 for one in found.tolist()) / 800 >= 0.77
    assert seeds_needed(0.1, m=1) == 2


def test_models_that_answer_alike_do_not_promise_a_difference_from_a_handful_of_images():
    z = normal_quantile(0.975)
    alike = torch.zeros(360, dtype=torch.long)
    alike[0] = 1
    need = images_needed(alike, z)
    assert need == math.ceil((z + 0.8416212) ** 2 * 0.05 * 0.95 / 0.05**2)
    draws = torch.rand(400, need, generator=torch.Generator().manual_seed(0))  # 5 points, and nothing the other way
    assert sum(over_images((d < 0.05).long(), z).low > 0 for d in draws) / 400 >= 0.74
    shares = alike.double() * 0.5  # of the symbols of a sequence: there 5 points may come without that variance
    assert images_needed(shares, z) < 10


def test_answers_are_kept_in_bits_and_only_with_their_table(tmp_path):
    table, path = tmp_path / "results.csv", tmp_path / "answers.safetensors"
    table.write_bytes(b"a table")
    answers = [torch.rand(77) > 0.4, None, torch.ones(8, dtype=torch.bool)]
    write_answers(path, answers, table.read_bytes())
    assert path.stat().st_size < 400
    again = read_answers(path, table, 3)
    assert again[1] is None
    assert torch.equal(again[0], answers[0])
    assert torch.equal(again[2], answers[2])
    assert read_answers(path, table, 4) == [None] * 4
    table.write_bytes(b"another table")
    assert read_answers(path, table, 3) == [None] * 3
    path.write_bytes(b"torn")
    assert read_answers(path, table, 3) == [None] * 3
    write_answers(tmp_path / "nothing", [None, None], b"")
    assert not (tmp_path / "nothing").exists()
