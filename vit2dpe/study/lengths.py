"""The length study: train on sequences of one length, measure at others: perplexity of text, answers to sequences.

On one axis what `sizes` does on two: a length N is the size (1, N).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.text import SHAKESPEARE, TextData, load_text
from ..data.text_settings import TextDataConfig
from ..data.transfer import onto, sums
from ..resolution.apply import policies_of, use_policy
from ..spec import Plain
from ..training.devices import pick_device
from ..training.task import Task
from ..training.tasks.language import LanguageTask, token_loss, windows
from ..training.tasks.sequences import SequenceTask, answers
from .answers import Right
from .plan import Plan, Trial
from .rows import Row
from .trials import Measure, digest_of, policies_for

STEPS = 100  # updates of an epoch
LAST = 64  # tokens at the end of a window that are measured by themselves too
SYMBOLS = 10  # of the sequence tasks
FACTS: dict[str, Plain] = dict(tables="learned tables start at N(0, 0.02), truncated")


class Score(NamedTuple):
    """Of a model at one length: nats and percent a token, over n tokens (sequences: over n sequences)."""

    loss: float
    top1: float
    n: int


class Measured(NamedTuple):
    """Mode, metric and value of a row, its score, and which sequences are right, where a row counts those."""

    mode: str
    metric: str
    value: float
    score: Score
    right: Right = None


@dataclass(frozen=True, kw_only=True)
class OverLengths(Measure):
    """The metric of one-dimensional models over the length of their input; which, subclasses say."""

    def digest(self) -> str:
        config, lengths = self.plan.config, [length for _, length in self.plan.sizes]
        return digest_of((lengths, config.policies, config.temperatures))

    def rows(self, model: nn.Module, trial: Trial, folder: Path) -> Iterator[tuple[Row, Right]]:
        plan, train_length = self.plan, self.plan.train_size[1]
        lengths = [length for _, length in plan.sizes]
        policies = policies_for(plan, model)
        if max(lengths) <= train_length:
            policies = policies_of(model)[:1]  # up to the training length a policy changes nothing
        for policy in policies:
            for temperature in plan.config.temperatures:
                for length in lengths:
                    with use_policy(model, policy, temperature=temperature):
                        measured = list(self.scores(model, trial, length))
                    for mode, metric, value, score, right in measured:
                        row = Row(
                            encoding=trial.encoding,
                            policy=policy,
                            temperature=temperature,
                            mode=mode,
                            seed=trial.seed,
                            train_height=1,
                            train_width=train_length,
                            height=1,
                            width=length,
                            metric=metric,
                            value=value,
                            **score._asdict(),
                        )
                        yield row, right

    def scores(self, model: nn.Module, trial: Trial, length: int) -> Iterator[Measured]:
        """What each row at a length holds."""
        raise NotImplementedError(f"{type(self).__name__} has no metric")


@dataclass(frozen=True, kw_only=True)
class Perplexity(OverLengths):
    """exp(mean loss) of a language model, over all tokens of a window and over its last ones."""

    text: TextData

    @classmethod
    def load(cls, plan: Plan) -> Perplexity:
        """Read the text that --root names, or download Shakespeare."""
        config = plan.config
        longest = max(length for _, length in (plan.train_size, *plan.sizes))
        limit = 20 * longest if config.smoke else None
        text = load_text(
            TextDataConfig(path=config.data.root, context=longest, limit=limit, **SHAKESPEARE), option="--root"
        )
        if config.data.limit_test and not config.smoke:
            text = text._replace(val=text.val[: max(config.data.limit_test, longest) + 1])
        source, classes = (text.name, text.digest), text.tokenizer.size
        return cls(plan=plan, text=text, source=source, classes=classes, facts=FACTS)

    def task(self, seed: int) -> Task:
        config = self.plan.config
        device, batch_size = pick_device(config.run.device), config.optim.batch_size
        return LanguageTask(self.text, self.plan.train_size[1], batch_size, STEPS, seed=seed, device=device)

    def scores(self, model: nn.Module, trial: Trial, length: int) -> Iterator[Measured]:
        device = next(model.parameters()).device
        for part, score in text_scores(model, self.text.val, length, device).items():
            yield Measured(part, "perplexity", math.exp(score.loss), score)

    def label(self, row: Row, trial: Trial) -> Row:
        row = replace(super().label(row, trial), mode=row.part)
        return replace(row, mode=row.panel)


@dataclass(frozen=True, kw_only=True)
class ExactAnswers(OverLengths):
    """Percent of sequences that are copied, reversed or sorted without an error."""

    @classmethod
    def load(cls, plan: Plan) -> ExactAnswers:
        """Nothing is read: sequences are drawn from their seed."""
        return cls(plan=plan, source=(f"{plan.config.task}, drawn from its seed", ""), classes=SYMBOLS, facts=FACTS)

    def task(self, seed: int) -> Task:
        config = self.plan.config
        device, batch_size = pick_device(config.run.device), config.optim.batch_size
        return SequenceTask(config.task, self.plan.train_size[1], batch_size, STEPS, seed=seed, device=device)

    def scores(self, model: nn.Module, trial: Trial, length: int) -> Iterator[Measured]:
        device = next(model.parameters()).device
        whole: list[Tensor] = []
        score = answers(model, self.plan.config.task, length, device=device, whole=whole)
        tokens = Score(score["loss"], score["top1"], int(score["n"]))
        yield Measured(f"depth {trial.depth}", "exact", score["exact"], tokens, whole[0])


@torch.no_grad()
def text_scores(model: nn.Module, text: Tensor, length: int, device: torch.device | str = "cpu") -> dict[str, Score]:
    """{"all tokens": ..., "last 64 tokens": ...} of windows of a length.

    The mean over a long window hides what happens at its end: most of its tokens look back no further than in training.
    """
    model.eval()
    ends = {"all tokens": length, f"last {LAST} tokens": LAST}
    found, counts = list[list[Tensor]](), dict.fromkeys(ends, 0)  # loss and right tokens of each end
    for batch in windows(text, length):
        logits = model(onto(batch["tokens"], device))  # (B, length, V)
        labels = onto(batch["labels"], device)  # (B, length)
        numbers = list[Tensor]()
        for name, last in ends.items():
            part, wanted = logits[:, -last:], labels[:, -last:]
            numbers += [token_loss(part, wanted, "sum"), (part.argmax(-1) == wanted).sum()]
            counts[name] += wanted.numel()
        found.append(numbers)
    read = iter(sums(found, 2 * len(ends)))
    return {name: Score(next(read) / n, 100 * next(read) / n, n) for name, n in counts.items()}
