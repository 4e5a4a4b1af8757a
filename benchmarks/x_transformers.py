"""x-transformers as a peer: its ViT with a learned table, its encoder of a text with a rotation, T5's or ALiBi's bias.

Both are built as its README does, with random weights, which ours takes over: norms before attention and MLP, maps of
queries, keys and values without a bias. Where it has no bias and ours has one (norms, the output of attention, and in
the text model the packed projection), ours is zero and is computed all the same.

- `x_transformers_vit(dim=384, heads=6, ff_mult=4, patch_size=16)`: pixels of a patch normalised, projected, normalised
  again; no class token; the mean of the tokens to ten classes. Square images.
- `x_transformers_text(dim=384, heads=6, ff_mult=4, rotary_pos_emb=true)`: blocks and the last norm. Sizes are 1xN, N
  tokens; vectors of tokens (B, N, D) go in, which ask for gradients in training, as an embedding in front of them would
  have it. All channels of a head are turned (theirs turns half of them unless told). In place of rotary_pos_emb, or
  beside it, rel_pos_bias=true or alibi_pos_bias=true.

Attention is the fused kernel in both (attn_flash), but for rel_pos_bias, with which x-transformers allows none.
Written against x-transformers 2.31.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vit2dpe.errors import ConfigError, unknown
from vit2dpe.models import ViT
from vit2dpe.models.text.heads import TextEncoder
from vit2dpe.positions import Positions
from vit2dpe.spec import Plain

VIT, TEXT = NAMES = ("x_transformers_vit", "x_transformers_text")
ENCODINGS = {"rotary_pos_emb": "rope", "rel_pos_bias": "t5", "alibi_pos_bias": "alibi"}  # theirs: ours
SIZES = dict(dim=384, heads=6, ff_mult=4)
OPTIONS = {VIT: SIZES | dict(patch_size=16), TEXT: SIZES | dict.fromkeys(ENCODINGS, False)}


def package() -> Any:
    """x_transformers itself, which warns of torch while it is imported.

    Raises:
        ConfigError: where it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from x_transformers import x_transformers
    except ModuleNotFoundError as error:
        raise ConfigError(f"x-transformers is not installed ({error}): pip install x-transformers") from None
    return x_transformers


def contenders(name: str, options: dict[str, Plain], size: tuple[int, int], depth: int | None) -> dict[str, nn.Module]:
    """{"peer", "ours", "limit"} of one of the two names.

    Raises:
        ConfigError: without the package, for an unknown option, and sizes that either side does not take.
    """
    for word, value in options.items():
        if word not in OPTIONS[name]:
            raise unknown(f"option of {name}", word, OPTIONS[name])
        if type(value) is not type(OPTIONS[name][word]) or (value is not False and value < 1):
            kind = "true or false" if word in ENCODINGS else "a whole number of at least 1"
            raise ConfigError(f"{word} of {name} is {kind}, got {value!r}")
    settings: dict[str, Any] = OPTIONS[name] | options
    if name == TEXT and not set(ENCODINGS) & set(options):
        settings["rotary_pos_emb"] = True
    if (
        settings["heads"] < 2 or settings["dim"] % settings["heads"]
    ):  # theirs leaves out the output map of a single head
        raise ConfigError(f"{name} needs two heads or more, and dim a multiple of them: got {settings}")
    torch.manual_seed(0)
    try:
        return (_vit if name == VIT else _text)(settings, size, 12 if depth is None else depth)
    except AssertionError as error:
        raise ConfigError(f"x-transformers does not make {name} of {settings}: {error}") from None


def _vit(settings: dict[str, Any], size: tuple[int, int], depth: int) -> dict[str, nn.Module]:
    if size[0] != size[1]:
        raise ConfigError(f"{VIT} is measured on square images, got {size[0]}x{size[1]}")
    dim, patch = settings["dim"], settings["patch_size"]
    layers = _encoder(settings, depth, attn_flash=True)
    theirs = package().ViTransformerWrapper(image_size=size[0], patch_size=patch, num_classes=10, attn_layers=layers)
    peer = _shaken(theirs)

    def ours(position: str) -> ViT:
        model = ViT(
            position, img_size=size, patch_size=patch, embed_dim=dim, depth=depth, num_heads=settings["heads"],
            mlp_ratio=settings["ff_mult"], qkv_bias=False, norm_eps=1e-5, class_token=False, global_pool="avg",
            fc_norm=False, num_classes=10,
        )  # fmt: skip
        model.patch_embed = _Patches(patch, dim)  # type: ignore[assignment]
        first, projection, last = peer.patch_to_embedding
        state = {
            "patch_embed.parts.0.weight": first.gamma,
            **_named("patch_embed.parts.1", projection),
            "patch_embed.parts.2.weight": last.gamma,
            "position.pos_embed": peer.pos_embedding.unflatten(1, model.train_grid),
            **_named("head", peer.mlp_head),
        }
        return _loaded(model, state | _blocks(layers))

    return {"peer": peer, "ours": ours("learned"), "limit": ours("none")}


