"""Every number among the settings has its range, and whatever is typed ends in a result or in one line."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vit2dpe.cli import main
from vit2dpe.cli.commands import COMMANDS
from vit2dpe.cli.options import Option, options_of
from vit2dpe.errors import ConfigError
from vit2dpe.ranges import INT32, Range, numbers_of
from vit2dpe.spec import Settings, changed, filled, texts_of
from vit2dpe.training.settings import OptimConfig, TrainConfig

need = pytest.mark.need("D15")


class Reached(Exception):
    """A command got past its checks."""


def config_of(command: str) -> type[Settings]:
    module, _, name = COMMANDS[command].config.partition(":")
    return getattr(importlib.import_module(f"vit2dpe.{module}"), name)


def nested(config: Settings) -> Iterator[type[Settings]]:
    """The dataclass of these settings, and of those within."""
    yield type(config)
    for field in fields(config):
        if isinstance(value := getattr(config, field.name), Settings):
            yield from nested(value)


@need
@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_its_range(command):
    for kind in nested(config_of(command)()):
        ranges, texts = numbers_of(kind), texts_of(kind)  # what is read from text is positive: spec.py
        for name, hint in get_type_hints(kind).items():
            parts = {hint, *get_args(hint), *(part for outer in get_args(hint) for part in get_args(outer))}
            if parts & {int, float} and name not in texts:
                assert name in ranges, f"{kind.__name__}.{name} may hold any number"


# What may stand on the right of an option: text and JSON that fit somewhere, or nowhere.
WORDS = [
    "", " ", "null", "none", "auto", "x", "-", "0", "-1", "1", "2.5", "nan", "1e999", "²", "é\n", "true", "[]", "{}",
    "[1, 2]", "[null]", "1,2", "0,3", "8x8", "8x", "rope", "rope+", "+", "rope(base=0)", "rope(base=x)", "sincos+alibi",
    "rope_mixed+relative", "scale", "default", "all", "swin", "copy", "text", "mae", "simmim", "masked", "classify",
    "adamw", "sgd", "step", "noam", "rand(ops=0)", "rand(ops=2, magnitude=9)", "trivial", "float16", "fsdp", "bpe",
    "token", "map", "avg", "vit2dpe_tiny_patch4_32", "resnet18", "digits", "folder", "cifar10", "hf:", "tar", "bytes",
]  # fmt: skip
OPTIONS = [
    "[]", "3", "{}", "null", '{"": 1}', '{"depht": 3}', '{"num_kv_heads": 2}', '{"qk_norm": true}', '{"qk_norm": "x"}',
    '{"reg_tokens": -1}', '{"num_heads": 0}', '{"mlp_ratio": 0}', '{"num_classes": 2}', '{"norm_layer": "x"}',
    '{"kv_heads": 0}', '{"window": -1}', '{"depth": [1]}', '{"dtype": "float16"}', '{"device": "cuda"}',
]  # fmt: skip
LEFT = ("out", "wandb", "url", "root", "path", "pairs", "sha256", "table", "tensorboard", "compile")  # places, and slow
NEEDED = {  # without these a command reads none of its settings
    "evaluate": ["--model=vit2dpe_tiny_patch4_32", "--data=digits"], "probe": ["--run=x"], "report": ["x"],
    "predict": ["vit2dpe_tiny_patch4_32", __file__], "swap": ["--init=x", "--to=rope", "--data=digits"],
}  # fmt: skip
LAST_CHECKS = [  # where a command has checked its settings, and would read data or a run
    "vit2dpe.training.objectives.images.run", "vit2dpe.training.objectives.masked_images.run",
    "vit2dpe.training.objectives.text.run", "vit2dpe.study.run.prepare", "vit2dpe.study.probe.load_run",
    "vit2dpe.study.evaluate.load_subject", "vit2dpe.study.exchange.describe", "vit2dpe.study.predict.load_subject",
    "vit2dpe.training.sampling.load_run", "vit2dpe.study.html.merge",
    "vit2dpe.plots.encodings.save", "vit2dpe.plots.attention.save", "vit2dpe.cli.show.load_model",
    "benchmarks.run._row", "vit2dpe.cli.doctor.CHECKS",
]  # fmt: skip
EVERY: dict[str, list[Option]] = {
    command: [option for option in options_of(config_of(command)()) if option.name.rpartition(".")[2] not in LEFT]
    for command in COMMANDS
}


def values(option: Option) -> st.SearchStrategy[str]:
    """In the range, at its ends, beyond them, and of other types."""
    words = st.sampled_from(WORDS)
    if option.name.endswith("options"):
        return st.sampled_from(OPTIONS)
    if option.range is None:
        return words
    low, high = option.range.low, INT32 if option.range.high is None else option.range.high
    whole = int in (option.hint, *get_args(option.hint))
    inside = st.integers(0, 9) if whole else st.floats(0, 1)
    ends = st.sampled_from([low, low - 1, low + 1, high + 1, 10**30, -(10**30), 0, 1e-300, 0.5, 1.5, 1e300])
    both = (inside | inside | ends).map(
        lambda number: f"[{number}, {number}]" if "tuple" in str(option.hint) else str(number)
    )
    return both | both | both | words


@st.composite
def command_lines(
    draw: st.DrawFn, commands: Collection[str] = tuple(COMMANDS), skip: Collection[str] = ()
) -> list[str]:
    command = draw(st.sampled_from(sorted(commands)))
    options = [option for option in EVERY[command] if option.name not in skip]
    chosen = draw(st.lists(st.sampled_from(options), max_size=3, unique_by=lambda o: o.name)) if options else []
    words = [draw(values(o)) if o.positional else f"--{o.name}={draw(values(o))}" for o in chosen]
    return [*command.split(), *NEEDED.get(command, []), *words]


def check(line: list[str], capsys: pytest.CaptureFixture[str], fine: Collection[int] = (0, 2)) -> None:
    """A result, or one line and the status that says why there is none."""
    capsys.readouterr()
    try:
        status = main(line)
    except Reached:
        status = 0
    error = capsys.readouterr().err
    assert status in fine, f"{line}: {status}, {error}"
    if status:
        assert error.startswith("vit2dpe: "), f"{line}: {error}"
        assert error.count("\n") == 1, f"{line}: {error}"


def whatever(examples: int) -> settings:
    """The same examples at every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        phases=[Phase.generate],
    )


