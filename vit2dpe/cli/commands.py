"""The command `vit2dpe`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any, NamedTuple

from .. import __version__
from ..errors import ConfigError, TrainingError, unknown
from ..spec import Settings
from .help import examples, usage
from .options import settings


class Command(NamedTuple):
    """A command: its summary, and the function and the dataclass of settings behind it.

    Both are named "module:name" within the package, so that nothing is imported before the command is known. The
    function is called as `run(config, command="what was typed")`. `parallel`: several processes of torchrun share its
    work. `encodings`: it takes words of encodings, or models that have them, and so --import.
    """

    summary: str
    run: str
    config: str
    parallel: bool = False
    encodings: bool = True


COMMANDS = {
    "study": Command(
        "train a model with each positional encoding, change the resolution, see which survives",
        "study.run:study",
        "study.settings:StudyConfig",
    ),
    "train": Command(
        "train a classifier of images with any encoding: resumable, on one process or many",
        "training.objectives.images:train",
        "training.settings:TrainConfig",
        parallel=True,
    ),
    "text train": Command(
        "train a language model on plain text with any encoding",
        "training.objectives.text:train_text",
        "training.text_settings:TextTrainConfig",
        parallel=True,
    ),
    "text sample": Command(
        "sample from a trained text model, or translate",
        "training.sampling:sample",
        "training.text_settings:SampleConfig",
    ),
    "pretrain": Command(
        "pretrain an encoder without labels, by hiding patches (MAE, SimMIM), with any encoding",
        "training.objectives.masked_images:pretrain",
        "training.pretrain_settings:PretrainConfig",
        parallel=True,
    ),
    "probe": Command(
        "what the frozen features of a run are worth: linear classifier, nearest neighbours",
        "study.probe:probe",
        "study.settings:ProbeConfig",
    ),
    "evaluate": Command(
        "measure any timm model, or a trained one, at other sizes",
        "study.evaluate:evaluate_model",
        "study.settings:EvaluateConfig",
    ),
    "swap": Command(
        "exchange the encoding of a trained model, and recover it from images without labels",
        "study.exchange:swap",
        "training.swap_settings:SwapConfig",
        parallel=True,
    ),
    "predict": Command(
        "name the classes of images or lines of text, with a trained model or any of timm",
        "study.predict:predict_files",
        "study.settings:PredictConfig",
    ),
    "tune": Command(
        "choose what a classifier does at another size, from images without labels",
        "study.tuning:tune_model",
        "study.tune_settings:TuneConfig",
    ),
    "show": Command(
        "draw encodings, without data, or a model's attention to an image or a sentence",
        "cli.show:show",
        "cli.show:ShowConfig",
    ),
    "report": Command(
        "one HTML page of one study or several", "cli.report:report", "cli.report:ReportConfig", encodings=False
    ),
    "info": Command(
        "what a name of timm, a file, a hub folder or a run holds, and what it can do at another size",
        "cli.info:info",
        "cli.info:InfoConfig",
    ),
    "recipes": Command(
        "list the recipes that --recipe NAME takes, or print one",
        "cli.recipes:recipes",
        "cli.recipes:RecipesConfig",
        encodings=False,
    ),
    "bench": Command(
        "time our models against timm's, and against no encoding", "cli.bench:bench", "cli.bench:BenchConfig"
    ),
    "doctor": Command(
        "say whether this machine is fit to train on", "cli.doctor:doctor", "cli.doctor:DoctorConfig", encodings=False
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 what was asked cannot work, 1 it failed on the way, 130 and 143 stopped by a signal.

    141: whoever read the output has gone (`| head`). One line says why; VIT2DPE_DEBUG=1 shows where.
    """
    try:
        try:
            return _run(argv)
        finally:  # after --help too
            sys.stdout.flush()
    except BrokenPipeError:  # what is still to be printed goes nowhere, or the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be bytes that are no UTF-8
    family = bool(args) and any(name.startswith(f"{args[0]} ") for name in COMMANDS)  # "text train" is one command
    name, rest = " ".join(args[: 1 + family]), args[1 + family :]
    if not args or args[0] in ("-h", "--help") or (family and args[1:2] in ([], ["-h"], ["--help"])):
        print(usage({name: command.summary for name, command in COMMANDS.items()}, f"{args[0]} " if family else ""))
        return 0
    if name == "--version":
        print(f"vit2dpe {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        command, processes = COMMANDS[name], int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and not command.parallel:
            raise ConfigError(f"vit2dpe {name} is one process, torchrun started {processes}: leave it out")
        if command.encodings:
            rest = _imported(rest)
        opening = examples(name, command.summary)
        config = settings(
            name, _named(command.config), rest, _with_files, imports=command.encodings, examples=opening
        )  # --help leaves here, before anything heavy is imported
        _named(command.run)(config, command=shlex.join(["vit2dpe", *args]))
        return 0
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print("\nvit2dpe: stopped; finished trials are kept, the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, TrainingError, OSError) as error:  # a ValueError is the user's to mend
        if os.environ.get("VIT2DPE_DEBUG"):
            raise
        line = " ".join(str(error).split())
        print(f"vit2dpe: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _imported(args: list[str]) -> list[str]:
    """The arguments without every --import, whose file or module is imported."""
    rest, sources, words = list[str](), list[str](), iter(args)
    for word in words:
        if word == "--import" or word.startswith("--import="):
            source = word.partition("=")[2] or next(words, "")
            if not source or source.startswith("--"):
                raise ConfigError("--import takes a file or a module that adds encodings: --import near.py")
            sources += [source]
        else:
            rest.append(word)
    if sources and not {"-h", "--help"} & set(rest):
        from ..encodings.own import import_encodings

        for source in sources:
            import_encodings(source)
    return rest


def _with_files() -> dict[str, type[Settings]]:
    """The settings of the commands that recipes are written for."""
    return {name: _named(COMMANDS[name].config) for name in ("train", "pretrain", "text train", "study")}


def _named(place: str) -> Any:
    """The object that "module:name" means within the package."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"vit2dpe.{module}"), name)


if __name__ == "__main__":
    sys.exit(main())
