"""What training on text is told, as dataclasses that the command line and YAML fill. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class TextDataConfig:
    """What is read.

    Args:
        path: a file of plain text, UTF-8; default: `url`, downloaded once.
        url: where the file comes from if no path is given.
        sha256: of the downloaded file; another one is refused.
        tokenizer: chars, bytes, bpe, wordpiece (learned from the training text), or the path of a tokenizer.json.
        vocab: how many tokens bpe and wordpiece learn.
        val_share: part of the text, at its end, that is kept for validation.
        context: tokens of a training sequence.
        limit: read only so many characters.
    """

    path: str | None = None
    url: str | None = None
    sha256: str | None = None
    tokenizer: str = "chars"
    vocab: int = 8000
    val_share: float = 0.1
    context: int = 256
    limit: int | None = None


@dataclass(frozen=True)
class TextModelConfig:
    """What is trained.

    Args:
        position: the encoding, a word such as rope, sincos+alibi, rope(base=1000).
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over width.
        norm: layer or rms.
        mlp: gelu, gelu_tanh, relu, swiglu, geglu or geglu_tanh.
        bias: whether linear maps have biases.
        dropout: of embedding, attention weights and outputs.
        options: further arguments of the model, such as '{"qk_norm": true}'.
    """

    position: str = "rope"
    width: int = 384
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    norm: str = "layer"
    mlp: str = "gelu"
    bias: bool = True
    dropout: float = 0.0
    options: dict = field(default_factory=dict)


_OPTIM = OptimConfig(epochs=20, batch_size=64, warmup_epochs=0.4, weight_decay=0.1)
_RUN = RunConfig(out="runs/text")


@dataclass(frozen=True)
class TextTrainConfig:
    """Train a language model on plain text.

    Args:
        model: what is trained.
        data: what it is trained on.
        optim: how weights are updated.
        run: where and how it runs.
        objective: causal (the next token) or masked (15% of the tokens hidden, BERT's 80/10/10).
        steps_per_epoch: updates between two evaluations, which is what an epoch is here.
        resume: go on from run.out/last, if it is there.
        init: start from these weights: a run folder or a .safetensors.
        smoke: two steps on the CPU, to see that everything runs.
    """

    model: TextModelConfig = TextModelConfig()
    data: TextDataConfig = TextDataConfig()
    optim: OptimConfig = _OPTIM
    run: RunConfig = _RUN
    objective: str = "causal"
    steps_per_epoch: int = 250
    resume: bool = False
    init: str | None = None
    smoke: bool = False


@dataclass(frozen=True)
class SampleConfig:
    """Let a trained language model write.

    Args:
        run: folder of the run.
        prompt: what it goes on from.
        length: how many tokens it writes.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among so many of the likeliest.
        top_p: draw among the likeliest that together reach this probability.
        count: how many texts.
        seed: of the draws.
        which: best or last.
        device: auto, cpu, cuda, cuda:1, mps.
    """

    run: str = "runs/text"
    prompt: str = "\n"
    length: int = 500
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    count: int = 1
    seed: int = 0
    which: str = "best"
    device: str = "auto"


def smoke(config: TextTrainConfig) -> TextTrainConfig:
    """Two small steps on the CPU."""
    return replace(
        config,
        optim=replace(config.optim, epochs=1, batch_size=2, warmup_epochs=0),
        data=replace(config.data, limit=20 * config.data.context),
        run=replace(config.run, device="cpu", compile=False),
        steps_per_epoch=2,
    )
