"""`vit2dpe text train` and `vit2dpe text sample`: models of text by any objective, and what they write."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from ..data.pairs import Pairs, load_pair_tokenizer
from ..data.tokenizers import from_json
from ..encodings import parse
from ..errors import CheckpointError, ConfigError, unknown
from ..models.text.generate import generate
from ..models.text.heads import TextDecoder
from ..models.text.seq2seq import Seq2Seq
from ..models.text.translate import translate
from .checkpoint import load_run, write_atomically
from .devices import pick_device, precision
from .distributed import local_device
from .objectives import OBJECTIVES, model_spec, prepare
from .run_folder import write_summary
from .session import training
from .settings import check_numbers
from .tasks.translation import bleu
from .text_settings import SampleConfig, TextTrainConfig, smoke


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
        found = prepare(config, under_way.device, world)
        model = under_way.model(found.spec)
        facts = under_way.record(found.name, found.digest)
        say(
            f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
            f"{found.amount}; on {facts['hardware']}; into {folder}"
        )
        rows = under_way.fit(model, found.task, found.spec)
        if world.first:
            following = _following(config, folder, found.example)
            write_summary(folder, f"{config.model.position} on {found.name}", rows, facts, following)
            best = min((row["val_loss"] for row in rows), default=float("nan"))
            unit = "line" if config.objective == "classify" else "token"
            say(f"validation loss {rows[-1]['val_loss']:.4f} nats a {unit} (best {best:.4f})")
            if config.objective == "classify":
                say(f"right {rows[-1]['val_top1']:.1f}% (best {max(row['val_top1'] for row in rows):.1f}%)")
            if found.pairs is not None:
                say(_translate_test(folder, found.pairs, config, under_way.device))
            say(f"next     {following}")
    return folder


def check(config: TextTrainConfig) -> TextTrainConfig:
    """The settings, after refusing all that can be refused before data are read."""
    if config.objective not in OBJECTIVES:
        raise unknown("objective", config.objective, OBJECTIVES)
    if not 0 <= config.smoothing < 1 or config.beams < 1:
        raise ConfigError(
            f"smoothing must be in [0, 1) and beams at least 1, got {config.smoothing} and {config.beams}"
        )
    if config.smoothing and config.objective not in ("translate", "classify"):
        raise ConfigError(f"smoothing is for objective translate or classify, not {config.objective}")
    if config.objective == "translate":
        bleu(["is it there?"], ["is it there?"])  # sacrebleu, before hours of training
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


def _following(config: TextTrainConfig, folder: Path, example: str) -> str:
    """The command to try next."""
    run = str(folder)
    if config.objective in ("causal", "translate"):
        return shlex.join(["vit2dpe", "text", "sample", "--run", run, "--prompt", example])
    if config.objective == "spans":
        other = "rope" if config.model.position == "t5" else "t5"
        more = ["--config", f"{run}/config.yaml", "--model.position", other, "--run.out", f"{run}_{other}"]
        return shlex.join(["vit2dpe", "text", "train", *more])
    if config.objective == "masked":
        more = ["--objective", "classify", "--data.path", "labelled.tsv", "--run.out", f"{run}_classes", "--init", run]
        return shlex.join(["vit2dpe", "text", "train", *more])
    return shlex.join(["vit2dpe", "show", "--attention", "--text", example, "--run", run])


def _translate_test(folder: Path, pairs: Pairs, config: TextTrainConfig, device: torch.device) -> str:
    """Translate the test set with the best weights, keep what was written and its BLEU, and say it."""
    model = load_run(folder, device, which="best")
    sources, references = zip(*pairs.test, strict=True)
    written = translate(model, pairs.tokenizer, sources, beams=config.beams)  # type: ignore[arg-type]
    score = bleu(written, references)
    write_atomically(folder / "translations.txt", "".join(f"{line}\n" for line in written).encode())
    facts = dict(bleu=score.bleu, signature=score.signature, set=config.data.test, n=len(written), beams=config.beams)
    write_atomically(folder / "bleu.json", json.dumps(facts, indent=1).encode())
    return f"BLEU {score.bleu:.2f} on {len(written)} sentences of {config.data.test} ({score.signature})"


def sample(config: SampleConfig, command: str = "vit2dpe text sample") -> list[str]:
    """Let the model of a run write; each text is printed behind its prompt, and returned. A translator's is the
    translation.

    Raises:
        CheckpointError: if the run is not one of a language model that writes.
        DataError: if the prompt has a character that the model does not know.
        ConfigError: for an empty prompt, or numbers that cannot work.
    """
    model = load_run(config.run, pick_device(config.device), which=config.which)
    about: dict[str, Any] = model.about  # type: ignore[assignment]
    if isinstance(model, Seq2Seq) and about.get("task") == "translation":
        if not config.prompt.strip():
            raise ConfigError("a sentence to translate is needed: --prompt")
        texts = translate(model, load_pair_tokenizer(about), [config.prompt], beams=config.beams)
        print(texts[0])
        return texts
    if not isinstance(model, TextDecoder) or "tokenizer" not in about:
        raise CheckpointError(
            f"{config.run} holds a {about['model']}; what writes is trained by `vit2dpe text train --objective causal` "
            "or translate"
        )
    tokenizer = from_json(about["tokenizer"])
    prompt = tokenizer.encode(config.prompt)
    if not prompt or config.count < 1 or config.length < 1:
        raise ConfigError(
            f"a prompt, and a length and a count of at least 1, are needed: got {config.prompt!r}, {config.length} "
            f"and {config.count}"
        )
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
