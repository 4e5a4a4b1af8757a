"""Training on text: tokenizers, batches, objectives, and the two commands from end to end."""

import math
import shlex
from pathlib import Path

import pytest
import tokenizers as library
import torch
from tokenizers import models, pre_tokenizers, trainers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from vit2dpe import ConfigError, DataError, load_run
from vit2dpe.cli import main
from vit2dpe.data.text import IGNORE, TextData, download, load_text
from vit2dpe.data.text_settings import TextDataConfig
from vit2dpe.data.tokenizers import Bytes, Characters, Subwords, from_json, make_tokenizer
from vit2dpe.errors import CheckpointError
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.training.distributed import World
from vit2dpe.training.tasks.language import LanguageTask, evaluate_text, mask_tokens, random_tokens, token_loss, windows

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20 + "Ein Käfer übt Größe.\n" * 10


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe", "wordpiece"])
def test_a_tokenizer_gives_back_what_it_read_and_survives_json(kind):
    tokenizer = make_tokenizer(kind, [TEXT], 300)
    ids = tokenizer.encode(TEXT[:60])
    assert all(0 <= i < tokenizer.size for i in ids)
    again = from_json(tokenizer.describe())
    assert again.encode(TEXT[-60:]) == tokenizer.encode(TEXT[-60:])
    assert again.size == tokenizer.size
    words = {"wordpiece": "the quick brown fox jumps over the lazy dog."}.get(kind, TEXT[:44])
    assert again.decode(tokenizer.encode(TEXT[:44])) == words
    if kind in ("bytes", "bpe"):  # any text
        assert again.decode(tokenizer.encode("漢字 €\x00")) == "漢字 €\x00"
    if kind in ("bpe", "wordpiece"):
        assert tokenizer.size <= 300
        assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
        assert [tokenizer.id(t) for t in ("<pad>", "<s>", "</s>", "<mask>")] == [0, 1, 2, 3]


def test_characters_are_numbered_in_order_and_strangers_refused():
    tokenizer = Characters.of("banana")
    assert tokenizer.encode("nab") == [2, 0, 1]
    with pytest.raises(DataError, match="the character 'x' was not in the training text; known: 'abn'"):
        tokenizer.encode("x")
    assert Bytes().decode([195]) == "\ufffd"


