"""docs/matrix.md: which encoding runs in which model, found out by running it; written by build_tables.py.

Micro models, each with its input at the size it is built for and at another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vit2dpe import MAE, ConfigError, Seq2Seq, Swin, TextDecoder, TextEncoder, ViT, stock, use_policy
from vit2dpe.encodings import ENCODINGS, Dims, build
from vit2dpe.resolution.apply import policies_of

Built = tuple[nn.Module, Callable[[bool], Tensor]]  # the model, and its output; True: at the other size
IMAGES = torch.linspace(-1, 1, 1152).view(1, 3, 16, 24), torch.linspace(-1, 1, 2304).view(1, 3, 24, 32)
VIDEOS = torch.linspace(-1, 1, 2304).view(1, 3, 2, 16, 24), torch.linspace(-1, 1, 9216).view(1, 3, 4, 24, 32)
TOKENS = torch.arange(8)[None], torch.arange(12)[None]
VECTORS = torch.linspace(-1, 1, 384).view(1, 8, 48), torch.linspace(-1, 1, 576).view(1, 12, 48)
IMAGE: dict[str, Any] = dict(img_size=(16, 24), patch_size=4, embed_dim=48, depth=2, num_heads=2, num_classes=0)
TEXT: dict[str, Any] = dict(context=8, embed_dim=48, depth=2, num_heads=2)
STOCK: dict[str, Any] = dict(d_model=48, nhead=2, dim_feedforward=48, batch_first=True)


def _vit(word: str) -> Built:
    model = ViT(word, **IMAGE)
    return model, lambda other: model(IMAGES[other])


def _mixed(word: str) -> Built:
    model = ViT(word, **IMAGE)
    return model, lambda other: model([*IMAGES[other], IMAGES[not other][0]])


def _mae(word: str) -> Built:
    small = dict(decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=2)
    model = MAE(ViT(word, **IMAGE), decoder_position=word, **small)
    return model, lambda other: model(IMAGES[other])[0]


def _swin(word: str) -> Built:
    sizes = dict(embed_dim=48, depths=(2,), num_heads=(2,), window_size=(2, 4), num_classes=0)
    model = Swin(word, img_size=(16, 24), patch_size=2, **sizes)
    return model, lambda other: model(IMAGES[other])


def _encoder(word: str) -> Built:
    model = TextEncoder(word, vocab_size=12, **TEXT)
    return model, lambda other: model(TOKENS[other])


def _decoder(word: str) -> Built:
    model = TextDecoder(word, vocab_size=12, **TEXT)
    return model, lambda other: model(TOKENS[other])


def _seq2seq(word: str) -> Built:
    model = Seq2Seq(word, source_vocab=12, target_vocab=12, **TEXT)
    return model, lambda other: model(TOKENS[other], TOKENS[0])


def _attached(word: str) -> Built:
    model = nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **STOCK)
    stock.attach(model, word, grid=8)
    return model, lambda other: model(VECTORS[other], VECTORS[0])


def _rotary(word: str) -> Built:
    layer = stock.RotaryEncoderLayer(**STOCK, position=word, grid=8)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, lambda other: model(VECTORS[other])


def _video(word: str) -> Built:
    model = ViT(word, **IMAGE | dict(img_size=(2, 16, 24), patch_size=(1, 8, 8)))
    return model, lambda other: model(VIDEOS[other])


COLUMNS: dict[str, Callable[[str], Built]] = {
    "ViT": _vit,
    "mixed sizes": _mixed,
    "3-D": _video,
    "MAE, both halves": _mae,
    "Swin": _swin,
    "TextEncoder": _encoder,
    "TextDecoder": _decoder,
    "Seq2Seq": _seq2seq,
    "stock.attach(nn.Transformer)": _attached,
    "stock.RotaryEncoderLayer": _rotary,
}


SUMS = ("sincos+rope", "learned+relative", "alibi+rope_mixed")


def matrix() -> str:
    """docs/matrix.md: every encoding in every model, built, run, and run backward."""
    reasons: dict[str, int] = {}
    lines = [f"| encoding | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for word in (*ENCODINGS, *SUMS):
        lines.append(f"| `{word}` | {' | '.join(_cell(word, make, reasons) for make in COLUMNS.values())} |")
    why = [f"{number}. {reason}" for reason, number in reasons.items()]
    return f"""# Which encoding runs in which model

Built by `python docs/build_tables.py`: for each cell a micro model is built, run forward and backward at its own
size, then forward at another one under each of its resolution policies (images of 16x24 and 24x32 pixels, lines of 8
and 12 tokens; 3-D: a ViT of videos of 2 and of 4 frames). "yes": all of it ran, and what came out, gradients included,
is finite. Otherwise it is refused, and the reason stands below in the words of the error, "it" being the encoding. The
last rows are sums; there are many more.

{chr(10).join(lines)}

{chr(10).join(why)}

What an encoding costs in parameters and FLOPs: [Models](models.md).
"""


def _cell(word: str, make: Callable[[str], Built], reasons: dict[str, int]) -> str:
    try:
        torch.manual_seed(0)
        model, run = make(word)
        out = run(False)
        out.square().sum().backward()
        _check(model, out, *(p.grad for p in model.parameters() if p.grad is not None))
        for policy in policies_of(model):
            with use_policy(model, policy), torch.no_grad():
                _check(model, run(True))
    except ConfigError as error:
        reason = str(error)
        for part in build(word, Dims(48, 2, (4, 6))).modules():
            reason = reason.replace(type(part).__name__, "it")
        return f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"
    return "yes"


def _check(model: nn.Module, *found: Tensor) -> None:
    if not all(t.isfinite().all() for t in found):
        raise ArithmeticError(f"a {type(model).__name__} gave something that is not finite")
