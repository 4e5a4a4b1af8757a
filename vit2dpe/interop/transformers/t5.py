"""T5 and FLAN-T5: buckets of offsets in each half, no scale of q·k, norms without a mean."""

from __future__ import annotations

from ...errors import unknown
from ...models.text.seq2seq import Seq2Seq
from .weights import Config, Converted, Weights, demand, with_head


def t5(config: Config, w: Weights) -> Converted:
    width, heads = config["d_model"], config["num_heads"]
    demand(config, d_kv=width / heads)
    mlps = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}
    if config["feed_forward_proj"] not in mlps:
        raise unknown("feed_forward_proj", config["feed_forward_proj"], mlps)
    embedding = w.take("shared.weight")
    w.drop("embed_tokens.weight")
    state = {"encoder.embed.weight": embedding, "decoder.embed.weight": embedding}
    depths = dict(encoder=config["num_layers"], decoder=config.get("num_decoder_layers") or config["num_layers"])
    for half, depth in depths.items():
        table = w.take(f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        state[f"{half}.position.relative_attention_bias"] = table[None]
        state |= w.linear(f"{half}.norm", f"{half}.final_layer_norm", bias=False)
        for i in range(depth):
            ours, theirs = f"{half}.blocks.{i}.", f"{half}.block.{i}.layer."
            last = 2 if half == "decoder" else 1
            self_, dense = f"{theirs}0.SelfAttention.", f"{last}.DenseReluDense."
            names = {"attn.proj": "0.SelfAttention.o", "norm1": "0.layer_norm", "norm2": f"{last}.layer_norm"}
            names |= {"mlp.fc2": dense + "wo"}
            if config["feed_forward_proj"] == "relu":
                names |= {"mlp.fc1": dense + "wi"}
            else:
                names |= {"mlp.fc1_g": dense + "wi_0", "mlp.fc1_x": dense + "wi_1"}
            state |= w.joined(ours + "attn.qkv", [self_ + n for n in "qkv"], bias=False)
            if half == "decoder":
                cross = "1.EncDecAttention."
                names |= {"cross.q": cross + "q", "cross.proj": cross + "o", "norm_cross": "1.layer_norm"}
                state |= w.joined(ours + "cross.kv", [theirs + cross + n for n in "kv"], bias=False)
            state |= w.linears(ours, theirs, names, bias=False)
    head = w.head("lm_head.weight", embedding)
    w.finish()
    buckets, reach = config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
    spec = f"t5(buckets={buckets}, max_distance={reach}, bidirectional="
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return Converted(
        Seq2Seq,
        dict(
            position=f"{spec}true)",
            decoder_position=f"{spec}false)",
            source_vocab=config["vocab_size"],
            target_vocab=config["vocab_size"],
            shared=True,
            context=512,
            embed_dim=width,
            depth=depths["encoder"],
            decoder_depth=depths["decoder"],
            num_heads=heads,
            hidden=config["d_ff"],
            norm="rms",
            norm_eps=config["layer_norm_epsilon"],
            mlp=mlps[config["feed_forward_proj"]],
            bias=False,
            scale=1.0,
            tied=head is None,
            logit_scale=width**-0.5 if scaled else 1.0,
        ),
        with_head(state, head, "decoder."),
    )
