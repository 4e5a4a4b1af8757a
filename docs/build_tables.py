"""Writes the generated pages from what the code declares and does: `python docs/build_tables.py`.

docs/encodings.md, presets.md, models.md, faults.md and needs.md are made here, matrix.md in build_matrix.py. Names of
pages after the command build these alone.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vit2dpe import MAE, TextDecoder
from vit2dpe.encodings import ENCODINGS, Dims, NoPosition, split_shared_and_per_block
from vit2dpe.encodings.presets import PRESETS, REFUSED, Preset
from vit2dpe.positions import Positions
from vit2dpe.spec import Term
from vit2dpe.testing import tensors

# ViT-S/16 at 224 pixels: what the numbers of the table are for.
DIMS = Dims(width=384, heads=6, grid=(14, 14), depth=12)


def table() -> str:
    lines = [
        "| name | class | gives | relative | continuous | of each block | parameters | a forward makes | policies |",
        "|---|---|---|---|---|---|---:|---:|---|",
        *(_row(name) for name in ENCODINGS),
    ]
    return "\n".join(lines)


def _row(name: str) -> str:
    shared, blocks = split_shared_and_per_block(name, DIMS)
    own = [block for block in blocks if block is not None]
    one = own[0] if own else shared
    parameters = sum(p.numel() for module in (shared, *own) for p in module.parameters())
    at = Positions.grid(DIMS.grid)
    with torch.no_grad():
        # Queries and keys share a rotation, so it is counted once.
        made = sum(t.numel() for n, t in tensors(one(at)).items() if not n.startswith("k_"))
    times = f"{made:,}" + (f" x {len(own)}" if own else "")
    cells = [
        f"`{name}`",
        f"`{type(one).__name__}`",
        ", ".join(sorted(one.gives)) or "nothing",
        "yes" if one.relative else "no",
        "yes" if one.continuous else "no",
        "yes" if own else "no",
        f"{parameters:,}",
        "0" if isinstance(one, NoPosition) else times,
        ", ".join(one.policies),
    ]
    return "| " + " | ".join(cells) + " |"


def sources() -> str:
    """The opening of each encoding's file, as it stands there."""
    parts, seen = [], set()
    for name in ENCODINGS:
        shared, blocks = split_shared_and_per_block(name, DIMS)
        module = sys.modules[type(blocks[0] or shared).__module__]
        if module.__name__ in seen or isinstance(blocks[0] or shared, NoPosition):
            continue
        seen.add(module.__name__)
        file = module.__name__.replace(".", "/") + ".py"
        parts.append(f"## [{Path(file).stem}](../{file})\n\n{(module.__doc__ or '').strip()}\n")
    return "\n".join(parts)


def page() -> str:
    return f"""# Encodings

Built by `python docs/build_tables.py` from what each encoding declares; `check_encoding` proves the declarations.

Numbers are for ViT-S/16 at 224 pixels: width {DIMS.width}, {DIMS.heads} heads, {DIMS.depth} blocks, a grid of
{DIMS.grid[0]}x{DIMS.grid[1]}. "A forward makes" counts the numbers in the Signal; "x {DIMS.depth}" where every block
makes its own.

{table()}

- **gives**: `token` is added to tokens at the input, `rotation` turns queries and keys, `bias` is added to the logits.
- **relative**: moving all tokens together changes no logit between them.
- **continuous**: fractional coordinates are accepted.
- **policies**: what it can do at a size it was not trained at, the default first. See `vit2dpe/resolution/policies.py`.

![every encoding, drawn](gallery.png)

*`vit2dpe show all --grid 9x14`: similarity of token vectors, mean cosine of rotations, bias per head, seen from the
circled place. `vit2dpe show --run RUN` draws those of a trained model.*

Sums are written `sincos+rope`, options `rope(base=10)`, of some axes of a grid alone `rope(axes=(1, 2))`
([videos](video.md#an-encoding-for-space-another-one-for-time)), words by block `rope/rope/rope/none`
([concepts](concepts.md#signal-what-attention-does-about-it)), released conventions of rotary `rope(preset=flux)`
([who rotates how](presets.md)). A new one: [adding-an-encoding.md](adding-an-encoding.md).

{sources()}"""


