"""Llama: rotary, in pairs (i, i + Dh/2) where ours are (2i, 2i+1), so the rows of q and k change places.

SmolLM3 is a Llama whose every fourth layer does not turn (`no_rope_layers` has 0 there): words by block.
"""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ...models.text.heads import TextDecoder
from .rope_scaling import rope_of
from .weights import Config, Converted, Weights, demand, interleaved, with_head

# Maps of a block that change their names alone: ours -> theirs.
MAPS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc1_g": "mlp.gate_proj",
    "mlp.fc1_x": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


def llama(config: Config, w: Weights) -> Converted:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    kv_heads, bias = config.get("num_key_value_heads") or heads, bool(config.get("attention_bias"))
    demand(config, hidden_act="silu", mlp_bias=bias, head_dim=width // heads, use_sliding_window=False)
    rope, turns = rope_of(config, width // heads), config.get("no_rope_layers") or [1]
    if rope.logits != 1 and not all(turns):
        raise ConfigError(f"this {config['model_type']} scales the logits of those layers alone that turn: not covered")
    w.without("model.").drop("rotary_emb.inv_freq")
    embedding = w.take("embed_tokens.weight")
    state = {"embed.weight": embedding, **w.linear("norm", "norm", bias=False)}
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"blocks.{i}.", f"layers.{i}."
        for part in ("weight", "bias") if bias else ("weight",):
            q, k, v = (w.take(f"{theirs}self_attn.{n}_proj.{part}") for n in "qkv")
            state[f"{ours}attn.qkv.{part}"] = torch.cat([interleaved(q, heads), interleaved(k, kv_heads), v])
        state |= w.linears(ours, theirs, MAPS, bias)
        state |= w.linears(ours, theirs, NORMS, bias=False)
    head = w.head("lm_head.weight", embedding)
    w.finish()
    return Converted(
        TextDecoder,
        dict(
            position=_words(rope.word, turns),
            vocab_size=config["vocab_size"],
            context=rope.context or config["max_position_embeddings"],
            embed_dim=width,
            depth=config["num_hidden_layers"],
            num_heads=heads,
            kv_heads=kv_heads,
            hidden=config["intermediate_size"],
            norm="rms",
            norm_eps=config["rms_norm_eps"],
            mlp="swiglu",
            bias=bias,
            tied=head is None,
            **({} if rope.logits == 1 else dict(scale=rope.logits * (width // heads) ** -0.5)),
        ),
        with_head(state, head),
        rope.policy,
    )


def _words(word: str, turns: list[int]) -> str:
    """`rope/rope/rope/none` of [1, 1, 1, 0, 1, 1, 1, 0]: the shortest cycle of words that blocks follow."""
    words = [word if turn else "none" for turn in turns]
    period = next(n for n in range(1, len(words) + 1) if words == (words[:n] * len(words))[: len(words)])
    return "/".join(words[:period])
