"""`vit2dpe show`: pictures of encodings, or of a model's attention to an image or a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import parse, parser


def show(args: list[str]) -> int:
    options = parser("vit2dpe show", "Draw encodings, without data, or a model's attention.")
    options.add_argument(
        "encodings", nargs="*", default=[], help="words such as rope, sincos+alibi, rope(base=10), or all"
    )
    options.add_argument("--grid", default="14x14", type=str, help="rows x columns, 14x14; a line: 64x1 is 64")
    options.add_argument("--out", default=None, type=str, help="the picture to write: encodings.png, attention.png")
    options.add_argument("--attention", action="store_true", help="draw attention, with --image or --text")
    options.add_argument("--image", default=None, type=str, help="an image file, for --run or --model")
    options.add_argument("--text", default=None, type=str, help="a sentence, for a --run of text")
    options.add_argument("--run", default=None, type=str, help="the folder of a finished run")
    options.add_argument("--model", default=None, type=str, help="a timm name; vit2dpe_* has its initial weights")
    options.add_argument("--size", default=None, type=str, help="of the image for the model: 48 or 48x64")
    values = parse(options, args)
    if values["attention"]:
        print(draw_attention(values))
        return 0
    from ..plots.encodings import save

    if strange := [name for name in ("image", "text", "run", "model", "size") if values[name] is not None]:
        raise ConfigError(f"--{', --'.join(strange)}: add --attention; encodings are drawn without data")
    print(save(values["encodings"], grid_of(values["grid"]), values["out"] or "encodings.png"))
    return 0


def grid_of(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"a grid is written 14x14 (rows x columns) or 64 (a line), got {text!r}")
    return tuple(int(part) for part in parts)


def load(run: str | None, name: str | None) -> Any:
    """The model of a finished run's folder, or one by its timm name: a `vit2dpe_*` one is as initialised, any other has
    timm's pretrained weights."""
    if (run is None) == (name is None):
        raise ConfigError(
            "say whose attention: --run FOLDER of a finished run, or --model NAME of timm, one of the two"
        )
    if run is not None:
        from ..training.checkpoint import load_run

        return load_run(run)
    import timm

    from ..interop.timm.convert import from_timm

    if str(name).startswith("vit2dpe_"):
        return timm.create_model(str(name))
    return from_timm(str(name), pretrained=True)


def draw_attention(values: dict[str, Any]) -> Path:
    """`vit2dpe show --attention`: the picture of what was asked for."""
    from ..spec import parse_size

    if values["text"] is not None and not any(values[name] for name in ("image", "encodings", "model", "size")):
        from ..plots.text_attention import save as save_text

        return save_text(load(values["run"], None), values["text"], values["out"] or "attention.png")
    if not values["image"] or values["encodings"] or values["text"] is not None:
        raise ConfigError(
            "--attention takes --image FILE with --run or --model, or --text SENTENCE with --run, and no encodings"
        )
    from ..plots.attention import save

    model = load(values["run"], values["model"])
    size = None if values["size"] is None else parse_size(values["size"])
    return save(model, values["image"], values["out"] or "attention.png", size)