def presets() -> str:
    """docs/presets.md, from the rows of presets.py."""
    lines = [
        "| preset | stands for | axes of the original | head width | its pairs | places | equal to | off |",
        "|---|---|---|---:|---|---|---|---:|",
        *(_preset(name, row) for name, row in PRESETS.items()),
    ]
    refused = "\n".join(f"| `{name}` | {reason} |" for name, reason in REFUSED.items())
    return f"""# Who rotates how

Built by `python docs/build_tables.py` from `vit2dpe/encodings/presets.py`, which
`tests/encodings/test_presets.py` compares with each original, channel by channel.

{len(PRESETS)} released conventions of rotary encodings, as `rope(preset=NAME)`. A preset is the options beside it and
nothing more, and an option that is given too wins: `rope(preset=flux, sections=(4, 14, 14))` at head width 64.

```python
from vit2dpe import Dims, build
from vit2dpe.encodings.conventions import channels_of

build("rope(preset=wan)", Dims(width=1536, heads=12, grid=(5, 8, 12)))  # frames, rows, columns
assert channels_of("cosmos", 128)[:4] == [0, 64, 1, 65]  # of our channels, those of the original
```

- **stands for**: options of axes in the order index, time, rows, columns, length. On a grid of rows and columns, those
  of the others are left out: of one image their places are 0, and their pairs stand still, behind the others.
- **axes of the original**: in the order of its pairs; ours are rows before columns, a permutation of channels.
- **its pairs**: `pairs` are (2i, 2i+1), as all of ours; `halves` (i, i + n) of n pairs that turn, `by axis` within each
  axis. The frequencies are the same in another order of channels, `q_ours = q[..., channels_of(name, head width)]`.
- **places**: where they are not 0, 1, 2, ... along each axis. `Positions.grid(extent, spacing=, origin=)` makes scaled
  and moved ones; attention within the grid depends on differences alone.
- **off**: the largest distance of the original's cosines, as released, from its own formula in float64: float32 tables
  at places below 60 (of text 2,000), bfloat16 where they are cast. Ours are those of float64.

{chr(10).join(lines)}

## What no options say

| | why |
|---|---|
{refused}
"""


def _preset(name: str, row: Preset) -> str:
    word = f"`{Term(row.word, row.options)}`"
    cells = [f"`{name}`", word, row.axes.replace(" ", ", "), str(row.head_dim or "any"), row.channels, row.places]
    return "| " + " | ".join([*cells, f"`{row.source}`", f"{row.off:.0e}"]) + " |"


def models() -> str:
    """docs/models.md: counted on the meta device, so that nothing is computed."""
    lines = ["| timm name | input | parameters | GFLOPs |", "|---|---:|---:|---:|"]
    for name in timm.list_models("vit2dpe_*", exclude_filters="vit2dpe_from_timm"):
        with torch.device("meta"):
            model = timm.create_model(name)
            size = model.pretrained_cfg["input_size"][1:]
            parameters, flops = _counted(model, torch.empty(1, 3, *size))
        lines.append(f"| `{name}` | {size[0]}x{size[1]} | {parameters / 1e6:.2f} M | {flops / 1e9:.2f} |")
    least = {what: count("none") for what, count in PRICED.items()}
    names = [f"{what}: parameters | {what}: GFLOPs" for what in PRICED]
    more = [f"| encoding | {' | '.join(names)} |", "|---|" + "---:|---:|" * len(PRICED)]
    first = " | ".join(f"{parameters / 1e6:.2f} M | {flops / 1e9:.2f}" for parameters, flops in least.values())
    more.append(f"| without | {first} |")
    for word in ENCODINGS:
        cells = []
        for what, count in PRICED.items():
            parameters, flops = count(word)
            flops -= least[what][1]
            cells.append(f"+{parameters - least[what][0]:,} | {f'+{flops / 1e9:.3f}' if flops else '+0'}")
        more.append(f"| `{word}` | {' | '.join(cells)} |")
    return f"""# Models

Built by `python docs/build_tables.py`. FLOPs of one image, a multiplication and an addition counted as two; counted
are matrix products, convolutions and attention, by `torch.utils.flop_counter`. Encodings are the default ones:
`learned` in a ViT, `relative` in a Swin.

{chr(10).join(lines)}

## What an encoding adds

To `vit2dpe_small_patch16_224` at its size and twice its side, to `vit2dpe_swin_tiny_patch4_window7_224`, to an MAE of
ViT-S with the default decoder (the encoding in both halves, three patches of four hidden), and to a `TextDecoder` of
width 384 with 12 blocks and 6 heads on 1,024 tokens (vocabulary 1,000). Most of what encodings do is no matrix product
(cosines, rotations, gathers) and is not in these counts; what they cost in time is measured by `vit2dpe bench`, with
numbers in [Results](../recipes/RESULTS.md).

{chr(10).join(more)}
"""