def stop(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Commands end where they have checked their settings."""

    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.chdir(folder)
    for place in LAST_CHECKS:
        monkeypatch.setattr(place, () if place.endswith("CHECKS") else reached)


@need
@whatever(200)
@given(line=command_lines())
def test_whatever_is_typed_ends_in_a_result_or_in_one_line(line, capsys, monkeypatch, tmp_path):
    stop(monkeypatch, tmp_path)
    check(line, capsys)


@need
@pytest.mark.slow
@whatever(2000)
@given(line=command_lines())
def test_whatever_is_typed_ten_times_as_much_of_it(line, capsys, monkeypatch, tmp_path):
    stop(monkeypatch, tmp_path)
    check(line, capsys)


MICRO = ["--smoke", "--model.width=16", "--model.depth=1", "--model.heads=2"]
TINY = {  # commands that train, at their smallest
    "train": [*MICRO, "--data.size=8"],
    "pretrain": [*MICRO, "--data.size=8", "--decoder.width=16", "--decoder.heads=2", "--mask_unit=4"],
    "text train": [*MICRO, "--data.context=8", "--data.path=text.txt"],
    "study": [*MICRO, "--data.size=8", "--sizes=8", "--encodings=rope", "--jobs=1"],
}
KEPT = ("smoke", "init", "jobs", "seeds", "run.device", "data.workers", "data.name", "model.name")  # as they are above


@need
@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_what_passes_the_checks_trains(examples, capsys, monkeypatch, tmp_path):
    """Two steps; 1 is the status of a loss that is not finite, as a learning rate
    of 9, which is in its range, may make it: no check can say so beforehand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)

    @whatever(examples)
    @given(line=command_lines(TINY, KEPT))
    def smoke(line: list[str]) -> None:
        command = " ".join(line[: 1 + (line[0] == "text")])
        large = [word for word in line if re.search(r"=\[?-?[\d.]{3}|e\+?\d", word)]
        more = [word for word in line[len(command.split()) :] if word not in large]
        named = {word.partition("=")[0] for word in more}
        given = [word for word in TINY[command] if word.partition("=")[0] not in named]
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        check([*command.split(), *given, *more, f"--run.out={out}"], capsys, (0, 1, 2))

    smoke()


