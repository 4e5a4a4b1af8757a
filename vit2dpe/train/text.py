"""`vit2dpe text train` and `vit2dpe text sample`: a language model of plain text, and what it writes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from ..encodings import parse
from ..errors import CheckpointError, ConfigError, unknown
from ..models.generate import generate
from ..models.text import TextDecoder
from .checkpoint import ModelSpec, load_run
from .distributed import local_device
from .engine import pick_device, precision
from .runs import write_summary
from .settings import check_numbers
from .start import training
from .text_config import SampleConfig, TextTrainConfig, smoke
from .text_data import LanguageTask, load_text
from .tokenizers import from_json


def train(config: TextTrainConfig, command: str = "vit2dpe text train") -> Path:
    """Train as told and leave a run folder: config.yaml, env.json, metrics.csv, last/, best/, summary.md.

    Args:
        config: settings.
        command: what was typed, for the record.

    Returns:
        the run folder.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained, for what cannot work.
        TrainingError: for what went wrong on the way.
        Stopped: after a signal, when everything is saved.
    """
    config = check(config)
    with training(config, command) as under_way:
        say, folder, world = under_way.say, under_way.folder, under_way.world
        data = load_text(config.data)
        spec = model_spec(config, data.tokenizer.size)
        model = under_way.model(spec)
        task = LanguageTask(
            data,
            config.data.context,
            config.optim.batch_size,
            config.steps_per_epoch,
            mask=data.tokenizer.size if config.objective == "masked" else None,
            seed=config.run.seed,
            device=under_way.device,
            world=world,
        )
        facts = under_way.record(data.name, data.digest)
        say(
            f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
            f"{len(data.train):,} training and {len(data.val):,} validation tokens, {data.tokenizer.size} kinds; "
            f"on {facts['hardware']}; into {folder}"
        )
        rows = under_way.fit(model, task, spec)
        if world.first:
            following = shlex.join(["vit2dpe", "text", "sample", "--run", str(folder), "--prompt", "ROMEO:"])
            write_summary(folder, f"{config.model.position} on {data.name}", rows, facts, following)
            best = min((row["val_loss"] for row in rows), default=float("nan"))
            say(f"validation loss {rows[-1]['val_loss']:.4f} nats a token (best {best:.4f})")
            say(f"next     {following}")
    return folder


def check(config: TextTrainConfig) -> TextTrainConfig:
    """The settings, after refusing all that can be refused before data are read."""
    if config.objective not in ("causal", "masked"):
        raise unknown("objective", config.objective, ("causal", "masked"))
    if config.steps_per_epoch < 1 or config.data.context < 1:
        raise ConfigError(
            f"steps_per_epoch and data.context must be at least 1, got {config.steps_per_epoch} and "
            f"{config.data.context}"
        )
    if config.smoke:
        config = smoke(config)
    check_numbers(config.optim, config.run)
    precision(config.run.precision, pick_device(local_device(config.run.device)))
    parse(config.model.position)
    with torch.device("meta"):
        model_spec(config, 2).build()
    return config


def model_spec(config: TextTrainConfig, vocab_size: int) -> ModelSpec:
    """The model that the settings name, for so many tokens."""
    model, causal = config.model, config.objective == "causal"
    arguments: dict[str, Any] = dict(
        position=model.position,
        vocab_size=vocab_size + (not causal),  # the last one hides others
        context=config.data.context,
        embed_dim=model.width,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        norm=model.norm,
        mlp=model.mlp,
        bias=model.bias,
        drop_rate=model.dropout,
        attn_drop_rate=model.dropout,
    )
    if not causal:
        arguments |= dict(pool="", masked_lm=True)
    return ModelSpec("TextDecoder" if causal else "TextEncoder", arguments | model.options)


def sample(config: SampleConfig, command: str = "vit2dpe text sample") -> list[str]:
    """Let the model of a run write; each text is printed behind its prompt, and returned.

    Raises:
        CheckpointError: if the run is not one of a language model that writes.
        DataError: if the prompt has a character that the model does not know.
        ConfigError: for an empty prompt, or numbers that cannot work.
    """
    model = load_run(config.run, pick_device(config.device), which=config.which)
    about: dict[str, Any] = model.about  # type: ignore[assignment]
    if not isinstance(model, TextDecoder) or "tokenizer" not in about:
        raise CheckpointError(f"{config.run} holds a {about['model']}; writing takes a run of `vit2dpe text train`")
    tokenizer = from_json(about["tokenizer"])
    prompt = tokenizer.encode(config.prompt)
    if not prompt or config.count < 1:
        raise ConfigError(f"a prompt and a count of at least 1 are needed, got {config.prompt!r} and {config.count}")
    device = next(model.parameters()).device
    tokens = generate(
        model,
        torch.tensor([prompt] * config.count, device=device),
        config.length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    texts = [tokenizer.decode(row) for row in tokens.tolist()]
    print("\n---------------\n".join(texts))
    return texts
