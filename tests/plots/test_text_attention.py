"""Pictures of attention in text: what is drawn is what the model computes, under the names of its tokens."""

import numpy as np
import pytest
import torch
from PIL import Image

from vit2dpe import ConfigError, ViT, attention_maps, load_run
from vit2dpe.cli import main
from vit2dpe.errors import CheckpointError
from vit2dpe.plots import text_attention as show_text

TEXT = "to be or not to be\nthat is the question\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT * 20)
    for split in ("train", "val", "test_2016_flickr"):
        for language, lines in (("de", "ein Hund\nzwei Hunde\n"), ("en", "a dog\ntwo dogs\n")):
            (folder / f"{split}.{language}").write_text(lines)
    small = ["--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--data.context", "16"]
    for name in ("causal", "masked", "translate"):
        more = ["--data.pairs", str(folder)] if name == "translate" else ["--data.path", str(folder / "text.txt")]
        more += ["--data.tokenizer", "bpe", "--data.vocab", "280"] if name == "translate" else []
        command = ["text", "train", "--objective", name, *more, *small, "--smoke", "--run.out", str(folder / name)]
        assert main(command) == 0
    return folder


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_the_picture_is_the_map(runs, name):
    model = load_run(runs / name)
    figure = show_text.figure_of(model, "not be\n")
    panels = [ax for ax in figure.axes if ax.images]
    symbols = sorted(set(TEXT))
    with torch.no_grad(), attention_maps(model) as maps:
        model(torch.tensor([[symbols.index(c) for c in "not be\n"]]))
    assert len(panels) == 2 * 3  # two blocks: the mean and two heads
    for row, one in enumerate(maps.values()):
        for column, values in enumerate([one[0].mean(0), *one[0]]):
            ax = panels[3 * row + column]
            np.testing.assert_allclose(ax.images[0].get_array(), values.numpy(), atol=1e-6)
            names = [[label.get_text() for label in labels] for labels in (ax.get_xticklabels(), ax.get_yticklabels())]
            assert names == [list("not␣be⏎")] * 2
            assert ax.get_ylim() == (6.5, -0.5)  # the first query on top
    assert (np.triu(panels[0].images[0].get_array(), 1) == 0).all() == (name == "causal")


def test_a_translators_picture_is_from_what_it_reads_to_what_it_writes(runs):
    figure = show_text.figure_of(load_run(runs / "translate"), "ein Hund")
    panels = [ax for ax in figure.axes if ax.images]
    keys = [label.get_text() for label in panels[0].get_xticklabels()]
    assert "".join(keys).replace("</s>", "") == "ein␣Hund"
    assert keys[-1] == "</s>"
    image = panels[0].images[0].get_array()
    assert image.shape == (len(panels[0].get_yticklabels()), len(keys))
    np.testing.assert_allclose(image.sum(1), 1.0, atol=1e-5)
    assert "cross: mean" in panels[0].get_title()


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "new" / "a.png"
    assert main(["show", "--attention", "--text", "to be", "--run", str(runs / "causal"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["show", "--attention", "--text", "to be"]) == 2
    assert "--run FOLDER" in capsys.readouterr().err
    assert main(["show", "rope", "--attention", "--text", "to be", "--run", str(runs / "causal")]) == 2
    assert "--text SENTENCE with --run" in capsys.readouterr().err
    assert main(["show", "--attention", "--text", "to be", "--size", "8", "--run", str(runs / "causal")]) == 2
    assert "--text SENTENCE with --run" in capsys.readouterr().err
    assert main(["show", "--text", "to be", "--run", str(runs / "causal")]) == 2
    assert "--text: add --attention" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    for name, kind in (("causal", "TextDecoder"), ("translate", "Seq2Seq")):
        command = ["show", "--attention", "--image", str(tmp_path / "cat.png"), "--run", str(runs / name)]
        assert main(command) == 2
        assert f"this is a {kind}" in capsys.readouterr().err


def test_what_cannot_be_drawn(runs):
    model = load_run(runs / "causal")
    with pytest.raises(ConfigError, match="1 to 96 tokens can be drawn with their names, this one has 97"):
        show_text.figure_of(model, "a" * 97)
    with pytest.raises(CheckpointError, match="holds a ViT"):
        show_text.figure_of(ViT("rope", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2), "to be")
