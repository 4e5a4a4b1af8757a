"""Pictures of trained encodings: what is drawn is what the model computes there, of every encoding and model."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from tests.helpers import shaken
from vit2dpe import MAE, ConfigError, Swin, ViT, use_policy
from vit2dpe.attention.contract import probed
from vit2dpe.cli import main
from vit2dpe.encodings import ENCODINGS, named_encodings
from vit2dpe.models.simmim import SimMIM
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.plots import trained as show
from vit2dpe.positions import Positions
from vit2dpe.training.checkpoint import save_model

pytestmark = pytest.mark.need("F2")
MICRO = dict(img_size=(32, 48), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
TEXT = dict(vocab_size=9, context=12, embed_dim=48, depth=2, num_heads=3)


def titles(figure):
    return [text.get_text() for text in figure.texts]


def values(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan) if ax.images else ax.lines[1].get_ydata()


def expected(encoding, grid):
    """Every panel of one encoding, by the Signal between all places of the grid."""
    at, places = Positions.grid(grid), np.prod(grid)
    signal = probed(encoding(at))
    centre = int(np.ravel_multi_index([side // 2 for side in grid], grid))
    if signal.token is not None:
        token = signal.token[0].double()
        for query in (centre, 0):
            yield torch.cosine_similarity(token[query], token, dim=-1)
    if signal.q_rotation is not None:
        q, k = signal.q_rotation, signal.k_rotation
        turned = q.cos[0][:, [centre]] * k.cos[0] + q.sin[0][:, [centre]] * k.sin[0]  # (1|H, N, Dh/2)
        yield from turned.mean(dim=-1)[:3]
    if signal.bias:
        dense = sum(term.dense() for term in signal.bias)
        yield from dense.expand(1, -1, places, places)[0, :3, centre].masked_fill(
            dense[0, :3, centre] < -1e4, torch.nan
        )


def close(figure, encodings, grids):
    wanted = [one.detach() for e, grid in zip(encodings, grids, strict=True) for one in expected(e, grid)]
    found = [values(ax) for ax in figure.axes]
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.ravel(ours), theirs.numpy(), atol=2e-6)


@pytest.mark.parametrize("word", [word for word in ENCODINGS if word != "none"])
def test_every_encoding_as_the_model_has_it(word):
    model = shaken(ViT(word, **MICRO | dict(depth=1)))
    drawn = [e for e in named_encodings(model).values() if e.gives]
    close(show.draw(model), drawn, [(4, 6)] * len(drawn))
    policy = drawn[0].policies[-1]
    figure = show.draw(model, grid=(6, 9), policy=policy)
    assert f"trained at 4x6, drawn at 6x9, policy {policy}" in titles(figure)[0]
    with use_policy(model, policy):
        close(figure, drawn, [(6, 9)] * len(drawn))


def test_blocks_are_named_and_chosen():
    model = shaken(ViT("rope_mixed+relative(shared=true)", **MICRO | dict(depth=6)))
    blocks = [title.split(":")[0] for title in titles(show.draw(model))]
    assert blocks == ["position", *(f"blocks.{i}.attn.position" for i in (0, 2, 3, 5))]
    assert [title.split(", ")[0] for title in titles(show.draw(model, ["blocks.4"]))] == [
        "blocks.4.attn.position: rope_mixed"
    ]
    assert len(titles(show.draw(model, ["blocks"]))) == 6
    assert titles(show.draw(model, ["relative"])) == ["position: relative, grid 4x6"]
    with pytest.raises(ConfigError, match=r"unknown encoding of this model 'relativ'; did you mean 'relative'\?"):
        show.draw(model, ["relativ"])


def test_terms_of_a_sum_and_what_they_give_together():
    model = shaken(ViT("learned+alibi+relative(shared=true)", **MICRO))
    figure = show.draw(model)
    words = [title.split(": ")[1].split(", ")[0] for title in titles(figure)]
    assert words == ["learned", "alibi", "relative", "learned+alibi+relative"]
    images = [values(ax) for ax in figure.axes]
    for head in range(3):
        np.testing.assert_allclose(images[2 + head] + images[5 + head], images[8 + head], atol=1e-6)
    assert len(titles(show.draw(model, ["alibi+learned"]))) == 2


def test_a_swin_by_its_stages_and_windows():
    sizes = dict(img_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(3, 3), window_size=4, num_classes=0)
    model = shaken(Swin("sincos+relative+logcpb(shared=true)", **sizes))
    found = show.placed(model)
    assert {(one.name.split(".")[0], one.drawn) for one in found} == {("position", (16, 16)), ("layers", (4, 4))}
    with use_policy(model, "scale"):
        assert {one.drawn for one in show.placed(model, (8, 8)) if one.name != "position"} == {(2, 2)}
    figure = show.draw(model, grid=(24, 32), policy="scale")
    with use_policy(model, "scale"):
        at = [(one.encoding, one.drawn) for one in show.placed(model, (24, 32))]
        assert [grid for _, grid in at][:2] == [(24, 32), (6, 8)]
        close(figure, *zip(*at, strict=True))
    figure = show.draw(SimMIM(model, mask_unit=4), ["relative"])
    assert titles(figure)[0] == "encoder.layers.0.blocks.0.attn.position: relative, window 4x4"


def test_both_halves_of_an_autoencoder():
    encoder = ViT("rope", **MICRO)
    mae = shaken(MAE(encoder, decoder_position="learned", decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2))
    figure = show.draw(mae)
    assert titles(figure) == ["encoder.position: rope, grid 4x6", "decoder_position: learned, grid 4x6"]
    close(figure, [mae.encoder.position, mae.decoder_position], [(4, 6)] * 2)
    close(show.draw(mae, ["decoder_position"]), [mae.decoder_position], [(4, 6)])


def test_texts():
    model = shaken(TextDecoder("t5", **TEXT))
    close(show.draw(model), [model.position], [(12,)])
    close(show.draw(model, grid=(40,)), [model.position], [(40,)])
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    two = shaken(
        Seq2Seq("sincos", decoder_position="rope", cross_position="alibi", source_vocab=9, target_vocab=9, **sizes)
    )
    assert [title.split(",")[0] for title in titles(show.draw(two))] == [
        "encoder.position: sincos", "decoder.position: rope", "decoder.cross_position: alibi",
    ]  # fmt: skip


def test_what_cannot_be_drawn():
    for model, more, message in (
        (ViT("none", **MICRO), {}, "is none: attention sees a set of tokens"),
        (timm.create_model("test_vit"), {}, r"VisionTransformer has no encoding of this library; vit2dpe\.from_timm"),
        (torch.nn.Linear(1, 1), {}, "Linear has no encoding of this library"),
        (ViT("rope", **MICRO), dict(grid=(64,)), "a grid of rows and columns, such as 14x14: got 64"),
        (TextDecoder("rope", **TEXT), dict(grid=(8, 8)), "a grid of tokens, such as 64: got 8x8"),
        (ViT("learned", **MICRO), dict(policy="ntk"), "LearnedTable cannot ntk"),
        (ViT("rope", **MICRO), dict(policy="scale"), "has none"),
        (Swin("rope", img_size=32, patch_size=2, embed_dim=24, depths=(1,), num_heads=(3,)), dict(grid=(9,)), "got 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            show.draw(model, **more)


def test_a_published_model_keeps_its_weights(tmp_path, monkeypatch):
    model = shaken(
        timm.create_model("vit2dpe_tiny_patch4_32", position="relative(shared=true)", depth=1, num_classes=2)
    )
    save_for_hf(model, tmp_path / "hub")
    drawn = []
    monkeypatch.setattr(show, "save_figure", lambda figure, path: drawn.append(figure) or path)
    assert main(["show", "--model", f"local-dir:{tmp_path / 'hub'}"]) == 0
    close(drawn[0], [model.position], [(8, 8)])


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = shaken(ViT("learned+rope_mixed", **MICRO))
    for which in ("last", "best"):
        save_model(tmp_path / "run" / which, model, dict(MICRO, position="learned+rope_mixed"))
    drawn = []
    real = show.draw
    monkeypatch.setattr(show, "draw", lambda *args, **kwargs: drawn.append(real(*args, **kwargs)) or drawn[-1])
    assert main(["show", "--run", "run", "learned", "--out", "new/a.svg"]) == 0
    assert capsys.readouterr().out.strip() == "new/a.svg"
    assert b"<svg" in (tmp_path / "new/a.svg").read_bytes()
    close(drawn[-1], [model.position], [(4, 6)])
    assert main(["show", "--run", "run/best", "--size", "40x64", "--policy", "resize", "learned"]) == 2
    assert "MixedRoPE cannot resize" in capsys.readouterr().err
    assert show.grid_at(model, (40, 64)) == (5, 8)
    with pytest.raises(ConfigError, match="VisionTransformer has no encoding of this library"):
        show.grid_at(timm.create_model("test_vit"), (40, 64))
    with pytest.raises(ConfigError, match="this TextDecoder reads tokens: give a grid"):
        show.grid_at(TextDecoder("rope", **TEXT), (40, 64))
    assert main(["show", "--run", "run/best", "--size", "40x64", "rope_mixed"]) == 0
    assert "trained at 4x6, drawn at 5x8" in titles(drawn[-1])[0]
    for more, says in (
        (["--run", "nowhere"], "nowhere/model.json is missing"),
        (["--run", "run", "--model", "vit2dpe_tiny_patch4_32"], "one of the two"),
        (["--run", "run", "--image", "cat.jpg"], "--image: add --attention"),
        (["--run", "run", "--size", "32", "--grid", "4x4"], "one of them"),
        (["--run", "run", "--size", "33"], "multiple of the patch"),
        (["--model", "vit2dpe_tiny_patch4_23"], "is no model of timm; did you mean 'vit2dpe_tiny_patch4_32'"),
        (["--attention", "--image", "a.png", "--model", "nothing_like_it"], "is no model of timm; timm.list_models"),
        (["--run", "run", "alibi"], "unknown encoding of this model 'alibi'"),
        (["rope", "--policy", "ntk"], "--policy: add --run"),
    ):
        assert main(["show", *more]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
