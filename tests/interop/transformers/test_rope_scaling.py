"""Llamas whose config scales their frequencies: equal logits at every length, as options of `rope` or a policy."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from vit2dpe import ConfigError, from_transformers, load_run
from vit2dpe.interop.transformers.convert import convert
from vit2dpe.training import save_model

LLAMA = dict(hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3, vocab_size=40)
LLAMA |= dict(max_position_embeddings=80)
SHORT, LONG = [1.0 + i / 20 for i in range(8)], [1.5 + i for i in range(8)]
KINDS = {
    "linear": dict(factor=4.0),
    "yarn": dict(factor=4.0, beta_fast=3.0, beta_slow=0.5),
    "yarn whole": dict(factor=4.0, beta_fast=3.0, beta_slow=0.5, truncate=False, attention_factor=1.3),
    "yarn mscale": dict(factor=4.0, mscale=1.2, mscale_all_dim=0.7),
    "longrope": dict(factor=4.0, short_factor=SHORT, long_factor=LONG),
    "longrope given": dict(short_factor=SHORT, long_factor=LONG, attention_factor=1.1),
}


def ids(n):
    return torch.randint(1, 40, (2, n), generator=torch.Generator().manual_seed(n))


def scaled(kind, more):
    rope = dict(rope_type=kind.split()[0], rope_theta=500.0, **more)
    rope |= {} if kind == "linear" else dict(original_max_position_embeddings=20)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=rope)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_llama_is_the_same_at_every_length(kind, tmp_path):
    reference = scaled(kind, KINDS[kind])
    for parameter in reference.parameters():  # so that attention looks at places
        parameter.mul_(3)
    ours, plain = from_transformers(reference), from_transformers(reference, plain_rope=True)
    for n in (9, 20, 21, 50):
        wanted = reference(ids(n)).logits
        size = max(1.0, float(wanted.abs().max()))
        assert (ours(ids(n)) - wanted).abs().max() <= 1e-5 * size, f"{n} tokens"
        assert (plain(ids(n)) - wanted).abs().max() > 1e-3 * size, "what is scaled is seen"
    own = convert(reference.config.to_dict(), reference.state_dict())
    save_model(tmp_path, ours, own.arguments)
    assert torch.equal(load_run(tmp_path)(ids(50)), ours(ids(50)))


def test_what_is_not_covered_is_refused_by_name():
    reference = scaled("linear", KINDS["linear"])
    config, state = reference.config.to_dict(), reference.state_dict()
    rope = config.pop("rope_parameters")
    older = convert(config | dict(rope_theta=500.0, rope_scaling=dict(type="linear", factor=4.0)), state)
    assert older.arguments["position"] == "rope(base=500.0, step=0.25)", "as transformers 4 wrote it"
    for wrong, message in [
        (rope | dict(rope_type="dynamic"), "this llama scales its frequencies .dynamic.; load it with plain_rope=True"),
        (rope | dict(rope_type="longrope"), "by longrope, and its config lacks long_factor, short_factor"),
        (rope | dict(rope_type="linear", factor=None), "by linear, and its config lacks factor"),
    ]:
        with pytest.raises(ConfigError, match=message):
            convert(config | dict(rope_parameters=wrong), state)
    yarn = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=20)
    smollm = SmolLM3ForCausalLM(
        SmolLM3Config(**LLAMA | dict(num_hidden_layers=4), num_key_value_heads=3, pad_token_id=0, rope_parameters=yarn)
    )
    with pytest.raises(ConfigError, match="scales the logits of those layers alone that turn"):
        from_transformers(smollm)
