"""Settings of training on text, and of sampling; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..data.text_settings import TextDataConfig
from ..ranges import Count, Depth, NotNegative, Positive, Rate, Seed, Share
from ..spec import Settings, changed
from .settings import OptimConfig, RunConfig, parts_of


@dataclass(frozen=True)
class TextModelConfig(Settings):
    """The model of text.

    Args:
        position: spec of the encoding, such as rope, sincos+alibi, rope(base=1000).
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over width.
        norm: layer or rms, layernorm or rmsnorm in full.
        mlp: gelu, gelu_tanh, relu, swiglu, geglu or geglu_tanh.
        bias: whether linear maps have biases.
        dropout: of embedding, attention weights and outputs.
        options: further arguments of the model, such as '{"qk_norm": true}'.
    """

    position: str = "rope"
    width: Count = 384
    depth: Depth = 6
    heads: Count = 6
    mlp_ratio: Positive = 4.0
    norm: str = "layer"
    mlp: str = "gelu"
    bias: bool = True
    dropout: Rate = 0.0
    options: dict = field(default_factory=dict)


_OPTIM = OptimConfig(epochs=20, batch_size=64, warmup_epochs=0.4, weight_decay=0.1)
_RUN = RunConfig(out="runs/text")


@dataclass(frozen=True)
class TextTrainConfig(Settings):
    """Train a language model on plain text, a translator on pairs of sentences, or a classifier of lines.

    Args:
        model: the model.
        data: the text.
        optim: optimizer and schedule.
        run: where and how it runs.
        objective: causal (the next token), masked (15% of the tokens hidden, BERT's 80/10/10), spans (T5's span
            corruption), translate (pairs of sentences) or classify (lines with labels).
        steps_per_epoch: updates between two evaluations, which is what an epoch is here; for pairs and lines an epoch
            is all of them once.
        smoothing: label smoothing, to translate and to classify.
        beams: of the translation of the test set; 1 is greedy.
        resume: go on from run.out/last, if it is there.
        init: start from these weights: a run folder or a .safetensors. To classify, a run's tokenizer is taken too.
        smoke: two steps on the CPU, to see that everything runs.
    """

    model: TextModelConfig = TextModelConfig()
    data: TextDataConfig = TextDataConfig()
    optim: OptimConfig = _OPTIM
    run: RunConfig = _RUN
    objective: str = "causal"
    steps_per_epoch: Count = 250
    smoothing: Rate = 0.0
    beams: Count = 4
    resume: bool = False
    init: str | None = None
    smoke: bool = False


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Sample text from a trained language model, or translate with a trained translator.

    Args:
        run: folder of the run.
        prompt: what it goes on from, or the sentence to translate.
        length: how many tokens it writes.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among so many of the likeliest.
        top_p: draw among the likeliest that together reach this probability.
        count: how many texts.
        beams: of a translation; 1 is greedy.
        seed: of the draws.
        which: best or last.
        device: auto, cpu, cuda, cuda:1, mps.
    """

    run: str = "runs/text"
    prompt: str = "\n"
    length: Count = 500
    temperature: NotNegative = 0.8
    top_k: Count | None = None
    top_p: Share | None = None
    count: Count = 1
    beams: Count = 4
    seed: Seed = 0
    which: str = "best"
    device: str = "auto"


LONGEST = 16  # characters of a token, on average; of subwords


def smoke(config: TextTrainConfig) -> TextTrainConfig:
    """Two small steps on the CPU, of as much text as gives a sequence of each split, whatever its tokens are."""
    data = config.data
    longest = 1 if data.tokenizer in ("chars", "bytes") else LONGEST
    enough = math.ceil(longest * (data.context + 1) / min(data.val_share, 1 - data.val_share)) + 1
    return changed(
        config,
        {
            "optim.epochs": 1, "optim.batch_size": 2, "optim.accumulate": parts_of(config.optim, 2),
            "optim.warmup_epochs": 0, "run.device": "cpu",
            "data.limit": 8 if config.objective == "translate" else max(20 * data.context, enough),
            "run.compile": False, "run.graph": False, "steps_per_epoch": 2,
        },
    )  # fmt: skip