def _text(settings: dict[str, Any], size: tuple[int, int], depth: int) -> dict[str, nn.Module]:
    height, length = size
    if height != 1:
        raise ConfigError(f"{TEXT} takes sizes 1xN, N tokens, as in 1x256; got {height}x{length}")
    asked = [word for word in ENCODINGS if settings[word]]
    dim, heads = settings["dim"], settings["heads"]
    more = dict.fromkeys(asked, True) | dict(attn_flash="rel_pos_bias" not in asked, rotary_emb_dim=dim // heads)
    peer = _shaken(_encoder(settings, depth, **more))
    peer.shape = (length, dim)
    state = _blocks(peer)
    if "rel_pos_bias" in asked:
        # Theirs is multiplied by √Dh in every block. One instead costs as much, and its gradient is as long as ours.
        peer.rel_pos.scale = 1.0
        state["position.relative_attention_bias"] = peer.rel_pos.relative_attention_bias.weight[None]

    def ours(position: str) -> TextEncoder:
        model = TextEncoder(
            position, pool="", vocab_size=1, context=length, embed_dim=dim, depth=depth, num_heads=heads,
            mlp_ratio=settings["ff_mult"],
        )  # fmt: skip
        model.embed = nn.Identity()  # type: ignore[assignment]
        return _loaded(model, state)

    word = "+".join(ENCODINGS[word] for word in asked)
    return {"peer": peer, "ours": ours(word or "none"), "limit": ours("none")}


def _encoder(settings: dict[str, Any], depth: int, **more: Any) -> Any:
    dim, heads = settings["dim"], settings["heads"]
    sizes = dict(dim=dim, depth=depth, heads=heads, attn_dim_head=dim // heads, ff_mult=settings["ff_mult"])
    return package().Encoder(**sizes, **more, verbose=False)


def _shaken(peer: Any) -> Any:
    """Norms that start at one would hide a difference."""
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return peer


def _blocks(layers: Any) -> dict[str, Tensor]:
    """Their layers, attention and MLP in turn, under the names of our blocks."""
    found = {"norm.weight": layers.final_norm.gamma + 1}  # theirs counts from one
    for number, (norms, part, _) in enumerate(layers.layers):
        to, kind = f"blocks.{number // 2}", number % 2
        found[f"{to}.norm{kind + 1}.weight"] = norms[0].gamma + 1
        if kind == 0:
            found[f"{to}.attn.qkv.weight"] = torch.cat([part.to_q.weight, part.to_k.weight, part.to_v.weight])
            found[f"{to}.attn.proj.weight"] = part.to_out.weight
        else:
            found |= _named(f"{to}.mlp.fc1", part.ff[0][0]) | _named(f"{to}.mlp.fc2", part.ff[-1])
    return found


def _named(to: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{to}.{name}": value for name, value in module.named_parameters()}


def _loaded(model: Any, state: dict[str, Tensor]) -> Any:
    """With the peer's weights, and zero where it has no bias; of its encoding what this model has."""
    own = model.state_dict()
    zero = {name: torch.zeros_like(value) for name, value in own.items() if name.endswith(".bias")}
    model.load_state_dict(zero | {name: value for name, value in state.items() if name in own})
    return model


class _Patches(nn.Module):
    """Images to tokens and their places, as `PatchEmbed`, with a norm of each patch's pixels in front of the map."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.patch_size, pixels = (side, side), 3 * side**2
        self.parts = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Positions]:
        side = self.patch_size[0]
        pixels = rearrange(images, "b c (h p) (w q) -> b h w (p q c)", p=side, q=side)
        return self.parts(pixels.flatten(1, 2)), Positions.grid(pixels.shape[1:3], images.device)
