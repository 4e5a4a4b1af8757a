"""BLOOM: ALiBi; the rows of its q, k and v go head by head."""

from __future__ import annotations

from ...models.text.heads import TextDecoder
from .weights import Config, Converted, Weights, demand, with_head

# Maps of a block that change their names alone: ours -> theirs.
BLOCK = {
    "attn.proj": "self_attention.dense",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "mlp.fc1": "mlp.dense_h_to_4h",
    "mlp.fc2": "mlp.dense_4h_to_h",
}


def bloom(config: Config, w: Weights) -> Converted:
    demand(config, apply_residual_connection_post_layernorm=False)
    w.without("transformer.")
    heads, width = config["n_head"], config["hidden_size"]
    embedding = w.take("word_embeddings.weight")
    state = {"embed.weight": embedding, **w.linear("embed_norm", "word_embeddings_layernorm")}
    state |= w.linear("norm", "ln_f")
    for i in range(config["n_layer"]):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        for name, value in w.linear(ours + "attn.qkv", theirs + "self_attention.query_key_value").items():
            state[name] = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)  # theirs: q, k, v of a head
        state |= w.linears(ours, theirs, BLOCK)
    head = w.head("lm_head.weight", embedding)
    w.finish()
    return Converted(
        TextDecoder,
        dict(
            position="alibi",
            vocab_size=config["vocab_size"],
            context=config.get("seq_length") or 2048,
            embed_dim=width,
            depth=config["n_layer"],
            num_heads=heads,
            norm_eps=config["layer_norm_epsilon"],
            mlp="gelu_tanh",
            embed_norm=True,
            tied=head is None,
        ),
        with_head(state, head),
    )
