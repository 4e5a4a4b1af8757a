"""GPT-2: learned places, norms before; its matrices are transposed."""

from __future__ import annotations

from ...models.text.heads import TextDecoder
from .weights import Config, Converted, Weights, demand, with_head


def gpt2(config: Config, w: Weights) -> Converted:
    demand(
        config,
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    w.without("transformer.").drop(".attn.bias", ".attn.masked_bias")
    embedding = w.take("wte.weight")
    state = {"embed.weight": embedding, "position.pos_embed": w.take("wpe.weight")[None], **w.linear("norm", "ln_f")}
    for i in range(config["n_layer"]):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        state |= w.linears(ours, theirs, {"norm1": "ln_1", "norm2": "ln_2"})
        for to, source in (("attn.qkv", "attn.c_attn"), ("attn.proj", "attn.c_proj"), ("mlp.fc1", "mlp.c_fc"),
                            ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
            state[f"{ours}{to}.weight"] = w.take(f"{theirs}{source}.weight").t().contiguous()
            state[f"{ours}{to}.bias"] = w.take(f"{theirs}{source}.bias")
    head = w.head("lm_head.weight", embedding)
    w.finish()
    return Converted(
        TextDecoder,
        dict(
            position="learned",
            vocab_size=config["vocab_size"],
            context=config["n_positions"],
            embed_dim=config["n_embd"],
            depth=config["n_layer"],
            num_heads=config["n_head"],
            hidden=config.get("n_inner") or 4 * config["n_embd"],
            norm_eps=config["layer_norm_epsilon"],
            mlp="gelu_tanh",
            tied=head is None,
        ),
        with_head(state, head),
    )