def _counted(model: nn.Module, given: Tensor) -> tuple[int, int]:
    """Parameters and FLOPs of a forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(given)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def _timm(name: str, side: int = 224) -> Callable[[str], tuple[int, int]]:
    def count(word: str) -> tuple[int, int]:
        with torch.device("meta"):
            return _counted(timm.create_model(name, position=word), torch.empty(1, 3, side, side))

    return count


def _price_of_mae(word: str) -> tuple[int, int]:
    with torch.device("meta"):
        encoder = timm.create_model("vit2dpe_small_patch16_224", position=word, num_classes=0)
        return _counted(MAE(encoder, decoder_position=word), torch.empty(1, 3, 224, 224))


def _price_of_text(word: str) -> tuple[int, int]:
    with torch.device("meta"):
        model = TextDecoder(word, vocab_size=1000, context=1024, embed_dim=384, depth=12, num_heads=6)
        return _counted(model, torch.empty(1, 1024, dtype=torch.long))


PRICED: dict[str, Callable[[str], tuple[int, int]]] = {
    "ViT-S at 224": _timm("vit2dpe_small_patch16_224"),
    "at 448": _timm("vit2dpe_small_patch16_224", 448),
    "Swin-T": _timm("vit2dpe_swin_tiny_patch4_window7_224"),
    "MAE": _price_of_mae,
    "TextDecoder": _price_of_text,
}


def faults() -> str:
    """docs/faults.md: the board of tests/faults."""
    board = runpy.run_path(str(Path(__file__).parent.parent / "tests" / "faults" / "rows.py"))
    rows = [f"| {name} | {fault} | {expected} |" for name, (fault, expected) in board["FAULTS"].items()]
    return f"""# Faults

Built by `python docs/build_tables.py`. Each of these is really caused by a test; `pytest tests/faults --board` prints
the board with what came about on the machine it runs on.

| | what happens | what is promised |
|---|---|---|
{chr(10).join(rows)}
"""


def needs() -> str:
    """docs/needs.md: the board of tests/needs."""
    board = runpy.run_path(str(Path(__file__).parent.parent / "tests" / "needs" / "rows.py"))
    rows = [
        f"| {name} | {need} | {where} | {'open' if name in board['OPEN'] else 'held by tests'} |"
        for name, (need, where) in board["NEEDS"].items()
    ]
    return f"""# Needs

Built by `python docs/build_tables.py`. What people need who come from timm, transformers, torchvision, MAE, Swin,
DINOv2 and torch's own Transformer, and the public report it was met in (repository and number).
`pytest tests/needs --board` prints the board with what came about on the machine it runs on; what no test can mend
stands on [Limits](limits.md).

| | need | met in | |
|---|---|---|---|
{chr(10).join(rows)}
"""


matrix = runpy.run_path(str(Path(__file__).with_name("build_matrix.py")))["matrix"]
PAGES = {
    "encodings.md": page,
    "presets.md": presets,
    "models.md": models,
    "matrix.md": matrix,
    "faults.md": faults,
    "needs.md": needs,
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        target = Path(__file__).parent / name
        target.write_text(text().rstrip() + "\n")
        print(target)
