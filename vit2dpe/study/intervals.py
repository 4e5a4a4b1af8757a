"""Intervals of a study's numbers: over test images of one training, over trainings of several seeds.

Legend: n test images, s seeds, m comparisons with the best model that are read together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95
DRAWS = 2000  # of the bootstrap
POWER = 0.8  # how often a difference is to be seen, where so many images or seeds are recommended
_CHUNK = 4_000_000  # numbers drawn at a time


class Interval(NamedTuple):
    low: float
    high: float

    @property
    def has_zero(self) -> bool:
        return self.low <= 0 <= self.high


def normal_quantile(p: float) -> float:
    return statistics.NormalDist().inv_cdf(p)


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t at 0.5 <= p < 1.

    P(|t| <= √df tan θ) is a finite sum of powers of cos θ for whole df (Abramowitz and Stegun, 26.7.3 and 26.7.4); θ is
    found by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, df) < 2 * p - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_inside(angle: float, df: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range((df - odd) // 2):
        total += term
        term *= cosine**2 * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def wilson(percent: float, n: float, level: float = LEVEL) -> Interval:
    """Of a share in percent that was measured on n images (E. B. Wilson, JASA 1927)."""
    share, z = percent / 100, normal_quantile((1 + level) / 2)
    centre, scale = (share + z * z / (2 * n)), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, 100 * (centre - half) / scale), min(100.0, 100 * (centre + half) / scale))


def over_seeds(values: Sequence[float], m: int = 1, level: float = LEVEL, least: float = 0.0) -> Interval:
    """t interval of the mean of one value a seed; of m such intervals together by Bonferroni.

    Args:
        values: at least two.
        least: a standard deviation below which none is believed: two seeds that differ by chance in the same number of
            images would seem certain.
    """
    half = t_quantile(1 - (1 - level) / (2 * m), len(values) - 1) * deviation(values, least) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return Interval(mean - half, mean + half)


def deviation(values: Sequence[float], least: float = 0.0) -> float:
    """Standard deviation over seeds, at least `least`."""
    return max(least, statistics.stdev(values))


def of_mean(values: Sequence[float], n: float | None, percent: bool) -> Interval | None:
    """Of one measure at one size: t over several seeds, Wilson's of one seed's share of n images, else none."""
    if len(values) > 1:
        low, high = over_seeds(values)
        return Interval(max(0.0, low), min(100.0, high)) if percent else Interval(low, high)
    return wilson(values[0], n) if percent and n and 0 <= values[0] <= 100 else None


def over_images(difference: Tensor, critical: float) -> Interval:
    """Of the difference of two models' accuracies in points, from the same n images.

    d ± critical · e, with half an image added to each cell of the 2x2 table of right and wrong (A. Agresti and Y. Min,
    Statistics in Medicine 2005): without it a handful of images that only one of the models has right would seem
    certain.

    Args:
        difference: (n,) 1 where only the first model is right, -1 where only the second is, else 0.
        critical: of `critical_values`, or a quantile of the normal distribution.
    """
    n, first, second = len(difference), int((difference > 0).sum()), int((difference < 0).sum())
    mean = (first - second) / (n + 2)
    error = math.sqrt(first + second + 1 - (first - second) ** 2 / (n + 2)) / (n + 2)
    return Interval(100 * (mean - critical * error), 100 * (mean + critical * error))


def critical_values(families: Sequence[Tensor], level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> list[float]:
    """For each family the factor c with which all of its intervals d ± c · e hold together.

    Paired bootstrap over images (P. H. Westfall and S. S. Young, Resampling-Based Multiple Testing, 1993; A. C. Davison
    and D. V. Hinkley, Bootstrap Methods and their Application, 1997): images are drawn with replacement, the same ones
    for all models; c is the quantile over draws of the largest |d* - d| / e of the family. Never below that of one
    comparison, which few images could give.

    Args:
        families: (m, n) differences of right (1) and wrong (0), the same n images everywhere.
        seed: of the draws, so that a verdict is the same each time.
    """
    found = [one.double() for one in families]
    floor = normal_quantile((1 + level) / 2)
    errors = [one.std(1, correction=0) / math.sqrt(one.shape[1]) for one in found]
    n = found[0].shape[1] if found else 0
    largest: list[list[Tensor]] = [[] for _ in found]
    at_a_time, generator = max(1, _CHUNK // max(1, n)), torch.Generator().manual_seed(seed)
    for start in range(0, draws if n else 0, at_a_time):
        index = torch.randint(n, (min(at_a_time, draws - start), n), generator=generator)
        weight = torch.zeros(index.shape, dtype=torch.float64).scatter_add_(1, index, torch.ones_like(index).double())
        for one, error, into in zip(found, errors, largest, strict=True):
            into.append(largest_deviation(one, error, weight))
    return [max(floor, float(torch.cat(each).quantile(level))) for each in largest]


def largest_deviation(differences: Tensor, errors: Tensor, weight: Tensor) -> Tensor:
    """(draws,) the largest |d* - d| / e over (m, n) differences, by how often each draw has each image: (draws, n).

    Pairs of models that are right on the same images have e = 0 and do not deviate.
    """
    varied = errors > 0
    if not varied.any():
        return weight.new_zeros(len(weight))
    kept = differences[varied]
    drawn = weight @ kept.T / differences.shape[1]  # (draws, m)
    return ((drawn - kept.mean(1)).abs() / errors[varied]).amax(1)


def images_needed(difference: Tensor, critical: float, points: float = 5.0) -> int:
    """How many test images show a difference of so many points in 4 of 5 cases: n = (c + z)² v / δ².

    c is the factor of the intervals, z the normal quantile of the power, v the measured variance of the difference of
    one image, δ = points / 100. Where an image is right or wrong, v is at least δ (1 - δ), which the difference itself
    brings along: models that answer alike have a measured variance of almost nothing.
    """
    wanted = points / 100
    variance = float(difference.double().var(correction=0))
    if bool((difference == difference.round()).all()):
        variance = max(variance, wanted * (1 - wanted))
    return math.ceil((critical + normal_quantile(POWER)) ** 2 * variance / wanted**2)


def seeds_needed(deviation: float, m: int, points: float = 5.0, most: int = 1000) -> int:
    """How many seeds show a difference of so many points in 4 of 5 cases: the least s with (c + z) sd / √s <= points.

    c and z are quantiles of t with s - 1 degrees of freedom, of m intervals together and of the power; sd is the
    measured standard deviation of a paired difference over seeds.
    """

    def enough(s: int) -> bool:
        quantiles = t_quantile(1 - (1 - LEVEL) / (2 * m), s - 1) + t_quantile(POWER, s - 1)
        return quantiles * deviation / math.sqrt(s) <= points

    return _least(enough, 2, most)


def _least(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The least whole number from `low` that is enough, where larger ones are too; `high` if none below it is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