def test_tokenizers_that_cannot_be_made(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'chars'"):
        make_tokenizer("char", [TEXT])
    with pytest.raises(DataError, match="there is no tokenizer at"):
        make_tokenizer(str(tmp_path / "x.json"), [TEXT])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        make_tokenizer(str(tmp_path / "x.json"), [TEXT])
    with pytest.raises(CheckpointError, match="kind 'spiece'"):
        from_json(dict(kind="spiece"))
    with pytest.raises(ConfigError, match="unknown token '<eos>'"):
        Subwords.train("bpe", [TEXT], 300).id("<eos>")


def data(file, **more):
    return load_text(TextDataConfig(path=str(file), context=8, **more))


def test_a_text_is_cut_once_and_whole(file):
    found = data(file)
    text = found.tokenizer.decode(torch.cat([found.train, found.val]).tolist())
    assert text == TEXT
    assert len(found.val) == len(TEXT) - round(0.9 * len(TEXT))
    assert len(data(file, limit=300).train) == 270


def test_texts_that_cannot_be_read(tmp_path, file):
    with pytest.raises(DataError, match="there is no text at"):
        data(tmp_path / "none.txt")
    with pytest.raises(DataError, match="validation tokens, a sequence needs 8 and one more"):
        data(file, limit=60)
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1") * 100)
    with pytest.raises(DataError, match="is not UTF-8"):
        data(tmp_path / "latin.txt")
    with pytest.raises(ConfigError, match=r"name the text: --data\.path"):
        load_text(TextDataConfig())


def test_a_download_is_kept_and_compared(tmp_path, file, monkeypatch):
    monkeypatch.setenv("VIT2DPE_CACHE", str(tmp_path / "cache"))
    path = download(file.as_uri())
    file.unlink()
    assert download(f"file://{file}").read_text() == TEXT == path.read_text()
    with pytest.raises(DataError, match="is another file: SHA-256"):
        download(f"file://{file}", "0" * 64)
    with pytest.raises(DataError, match=r"cannot download .*name it with --data\.path"):
        download(f"file://{tmp_path}/other.txt")


def test_batches_are_the_text_and_depend_on_the_key_alone(file):
    found = data(file)
    task = LanguageTask(found, 8, 6, steps_per_epoch=3, seed=1)
    batch = task.batch(2, 1)
    assert batch["tokens"].shape == batch["labels"].shape == (6, 8)
    for start, tokens, labels in zip(batch["index"], batch["tokens"], batch["labels"], strict=True):
        assert torch.equal(tokens, found.train[start : start + 8])
        assert torch.equal(labels, found.train[start + 1 : start + 9])
    assert torch.equal(task.batch(2, 1)["tokens"], batch["tokens"])
    assert not torch.equal(task.batch(1, 2)["tokens"], batch["tokens"])
    parts = [LanguageTask(found, 8, 6, steps_per_epoch=3, seed=1, world=World(r, 2)).batch(2, 1) for r in (0, 1)]
    assert torch.equal(torch.cat([p["tokens"] for p in parts]), batch["tokens"])
    starts = torch.cat([task.batch(e, s)["index"] for e in range(40) for s in range(3)])
    assert starts.min() < 30
    assert starts.max() > len(found.train) - 40
    assert starts.max() + 9 <= len(found.train)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_windows_ask_for_each_token_once(ranks):
    text = torch.arange(100)
    parts = [list(windows(text, 7, World(r, ranks), tokens_a_batch=21)) for r in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # as many batches on every rank
    labels = torch.cat([b["labels"].flatten() for part in parts for b in part])
    assert labels.sort().values.tolist() == list(range(1, 99))  # 14 windows of 7; the first token has no past
    assert all((b["tokens"] + 1 == b["labels"]).all() for part in parts for b in part)


def test_the_loss_is_the_mean_over_tokens(file):
    torch.manual_seed(0)
    model = TextDecoder("rope", vocab_size=50, context=7, embed_dim=16, depth=1, num_heads=2)
    text = torch.randint(50, (100,))
    loss, n = evaluate_text(model, windows(text, 7, tokens_a_batch=21))
    with torch.no_grad():
        logits = model(text[:98].view(14, 7))
        by_hand = -logits.log_softmax(-1).gather(-1, text[1:99].view(14, 7, 1)).mean()
        last = -logits.log_softmax(-1).gather(-1, text[1:99].view(14, 7, 1))[:, -2:].mean()
    assert n == 98
    assert loss == pytest.approx(float(by_hand), rel=1e-5)
    assert evaluate_text(model, windows(text, 7), last=2) == (pytest.approx(float(last), rel=1e-5), 28)
    assert model.training


def test_masking_is_berts():
    tokens = torch.randint(5, 100, (200, 500))
    tokens[:, ::10] = 2
    draws = torch.rand(200, 500, 2)
    seen, labels = mask_tokens(tokens, 3, draws, torch.full_like(tokens, 4), special=(2,))
    chosen = labels != IGNORE
    assert torch.equal(labels[chosen], tokens[chosen])
    assert not chosen[:, ::10].any()
    assert torch.equal(seen[~chosen], tokens[~chosen])
    share = chosen.float().sum() / (tokens != 2).sum()
    assert abs(float(share) - 0.15) < 0.005
    for token, rate in ((3, 0.8), (4, 0.1)):
        assert abs(float((seen[chosen] == token).float().mean()) - rate) < 0.02
    assert abs(float((seen[chosen] == tokens[chosen]).float().mean()) - 0.1) < 0.02


@pytest.mark.need("E5")
@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe", "wordpiece", "bert.json"])
def test_special_tokens_are_neither_hidden_nor_inserted(kind, tmp_path):
    """Those of a text that has them; which they are is what transformers holds to be special."""
    if kind == "bert.json":  # the names, and a place in the middle, of another library's file
        special, path = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], tmp_path / kind
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
        inner = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.train_from_iterator([TEXT], trainer)
        inner.save(str(path))
        tokenizer = make_tokenizer(str(path), [TEXT])
    else:
        tokenizer = make_tokenizer(kind, [TEXT], 300)
    assert from_json(tokenizer.describe()).special == tokenizer.special
    names = dict(zip(("pad_token", "unk_token", "mask_token"), ("[PAD]", "[UNK]", "[MASK]"), strict=True))
    names |= dict(cls_token="[CLS]", sep_token="[SEP]")
    if kind in ("bpe", "wordpiece"):
        names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>")
        names |= dict(unk_token="[UNK]") if kind == "wordpiece" else {}
    mask, special = tokenizer.size, torch.tensor(tokenizer.special, dtype=torch.long)
    text = torch.randint(tokenizer.size, (6000,), generator=torch.Generator().manual_seed(0))  # special ones among them
    if isinstance(tokenizer, Subwords):
        theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.inner, **names)
        assert tokenizer.special == tuple(sorted(theirs.all_special_ids)) != ()
        assert tokenizer.pad == theirs.pad_token_id
        wanted = theirs.get_special_tokens_mask(text.tolist(), already_has_special_tokens=True)
        assert torch.isin(text, special).int().tolist() == wanted
        collate = DataCollatorForLanguageModeling(theirs, mlm_probability=0.5)
        batch = collate([{"input_ids": text[:3000].tolist()}])
        assert (batch["labels"][0][torch.isin(text[:3000], special)] == IGNORE).all()  # the rule that ours must have
    else:
        assert (tokenizer.special, tokenizer.pad) == ((), None)
    found = TextData("drawn", text, text, tokenizer, "")
    task = LanguageTask(found, 500, 16, 1, mask=mask)
    for batch in (task.batch(0, 0), *windows(text, 500, mask=mask, tokenizer=tokenizer)):
        tokens, labels = batch["tokens"], batch["labels"]
        chosen = labels != IGNORE
        assert not torch.isin(labels[chosen], special).any()
        assert not torch.isin(tokens[chosen], special).any()
        ordinary = ~torch.isin(torch.where(chosen, labels, tokens), special)
        assert float(chosen.sum() / ordinary.sum()) == pytest.approx(0.15, abs=0.02)
        moved = tokens[chosen & (tokens != mask) & (tokens != labels)]
        assert len(moved.unique()) > 0.2 * (tokenizer.size - len(special))  # any other token
    logits = torch.randn(1, 500, mask + 1)
    batch = next(windows(text, 500, tokenizer=tokenizer))
    labels, padding = batch["labels"][:1], batch["labels"][:1] == IGNORE
    assert bool(padding.any()) == isinstance(tokenizer, Subwords)
    by_hand = -logits.log_softmax(-1)[0, torch.arange(500), labels[0].clamp(min=0)][~padding[0]].mean()
    assert float(token_loss(logits, labels)) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.need("E5")
