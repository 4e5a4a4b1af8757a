"""What `vit2dpe --help` shows: questions that people come with, and under each the commands that answer them."""

from __future__ import annotations

from collections.abc import Mapping

# Question -> command line, without the name of the program -> what it gives; "": the summary of the command. A command
# that stands nowhere here is one of the tools. Lines open the help of their command; tests/cli/test_help.py reads each.
QUESTIONS: dict[str, dict[str, str]] = {
    "I have photos: class folders, or a CSV of paths and labels": {
        "study --root photos": "which encoding suits them, and at which sizes",
        "train --root photos": "a classifier of them",
        "predict runs/train photos": "the classes of photos, with probabilities",
    },
    "I have a checkpoint: a name of timm, a file, a run": {
        "info vit_small_patch16_224": "what it is: encoding, grid, policies; nothing is loaded",
        "evaluate --model vit_small_patch16_224 --data photos": "what it loses at other sizes",
        "predict vit_small_patch16_224 photos": "what it makes of photos",
        "tune --init runs/train --root photos --size 96": "its best policy at a size, found without labels",
        "train --root photos --init runs/train": "finetune it, with another encoding or size too",
        "study --root photos --init runs/train": "which encoding suits photos, from its weights",
        "swap --init runs/train --to rope --root photos": "another encoding, recovered from images without labels",
        "probe --run runs/pretrain": "what its features are worth",
    },
    "Which encoding should I use?": {
        "study --quick": "three of them on built-in digits",
        "study --encodings none,rope,sincos+alibi --seeds 3": "those named, with intervals over seeds",
        "study --import near.py --encodings near,rope": "one of your own beside others",
        "report runs/study runs/another": "studies side by side, on one page",
    },
    "I want to train": {
        "train": "built-in digits, some minutes on a CPU",
        "recipes": "",
        "train --recipe digits_quick --position rope": "one of them, changed",
        "train --recipe digits_quick --resume": "go on where it was stopped",
        "pretrain --root unsorted": "without labels, by hiding patches (MAE, SimMIM)",
    },
    "I have text": {
        "text train --path text.txt --position rope": "a language model",
        'text sample --run runs/text --prompt "ROMEO:"': "what it writes",
        "predict runs/lines lines.txt": "classes of lines",
        "study --task text --root text.txt": "which encoding, at which lengths",
    },
    "I want to look": {
        "show rope relative --grid 14x20": "encodings, drawn",
        "show --run runs/train": "what a model has learned, and where it looks",
    },
    "Tools": {"doctor": "", "bench": ""},
}


def usage(commands: Mapping[str, str], start: str = "") -> str:
    """All questions with their commands, or those commands whose names begin with `start`.

    Args:
        commands: the summary of each command by its name.
    """
    listed = {line for lines in QUESTIONS.values() for line in lines}
    others = {name: "" for name in commands if not any(_is_of(line, name) for line in listed)}
    parts = []
    for question, lines in (QUESTIONS | {"Tools": QUESTIONS["Tools"] | others}).items():
        shown = {line: words or commands.get(line, "") for line, words in lines.items() if line.startswith(start)}
        if shown:
            parts.append(f"{question}\n{_listed(shown)}")
    first, last = (
        f"usage: vit2dpe {start}<command> [options]",
        "`vit2dpe <command> --help` lists the options of a command.",
    )
    return "\n\n".join([first, *parts, last])


def examples(command: str, summary: str) -> str:
    """The lines of a command, as its help opens with them."""
    found = {line: words for lines in QUESTIONS.values() for line, words in lines.items() if _is_of(line, command)}
    return _listed({line: words or summary for line, words in found.items()})


def _is_of(line: str, command: str) -> bool:
    return f"{line} ".startswith(f"{command} ")


def _listed(lines: Mapping[str, str]) -> str:
    """Two columns; what is said about a long line stands below it."""
    width = 42
    return "\n".join(
        f"  vit2dpe {line:{width}}  {words}" if len(line) <= width else f"  vit2dpe {line}\n{'':{width + 12}}{words}"
        for line, words in lines.items()
    )
