"""`vit2dpe show`: pictures of encodings, fresh or as a model has them, or of its attention to an image or a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..spec import Settings, Size, Words

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ShowConfig(Settings):
    """Draw encodings, as they start or as a model has learned them, or a model's attention.

    Args:
        encodings: specs such as rope, sincos+alibi, rope(base=10), or all. Of a --run or --model: which of its own, by
            word, or by module (blocks.3, decoder_position); default all, of many blocks four.
        grid: rows x columns, or the length of a line, 64; default 14x14, or what the model was trained on.
        out: the picture to write; default encodings.png or attention.png.
        attention: draw attention, with --image or --text.
        image: an image file, for --run or --model.
        text: a sentence, for a --run of text.
        run: the folder of a finished run, whose encodings are drawn as trained.
        model: a timm name; vit2dpe_* has its initial weights, hf-hub:user/name and local-dir:folder those published.
        size: of the image for the model, 48 or 48x64.
        policy: what the encodings of the model do at another grid or size: interpolate, ntk, ...
    """

    encodings: Words = field(default=(), metadata={"positional": True})
    grid: str | None = field(default=None, metadata={"list": "x"})
    out: str | None = None
    attention: bool = False
    image: str | None = None
    text: str | None = None
    run: str | None = None
    model: str | None = None
    size: Size | None = None
    policy: str = "default"


def show(config: ShowConfig, command: str = "") -> Path:
    """Draw what was asked for, print where the picture is, and return that.

    Raises:
        ConfigError: for settings that do not go together.
    """
    if config.attention:
        picture = draw_attention(config)
    else:
        picture = draw_encodings(config) if config.run is None and config.model is None else draw_trained(config)
    print(picture)
    return picture


def draw_encodings(config: ShowConfig) -> Path:
    """`vit2dpe show rope alibi`: what encodings do on a grid."""
    refuse_data(config, "image", "text", "size")
    if config.policy != "default":
        raise ConfigError("--policy: add --run or --model; a policy starts from the grid that a model was trained on")
    from ..plots.encodings import save

    return Path(save(list(config.encodings), parse_grid(config.grid or "14x14"), config.out or "encodings.png"))


def draw_trained(config: ShowConfig) -> Path:
    """`vit2dpe show --run FOLDER`: what the encodings of a model do, at its grid or another one."""
    refuse_data(config, "image", "text")
    model, grid = load_model(config.run, config.model), None if config.grid is None else parse_grid(config.grid)
    from ..plots.trained import grid_at, save

    if config.size is not None:
        if grid is not None:
            raise ConfigError("--size is that of an image in pixels, --grid counts its patches: give one of them")
        grid = grid_at(model, config.size)
    return Path(save(model, config.out or "encodings.png", config.encodings, grid, policy=config.policy))


def refuse_data(config: ShowConfig, *names: str) -> None:
    if useless := [name for name in names if getattr(config, name) is not None]:
        raise ConfigError(f"--{', --'.join(useless)}: add --attention; encodings are drawn without data")


def draw_attention(config: ShowConfig) -> Path:
    """`vit2dpe show --attention`: where a model looks, in an image or in a sentence."""
    out = config.out or "attention.png"
    if config.grid is not None or config.policy != "default":
        raise ConfigError("--grid and --policy are for pictures of encodings; attention is drawn at --size")
    if config.text is not None and not (config.image or config.encodings or config.model or config.size):
        from ..plots.text_attention import save as save_text

        return Path(save_text(load_model(config.run, None), config.text, out))
    if not config.image or config.encodings or config.text is not None:
        raise ConfigError(
            "--attention takes --image FILE with --run or --model, or --text SENTENCE with --run, and no encodings"
        )
    from ..plots.attention import save

    return Path(save(load_model(config.run, config.model), config.image, out, config.size))


def parse_grid(text: str) -> tuple[int, ...]:
    """(14, 14) of "14x14", (64,) of "64"."""
    sides = text.lower().split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"a grid is written 14x14 (rows x columns) or 64 (a line), got {text!r}")
    return tuple(int(side) for side in sides)


def load_model(run: str | None, name: str | None) -> nn.Module:
    """The model of a finished run's folder, or one by its timm name: a `vit2dpe_*` one is as initialised, any other has
    timm's pretrained weights; `hf-hub:user/name` and `local-dir:folder` are published models, ours among them."""
    if name is None and run is not None:
        from ..training.checkpoint import load_run

        return load_run(run)
    if name is None or run is not None:
        raise ConfigError("say which model: --run FOLDER of a finished run, or --model NAME of timm, one of the two")
    import difflib

    import timm

    from ..interop.timm.convert import from_timm
    from ..models.timm_api import TimmModel

    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{name!r} is no model of timm; {hint}timm.list_models('*vit*') in Python lists names")
    try:
        if ":" not in name:
            return timm.create_model(name) if name.startswith("vit2dpe_") else from_timm(name, pretrained=True)
        published = timm.create_model(name, pretrained=True)
        return published.eval() if isinstance(published, TimmModel) else from_timm(published)
    except (RuntimeError, OSError) as error:  # timm's ways to refuse; no network
        raise ConfigError(f"timm could not make {name} with its pretrained weights: {error}") from error