def test_words_without_special_tokens_are_masked_as_they_were():
    draws = torch.Generator().manual_seed(5)
    drawn = random_tokens(40, (3, 7), draws)
    assert torch.equal(drawn, torch.randint(40, (3, 7), generator=draws.manual_seed(5)))
    assert random_tokens(5, (100,), draws, special=(0, 3)).unique().tolist() == [1, 2, 4]


def test_what_is_not_asked_costs_nothing():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 4]])
    by_hand = -logits.log_softmax(-1)[[0, 0, 1], [0, 2, 2], [1, 2, 4]].mean()
    assert float(token_loss(logits, labels)) == pytest.approx(float(by_hand), rel=1e-6)


def run(file, out, *more):
    small = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--data.context", "8"]
    rest = ["--optim.batch_size", "4", "--optim.epochs", "2", "--optim.warmup_epochs", "0", "--steps_per_epoch", "3"]
    path = ["--data.path", str(file), "--run.device", "cpu", "--run.out", str(out)]
    return main(["text", "train", *path, *small, *rest, *more])


@pytest.mark.parametrize("more", [[], ["--data.tokenizer", "bpe", "--data.vocab", "300", "--model.position", "t5"]])
def test_train_and_sample(file, tmp_path, capsys, more):
    out = tmp_path / "run"
    assert run(file, out, *more) == 0, capsys.readouterr().err
    assert {p.name for p in out.iterdir()} >= {"config.yaml", "env.json", "metrics.csv", "last", "best", "summary.md"}
    assert "tokens_per_s" in (out / "metrics.csv").read_text()
    capsys.readouterr()
    sample = [
        "text",
        "sample",
        "--run",
        str(out),
        "--prompt",
        "The",
        "--length",
        "12",
        "--seed",
        "3",
        "--device",
        "cpu",
    ]
    assert main(sample) == 0
    first = capsys.readouterr().out
    assert first.startswith("The")
    main(sample)
    assert capsys.readouterr().out == first
    assert main([*sample[:-4], "--length", "-1"]) == 2
    assert "length must be at least 1, got -1" in capsys.readouterr().err
    assert run(file, out, *more) == 2
    assert "--resume goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["causal", "spans", "classify", "translate"])
