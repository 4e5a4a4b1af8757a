"""`--training`: places and sizes that vary in training, the same bits after a resume, and what cannot vary by name."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import read_csv
from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_train import MICRO, at
from vit2dpe import ConfigError, Positions, load_run
from vit2dpe.encodings import encodings_of
from vit2dpe.models.predict import preparation_of
from vit2dpe.models.spec import ModelSpec
from vit2dpe.resolution.sweep import table_size_of, train_size_of
from vit2dpe.study import study
from vit2dpe.study.evaluate import evaluate_model
from vit2dpe.study.plan import check as check_study
from vit2dpe.study.rows import read_rows, to_csv
from vit2dpe.study.settings import EvaluateConfig, StudyConfig
from vit2dpe.training.engine import Trainer
from vit2dpe.training.objectives.images import check, train
from vit2dpe.training.start import describe
from vit2dpe.training.varied import augmented, varied_spec, vary

TINY = dict(patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)


def trained(position, training):
    return replace(MICRO, training=training, model=replace(MICRO.model, position=position))


@pytest.mark.parametrize(
    ("position", "training"), [("relative", "jitter"), ("rope", "multisize"), ("learned+factorized", "subtable")]
)
def test_a_training_goes_on_to_the_same_bits(position, training, tmp_path):
    config = check(trained(position, training))
    whole = train(at(config, tmp_path / "whole"))
    with after_updates({3: Trainer.save, 4: die}), pytest.raises(Killed):
        train(at(config, tmp_path / "half"))
    again = train(at(replace(config, resume=True), tmp_path / "half"))
    weights = [(run / "last/model.safetensors").read_bytes() for run in (whole, again)]
    assert weights[0] == weights[1], "draws are keyed"
    model = load_run(whole)
    assert model.train_grid == ((4, 6) if training == "subtable" else (2, 3))


def test_a_run_of_parts_has_the_size_it_was_trained_at(tmp_path):
    """Tables are of 4x6 patches, images were of 2x3."""
    run = train(at(check(trained("learned", "subtable")), tmp_path / "run"))
    size = check(trained("learned", "plain")).data.size
    model = load_run(run)
    assert table_size_of(model) == (2 * size[0], 2 * size[1])
    assert train_size_of(model) == preparation_of(model).size == describe(str(run)).size == size
    out = evaluate_model(
        EvaluateConfig(model=str(run), data="digits", limit=20, policies=("default",), out=str(tmp_path / "e"))
    )
    assert [(row.train_size, row.size) for row in out] == [(size, size)]
    assert train_size_of(load_run(train(at(check(trained("learned", "plain")), tmp_path / "plain")))) == size


def test_the_sizes_of_multisize_are_whole_patches():
    spec = ModelSpec("ViT", dict(TINY, img_size=[16, 24], position="rope"))
    found = augmented(MICRO.augment, "multisize", (16, 24), spec)
    assert found.train_sizes == ((12, 16), (16, 24), (24, 36))  # 4.5 patches are 4
    given = replace(MICRO.augment, train_sizes=((8, 8),))
    assert augmented(given, "multisize", (16, 24), spec) is given
    assert augmented(MICRO.augment, "jitter", (16, 24), spec) is MICRO.augment


def test_subtable_draws_a_part_for_all_encodings_of_a_step_and_evaluates_the_middle():
    spec = varied_spec(
        ModelSpec("ViT", dict(TINY, img_size=[12, 16], position="learned+factorized")), "subtable", (12, 16)
    )
    model = spec.build()
    vary(model, "subtable")
    first, second = encodings_of(model)
    assert model.train_grid == (6, 8)
    table, grid = first.pos_embed[0].detach(), Positions.grid((3, 4))
    parts = set()
    for _ in range(40):
        at = Positions.grid((3, 4))
        token = first.train()(at).token[0].unflatten(0, (3, 4))
        corner = (table == token[0, 0]).all(-1).nonzero()[0].tolist()
        parts.add(tuple(corner))
        i, j = corner
        assert torch.equal(token, table[i : i + 3, j : j + 4])
        rows, columns = second.tables
        assert torch.equal(second.train()(at).token[0, 0], rows[i] + columns[j]), "one part for both"
    assert len(parts) > 8
    assert max(i for i, _ in parts) == 3
    assert torch.equal(first.eval()(grid).token[0].unflatten(0, (3, 4)), table[1:4, 2:6])


@pytest.mark.parametrize(
    ("position", "training", "message"),
    [
        ("rope", "subtable", "AxialRoPE cannot subtable: it is a formula and has no table"),
        ("learned+relative", "subtable", "RelativeBias has none"),
        ("none", "jitter", "has none of ours"),
        ("rope", "jiter", "did you mean 'jitter'"),
    ],
)
def test_what_cannot_vary_is_refused_by_name_before_anything_trains(position, training, message):
    with pytest.raises(ConfigError, match=message):
        check(trained(position, training))
    with pytest.raises(ConfigError, match=message):
        check_study(StudyConfig.of(encodings=position, training=f"plain,{training}"))


def test_a_study_of_trainings_has_a_column_and_a_line_for_each(tmp_path):
    micro = dict(
        encodings="learned,relative", sizes="16,40", modes="scale", policies="resize,default", width=16, depth=1
    )
    config = StudyConfig.of(
        **micro, heads=2, smoke=True, out=str(tmp_path / "s"), training="plain,jitter", device="cpu"
    )
    study(config, "vit2dpe study --training plain,jitter")
    study(replace(config, encodings=("learned",), training=("plain", "multisize", "subtable")), "again")
    table = read_csv(tmp_path / "s" / "results.csv")
    assert list(table[0])[-1] == "training"
    rows = read_rows(tmp_path / "s" / "results.csv")
    assert {row.label for row in rows} == {"learned", "learned, multisize", "learned, subtable"}
    found = {(row.policy, row.size) for row in rows if row.training == "subtable"}
    assert found == {("subtable", (16, 16)), ("resize", (16, 16)), ("resize", (40, 40))}, "40 is above twice 16"
    (cell,) = (tmp_path / "s" / "cells").glob("learned-subtable-*")
    assert train_size_of(load_run(cell)) == (16, 16)
    cells = sorted(path.name.partition("-seed")[0] for path in (tmp_path / "s" / "cells").iterdir())
    expected = ["learned", "learned-jitter", "learned-multisize", "learned-subtable", "relative", "relative-jitter"]
    assert cells == expected
    summary = (tmp_path / "s" / "summary.md").read_text()
    assert "| scale | learned, multisize |" in summary
    (line,) = (line for line in summary.splitlines() if "| learned, subtable | subtable |" in line)
    assert line.endswith("| - |"), "40 is above its table"
    plain = [row for row in rows if row.training == "plain"]
    assert "training" not in to_csv(plain).splitlines()[0], "absent means plain"
    (tmp_path / "old.csv").write_text(to_csv(plain))
    assert [row.training for row in read_rows(tmp_path / "old.csv")] == ["plain"] * len(plain)


def test_a_study_leaves_out_what_only_some_encodings_can_be_trained_with(tmp_path, capsys):
    micro = dict(sizes="16", modes="scale", policies="default", width=16, depth=1, heads=2, smoke=True, device="cpu")
    study(StudyConfig.of(**micro, encodings="learned,rope", training="plain,subtable", out=str(tmp_path)))
    labels = [row.label for row in read_rows(tmp_path / "results.csv")]
    assert labels == ["learned", "learned, subtable", "rope"]
    said = capsys.readouterr().out
    assert "note: left out: rope, subtable: AxialRoPE cannot subtable" in said
    look = said.partition("look     vit2dpe show ")[2].split()[:2]
    assert sorted(look) == ["learned", "rope"], "encodings, each once"
