"""BERT: learned places, norms behind, q, k and v in three maps."""

from __future__ import annotations

from ...models.text.heads import TextEncoder
from .weights import Config, Converted, Weights, demand

# Maps of a block that change their names alone: ours -> theirs.
BLOCK = {
    "attn.proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


def bert(config: Config, w: Weights) -> Converted:
    demand(config, hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)
    w.without("bert.").drop("pooler.", "position_ids", "cls.seq_relationship.", "cls.predictions.decoder.")
    masked = "cls.predictions.bias" in w.left
    embed = "embeddings."
    state = {
        "embed.weight": w.take(embed + "word_embeddings.weight"),
        "type_embed.weight": w.take(embed + "token_type_embeddings.weight"),
        "position.pos_embed": w.take(embed + "position_embeddings.weight")[None],
        **w.linear("embed_norm", embed + "LayerNorm"),
    }
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"blocks.{i}.", f"encoder.layer.{i}."
        state |= w.joined(ours + "attn.qkv", [f"{theirs}attention.self.{n}" for n in ("query", "key", "value")])
        state |= w.linears(ours, theirs, BLOCK)
    if masked:
        state["masked_head.bias"] = w.take("cls.predictions.bias")
        state |= w.linear("masked_head.dense", "cls.predictions.transform.dense")
        state |= w.linear("masked_head.norm", "cls.predictions.transform.LayerNorm")
    w.finish()
    return Converted(
        TextEncoder,
        dict(
            position="learned",
            pool="",
            masked_lm=masked,
            vocab_size=config["vocab_size"],
            context=config["max_position_embeddings"],
            embed_dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
            norm_eps=config["layer_norm_eps"],
            token_types=config["type_vocab_size"],
            post_norm=True,
            embed_norm=True,
        ),
        state,
    )