def test_the_command_that_is_told_next_works(file, tmp_path, monkeypatch, capsys, objective):
    """On any data: its text is one that the model has the letters of."""
    monkeypatch.chdir(tmp_path)
    Path("lines.tsv").write_text("dog\tThe lazy one.\ncat\tEin Käfer übt.\n" * 10)
    for split in ("train", "val", "test_2016_flickr"):
        Path(f"{split}.de").write_text("ein Käfer\nzwei Käfer\n")
        Path(f"{split}.en").write_text("a beetle\ntwo beetles\n")
    more = {"classify": ["--data.path", "lines.tsv"], "translate": ["--data.pairs", ".", "--data.tokenizer", "bpe"]}
    assert run(file, "run", "--objective", objective, *more.get(objective, [])) == 0
    _, found, following = capsys.readouterr().out.rpartition("next     vit2dpe ")
    assert found
    assert main(shlex.split(following)) == 0, capsys.readouterr().err


def test_a_masked_model_trains_and_does_not_write(file, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(file, out, "--objective", "masked") == 0, capsys.readouterr().err
    model = load_run(out)
    assert type(model).__name__ == "TextEncoder"
    assert model.vocab_size == len(set(TEXT)) + 1
    assert main(["text", "sample", "--run", str(out)]) == 2
    assert "holds a TextEncoder; what writes is trained by" in capsys.readouterr().err


def test_a_resumed_run_is_the_whole_one(file, tmp_path):
    """Two epochs at once, and one and one: the same bits (each epoch's batches have keys of their own)."""
    run(file, tmp_path / "whole", "--optim.schedule", "step")
    run(file, tmp_path / "parts", "--optim.schedule", "step", "--optim.epochs", "1")
    run(file, tmp_path / "parts", "--optim.schedule", "step", "--resume")
    whole, parts = load_run(tmp_path / "whole"), load_run(tmp_path / "parts")
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_settings_that_cannot_work(file, tmp_path, capsys):
    for more, message in [
        (["--objective", "maskd"], "did you mean 'masked'"),
        (["--model.position", "ropes"], "did you mean 'rope'"),
        (["--model.mlp", "silu"], "unknown mlp_layer 'silu'"),
        (["--steps_per_epoch", "0"], "must be at least 1"),
        (["--data.val_share", "1"], "data.val_share must be in (0, 1)"),
    ]:
        assert run(file, tmp_path / "run", *more) == 2
        assert message in capsys.readouterr().err


def test_a_preset_is_a_recipe_beside_the_recipe(file, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("model:\n  width: 16\n  depth: 1\n  heads: 2\ndata:\n  context: 8\n")
    (tmp_path / "r.tiny.yaml").write_text("model:\n  heads: 4\noptim:\n  epochs: 1\n  warmup_epochs: 0\n")
    common = ["--data.path", str(file), "--run.device", "cpu", "--run.out", str(tmp_path / "run"), "--smoke"]
    assert main(["text", "train", "--config", str(tmp_path / "r.yaml"), "--preset", "tiny", *common]) == 0
    arguments = load_run(tmp_path / "run").about["arguments"]
    assert (arguments["embed_dim"], arguments["num_heads"]) == (16, 4)
    assert main(["text", "train", "--config", str(tmp_path / "r.yaml"), "--preset=tine", *common]) == 2
    assert "unknown preset 'tine'; did you mean 'tiny'" in capsys.readouterr().err
    assert main(["text", "train", "--preset", "tiny", *common]) == 2
    assert "name that with --recipe or --config" in capsys.readouterr().err


@pytest.mark.parametrize("preset", [[], ["--preset", "cpu"]])
def test_the_recipe_runs(file, tmp_path, preset, capsys):
    file.write_text(TEXT * 10)
    recipe = ["--config", str(RECIPES / "shakespeare_char.yaml"), *preset, "--smoke", "--model.width", "24"]
    assert main(["text", "train", *recipe, "--data.path", str(file), "--run.out", str(tmp_path / "run")]) == 0
    assert math.isfinite(load_run(tmp_path / "run").about["final"]["val_loss"])