@need
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--model.heads", "0"], "model.heads must be at least 1, got 0"),
        (["train", "--model.patch", "0"], "model.patch must be at least 1, got 0"),
        (["train", "--model.width", "-64"], "model.width must be at least 1, got -64"),
        (["train", "--model.depth", "-1"], "model.depth must be in [0, 10000], got -1"),
        (["train", "--model.depth", "2000000000"], "model.depth must be in [0, 10000], got 2000000000"),
        (["train", "--model.mlp_ratio", "0"], "model.mlp_ratio must be above 0, got 0.0"),
        (["train", "--model.mlp_ratio", "0.001"], "mlp_ratio must leave hidden channels: got 0.001 of 64"),
        (["train", "--model.drop_path", "1.5"], "model.drop_path must be in [0, 1), got 1.5"),
        (["train", "--model.drop_path=-0.1"], "model.drop_path must be in [0, 1), got -0.1"),
        (["train", "--run.threads", "-3"], "run.threads must be in [0, 4096], got -3"),
        (["train", "--optim.betas", "[0.9, 1.5]"], "optim.betas must be in [0, 1), got 1.5"),
        (["train", "--optim.epochs", "3000000000"], "optim.epochs must be at most 2147483647, got 3000000000"),
        (["train", "--augment.policy", "null", "--model.heads", "0"], "model.heads must be"),
        (["train", "--augment.train_sizes", "[null]"], "augment.train_sizes: a size is written"),
        (["train", "--model.pool", ""], "a classifier pools its tokens"),
        (["train", "--model.options", '{"num_heads": 0}'], "num_heads must be at least 1, got 0"),
        (["train", "--model.options", '{"num_classes": 2}'], "num_classes is decided by the data"),
        (["train", "--model.options", '{"qk_norm": "x"}'], "option qk_norm of ViT must be bool, got 'x'"),
        (["train", "--model.options", '{"reg_tokens": -1}'], "reg_tokens must be at least 0, got -1"),
        (["pretrain", "--model.options", '{"qk_norm": "x"}'], "option qk_norm of ViT must be bool, got 'x'"),
        (["text", "train", "--data.vocab", "-3"], "data.vocab must be at least 1, got -3"),
        (["text", "train", "--model.options", '{"depht": 3}'], "did you mean 'depth'"),
        (["text", "train", "--model.options", '{"num_kv_heads": 2}'], "did you mean 'num_heads'"),
        (["text", "train", "--model.mlp_ratio", "0.001"], "the MLP needs hidden channels"),
        (["train", "--resume="], "resume must be of type bool, got ''"),
    ],
)
def test_the_value_the_range_and_the_setting_are_named(args, message, capsys, monkeypatch, tmp_path):
    stop(monkeypatch, tmp_path)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@need
def test_a_range_holds_however_a_value_comes(tmp_path, capsys, monkeypatch):
    for make in (
        lambda: OptimConfig(ema=1.0),
        lambda: TrainConfig.of(ema=1.0),
        lambda: replace(OptimConfig(), ema=1.0),
        lambda: changed(TrainConfig(), {"optim.ema": 1.0}),
        lambda: filled(TrainConfig(), {"optim.min_lr": -1.0}),
    ):
        with pytest.raises(
            ConfigError, match=r"(ema must be in \[0, 1\), got 1.0|min_lr must be at least 0, got -1.0)$"
        ):
            make()
    (tmp_path / "x.yaml").write_text("lr: 0.1\n")
    (tmp_path / "x.cpu.yaml").write_text("optim: {ema: 1}\n")
    stop(monkeypatch, tmp_path)
    assert main(["train", "--config", "x.yaml", "--preset", "cpu"]) == 2
    assert capsys.readouterr().err == "vit2dpe: optim.ema must be in [0, 1), got 1.0\n"


@need
@pytest.mark.parametrize("value", [True, "3", 2.0, None, [1], float("nan"), float("inf")])
def test_what_is_no_whole_number_is_refused_in_python(value):
    with pytest.raises(ConfigError, match=r"^epochs must be "):
        OptimConfig(epochs=value)
    with pytest.raises(ConfigError, match=r"^betas must be 2 numbers, in \[0, 1\), got "):
        OptimConfig(betas=value or (0.9,))
    assert (OptimConfig(epochs=np.int64(3)).epochs, OptimConfig(lr=np.float32(0.5)).lr) == (3, 0.5)


@need
def test_help_shows_ranges(capsys):
    with pytest.raises(SystemExit):
        main(["text", "sample", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "draw among so many of the likeliest; at least 1. (type: int | null" in text
    assert "together reach this probability; in (0, 1]." in text


@need
def test_ranges_in_words():
    assert [str(part) for part in (Range(0), Range(0, above=True), Range(1, INT32), Range(0, 1, below=True))] == [
        "at least 0", "above 0", "at least 1", "in [0, 1)"
    ]  # fmt: skip
    assert not Range(0).holds(float("inf"))
