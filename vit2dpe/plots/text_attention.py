"""Pictures of attention in text: block by block and head by head, the tokens named on both axes.

Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention.observe import attention_maps
from ..data.pairs import Encoder
from ..data.tokenizers import Subwords, Tokenizer, from_json
from ..errors import CheckpointError, ConfigError
from ..models.text.model import TextModel
from ..models.text.seq2seq import Seq2Seq
from ..models.text.translate import translate
from .figures import HEADS, choose_blocks, new_figure, save_figure
from .letters import legible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 96  # tokens; more names than this cannot be read
MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def draw(maps: dict[str, Tensor], queries: Sequence[str], keys: Sequence[str], title: str) -> Figure:
    """A figure with a row for each of up to four blocks: the mean over heads, then up to three heads.

    Rows of a panel are queries, columns keys; a scale serves one panel, from 0 to the largest weight, which the title
    names.

    Args:
        maps: (1, H, queries, keys) by the name of the attention.
        queries, keys: names of the tokens; letters that no font here has, and those that cannot be seen, are written
            by their numbers.
    """
    chosen = choose_blocks(list(maps))
    columns = 1 + min(HEADS, max(one.shape[1] for one in maps.values()))
    written = legible([token.translate(MARKS) for token in (*queries, *keys)])
    names = written.texts
    beside = max(1.0, 0.4 + 0.07 * max(map(len, names)))  # inches, of the longest name
    wide, high = (max(2.4, 0.13 * len(tokens) + beside) for tokens in (keys, queries))
    figure = new_figure(columns * wide, len(chosen) * (high + 0.3) + 0.4, "constrained")
    for name, row in zip(chosen, figure.subplots(len(chosen), columns, squeeze=False), strict=True):
        one = maps[name][0].cpu()
        panels = [(f"{name}: mean", one.mean(dim=0)), *((f"head {i}", head) for i, head in enumerate(one))]
        for ax in row[len(panels) :]:
            ax.axis("off")
        for ax, (label, values) in zip(row, panels, strict=False):
            ax.imshow(values.numpy(), vmin=0.0, cmap="viridis", aspect="equal")
            ax.set_xticks(range(len(keys)), names[len(queries) :], rotation=90, fontsize=7)
            ax.set_yticks(range(len(queries)), names[: len(queries)], fontsize=7)
            ax.set_title(f"{label}, to {float(values.max()):.2g}", fontsize=9)
            ax.set_ylabel("query" if ax is row[0] else "", fontsize=8)
            ax.set_xlabel("key" if name == chosen[-1] else "", fontsize=8)
            written.style([*ax.get_xticklabels(), *ax.get_yticklabels()])
    figure.suptitle(title, fontsize=10)
    return figure


def figure_of(model: nn.Module, text: str) -> Figure:
    """Self-attention of a `TextEncoder` or `TextDecoder` to a text; of a translator, cross-attention.

    Args:
        model: as `load_run` gives it, with its tokenizer.

    Raises:
        CheckpointError: if the model is none of text.
        ConfigError: if the text has no tokens or too many to be named.
    """
    about: Mapping[str, Any] = getattr(model, "about", {})
    if "tokenizer" not in about or not isinstance(model, Seq2Seq | TextModel):
        raise CheckpointError(f"--text is for a run of `vit2dpe text train`; this one holds a {type(model).__name__}")
    tokenizer = from_json(about["tokenizer"])
    model, device = model.eval(), next(model.parameters()).device
    if isinstance(model, TextModel):
        ids = tokenizer.encode(text)
        names = _names(tokenizer, ids)
        with torch.no_grad(), attention_maps(model) as maps:
            model.forward_features(torch.tensor([ids], device=device))
        how = "a token sees those before it" if model.causal else "every token sees every token"
        return draw(maps, names, names, f"attention of each token (rows) to the others: {how}")
    if about.get("task") != "translation" or not isinstance(tokenizer, Subwords):
        raise CheckpointError(f"of encoder-decoders, translators are drawn; this run is one of {about.get('task')}")
    encode = Encoder(tokenizer)
    source, target = encode(text), encode(translate(model, tokenizer, [text])[0])
    with torch.no_grad(), attention_maps(model) as maps:
        written = torch.cat([torch.tensor([encode.start]), target[:-1]])
        model(source[None].to(device), written[None].to(device))
    across = {name: one for name, one in maps.items() if name.endswith(".cross")}
    title = "attention of each token that is written (rows) to those that are read"
    return draw(across, _names(tokenizer, target.tolist()), _names(tokenizer, source.tolist()), title)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    if not 0 < len(ids) <= LONGEST:
        raise ConfigError(f"a text of 1 to {LONGEST} tokens can be drawn with their names, this one has {len(ids)}")
    inner = getattr(tokenizer, "inner", None)
    return [tokenizer.decode([i]) or (inner.id_to_token(i) if inner is not None else str(i)) for i in ids]


def save(model: nn.Module, text: str, out: str | Path) -> Path:
    """Draw a model's attention to a text into `out`; its suffix selects the format."""
    return save_figure(figure_of(model, text), out, dpi=120)
