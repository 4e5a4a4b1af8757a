"""Translation: pairs as they are read, batches, the schedule, and the command from data to BLEU."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import read_csv
from vit2dpe import ConfigError, DataError, load_run
from vit2dpe.cli import main
from vit2dpe.data.pairs import Encoder, load_pairs
from vit2dpe.data.text import IGNORE
from vit2dpe.data.text_settings import TextDataConfig
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.models.text.translate import translate
from vit2dpe.training.checkpoint import save_model
from vit2dpe.training.distributed import ALONE, World
from vit2dpe.training.objectives.text import translate_test_set
from vit2dpe.training.optimizer import make_optimizer, make_schedule
from vit2dpe.training.session import TrainSession
from vit2dpe.training.settings import OptimConfig
from vit2dpe.training.tasks.seq2seq import decoding_batch, decoding_loss, evaluate_pairs
from vit2dpe.training.tasks.translation import TranslationTask, bleu
from vit2dpe.training.text_settings import TextTrainConfig

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "Hund": "dog", "Haus": "house"}


def sentences(n, seed):
    draws = torch.Generator().manual_seed(seed)
    german = list(WORDS)
    for _ in range(n):
        n_words = int(torch.randint(1, 6, (1,), generator=draws))
        some = [german[i] for i in torch.randint(len(german), (n_words,), generator=draws).tolist()]
        yield " ".join(some), " ".join(WORDS[word] for word in some)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pairs"
    root.mkdir()
    for i, (split, n) in enumerate((("train", 40), ("val", 9), ("test_2016_flickr", 5))):
        sides = zip(*sentences(n, i), strict=True)
        for language, lines in zip(("de", "en"), sides, strict=True):
            text = "".join(f"{line}\n" for line in lines)
            if split == "val":  # plain files are read as well
                (root / f"{split}.{language}").write_text(text)
            else:
                (root / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return root


def data(folder, **more):
    return load_pairs(TextDataConfig(pairs=str(folder), tokenizer="bpe", **dict(vocab=300, context=40) | more))


def test_pairs_are_the_lines_of_both_files(folder):
    found = data(folder)
    german = gzip.decompress((folder / "train.de.gz").read_bytes()).decode().splitlines()
    english = gzip.decompress((folder / "train.en.gz").read_bytes()).decode().splitlines()
    stop = found.tokenizer.id("</s>")
    assert len(found.train) == 40
    for (source, target), a, b in zip(found.train, german, english, strict=True):
        assert source[-1] == target[-1] == stop
        assert (found.tokenizer.decode(source[:-1].tolist()), found.tokenizer.decode(target[:-1].tolist())) == (a, b)
    assert (len(found.val), len(found.test)) == (9, 5)
    assert len(data(folder, limit=3).train) == 3
    short = data(folder, context=3)
    assert len(short.train) + short.left_out == 40
    assert max(len(side) for pair in short.train for side in pair) <= 3


def test_pairs_that_cannot_be_read(folder):
    with pytest.raises(ConfigError, match=r"--data\.pairs FOLDER"):
        load_pairs(TextDataConfig(tokenizer="bpe"))
    with pytest.raises(ConfigError, match="tokenizer bpe or wordpiece, got chars"):
        load_pairs(TextDataConfig(pairs=str(folder)))
    with pytest.raises(DataError, match=r"test\.de nor test\.de\.gz"):
        data(folder, test="test")
    with pytest.raises(DataError, match="none of 40 training pairs fits"):
        data(folder, context=1)
    (folder / "val.en").write_text("one\n")
    with pytest.raises(DataError, match="val has 9 lines of de and 1 of en"):
        data(folder)


def test_a_batch_is_what_a_decoder_reads_and_is_asked_for():
    pairs = [(torch.tensor([5, 6, 2]), torch.tensor([7, 2])), (torch.tensor([8, 2]), torch.tensor([9, 4, 3, 2]))]
    batch = decoding_batch(pairs, start=1, padding=0)
    assert batch["source"].tolist() == [[5, 6, 2], [8, 2, 0]]
    assert batch["source_valid"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["tokens"].tolist() == [[1, 7, 0, 0], [1, 9, 4, 3]]
    assert batch["labels"].tolist() == [[7, 2, IGNORE, IGNORE], [9, 4, 3, 2]]


def small(found, **more):
    size = found.tokenizer.size
    sizes = dict(context=40, embed_dim=32, depth=1, num_heads=2, hidden=64, shared=True)
    torch.manual_seed(0)
    return Seq2Seq("rope", source_vocab=size, target_vocab=size, **(sizes | more))


def test_the_loss_of_a_batch_is_that_of_its_pairs(folder):
    """Padding counts nowhere; over many batches and ranks every token counts once."""
    found = data(folder)
    model, encode = small(found).eval(), Encoder(found.tokenizer)
    with torch.no_grad():
        alone = [decoding_batch([pair], encode.start, encode.pad) for pair in found.val]
        total = sum(float(decoding_loss(model, one, "sum")) for one in alone)
    n = sum(len(target) for _, target in found.val)
    for size in (1, 4, 9):
        score = evaluate_pairs(model, found.val, encode.start, encode.pad, size, ALONE, "cpu")
        assert score["val_loss"] == pytest.approx(total / n, rel=1e-5)
    task = TranslationTask(found, 8, smoothing=0.1)
    assert (task.steps_per_epoch, task.count(task.batch(0, 0))) == (5, int((task.batch(0, 0)["labels"] >= 0).sum()))
    seen = torch.cat([task.batch(1, step)["index"] for step in range(5)])
    assert sorted(seen.tolist()) == list(range(40))
    parts = [TranslationTask(found, 8, world=World(rank, 2)).batch(1, 2)["index"] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), task.batch(1, 2)["index"])
    batch = task.batch(0, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform, where smoothing changes nothing
        smooth = float(task.loss(model, batch)[0])
        plain = float(TranslationTask(found, 8).loss(model, batch)[0])
        logits = model(batch["source"], batch["tokens"], batch["source_valid"])[batch["labels"] >= 0]
    by_hand = 0.9 * plain + 0.1 * float(-logits.log_softmax(-1).mean())
    assert smooth == pytest.approx(by_hand, rel=1e-5)
    assert smooth != pytest.approx(plain, rel=1e-3)


def test_translations_keep_the_order_of_their_sentences(folder):
    found = data(folder)
    model = small(found).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    texts = ["zwei Hund", "eins", "drei vier Haus zwei", "eins"]
    together = translate(model, found.tokenizer, texts, beams=2, batch=2)
    alone = [translate(model, found.tokenizer, [text], beams=2)[0] for text in texts]
    assert together == alone
    assert len(set(alone)) > 1


def test_bleu_is_sacrebleus():
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]).bleu == pytest.approx(100)
    score = bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    precision = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25  # of 1- to 4-grams; as long as the reference
    assert score.bleu == pytest.approx(100 * precision)
    assert "tok:13a" in score.signature
    assert "case:mixed" in score.signature


def test_noam_rises_to_the_peak_and_falls_with_the_root():
    model = nn.Linear(2, 2)
    optim = OptimConfig(lr=0.02, schedule="noam", warmup_epochs=2, epochs=100)
    optimizer = make_optimizer(model, optim)
    schedule = make_schedule(optimizer, optim, steps=10)  # 20 updates of warm-up
    found = []
    for step in range(90):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    width = 1 / (0.02**2 * 20)  # with peak = 1/sqrt(D w), the paper's formula
    paper = [width**-0.5 * min(s**-0.5, s * 20**-1.5) for s in range(1, 91)]
    assert found == pytest.approx(paper)
    assert max(found) == pytest.approx(0.02) == pytest.approx(found[19])
    with pytest.raises(ConfigError, match="did you mean 'noam'"):
        make_schedule(optimizer, OptimConfig(schedule="noan"), steps=10)


def test_from_pairs_to_bleu(folder, tmp_path, capsys):
    """The recipe's own command: the loss falls, BLEU is printed and kept, a sentence is translated."""
    out = tmp_path / "run"
    recipe = ["--config", str(RECIPES / "multi30k_de_en.yaml"), "--preset", "cpu", "--data.pairs", str(folder)]
    small = [
        "--data.vocab",
        "300",
        "--data.limit",
        "40",
        "--model.width",
        "32",
        "--model.depth",
        "1",
        "--device",
        "cpu",
    ]
    rest = ["--epochs", "5", "--batch-size", "8", "--model.heads", "2", "--run.out", str(out)]
    assert main(["text", "train", *recipe, *small, *rest]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    facts = json.loads((out / "bleu.json").read_text())
    assert f"BLEU {facts['bleu']:.2f} on 5 sentences of test_2016_flickr" in said
    assert len((out / "translations.txt").read_text().splitlines()) == 5
    losses = [float(row["val_loss"]) for row in read_csv(out / "metrics.csv")]
    assert losses[-1] < losses[0] - 0.5
    assert main(["text", "sample", "--run", str(out), "--prompt", "zwei Hund", "--device", "cpu"]) == 0
    model = load_run(out, which="best")
    tokenizer = data(folder).tokenizer
    assert capsys.readouterr().out == translate(model, tokenizer, ["zwei Hund"])[0] + "\n"
    assert main(["text", "sample", "--run", str(out), "--prompt", " ", "--device", "cpu"]) == 2
    assert "a sentence to translate is needed" in capsys.readouterr().err


def test_settings_that_cannot_work(folder, tmp_path, capsys):
    for more, message in [
        (["--smoothing", "1"], "smoothing must be in [0, 1)"),
        (["--beams", "0"], "beams must be at least 1, got 0"),
        (["--objective", "causal", "--smoothing", "0.1"], "smoothing is for objective translate or classify"),
        (["--objective", "translat"], "did you mean 'translate'"),
    ]:
        common = ["--objective", "translate", "--data.pairs", str(folder), "--run.out", str(tmp_path / "run")]
        assert main(["text", "train", *common, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.need("D7a")
def test_ranks_share_the_test_set(folder, tmp_path, monkeypatch):
    """Each translates its part, the first writes what one process writes; where the others do not see the run folder,
    it translates all."""
    found, out = data(folder), tmp_path / "run"
    model = small(found).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    arguments = dict(position="rope", source_vocab=found.tokenizer.size, target_vocab=found.tokenizer.size, context=40)
    save_model(out / "best", model, arguments | dict(embed_dim=32, depth=1, num_heads=2, hidden=64, shared=True))
    lines, said = [], []

    def translated(world, sees=True):
        place = out if sees else tmp_path / "elsewhere"
        session = TrainSession(TextTrainConfig(beams=2), "", torch.device("cpu"), world, place)
        return translate_test_set(session.config, session, found)

    whole = translated(ALONE), [(out / name).read_bytes() for name in ("translations.txt", "bleu.json")]
    assert whole[1][0].strip()
    for path in ("translations.txt", "bleu.json"):
        (out / path).unlink()

    def gather(world, words):
        said.append(words)
        return [*words, *lines.pop(0)] if world.first else words

    monkeypatch.setattr(World, "gather", gather)
    assert translated(World(1, 2)) == []
    lines[:] = said
    assert (len(lines[1]), len(found.test)) == (3, 5)
    assert (translated(World(0, 2)), [(out / n).read_bytes() for n in ("translations.txt", "bleu.json")]) == whole
    said.clear()
    assert translated(World(1, 2), sees=False) == []
    lines[:] = said
    monkeypatch.setattr(
        World, "gather", lambda world, words: [*words, *(lines.pop(0) if lines and world.size > 1 else ())]
    )
    assert translated(World(0, 2)) == whole[0]
