"""Studies of the first version go on: finished trials are read, trained models measured, settings understood."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.data.pictures import pixels, save
from tests.helpers import seal
from vit2dpe import DataError
from vit2dpe.cli import main
from vit2dpe.cli.options import settings
from vit2dpe.study import trials
from vit2dpe.study.plan import check
from vit2dpe.study.rows import COLUMNS, Row, read_rows, to_csv
from vit2dpe.study.settings import StudyConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "study"
COMMON = ["--width", "16", "--heads", "2", "--jobs", "1", "--device", "cpu"]
COMMANDS = {
    "images": ["--encodings", "rope(base=10)", "--sizes", "16,24x32", "--modes", "scale", "--policies", "default,ntk",
               *COMMON, "--depth", "1", "--epochs", "1", "--limit-train", "64", "--limit-test", "40",
               "--batch-size", "32"],
    "reverse": ["--task", "reverse", "--depths", "1", "--lengths", "8,24", "--encodings", "sincos", "--smoke",
                *COMMON, "--batch-size", "4"],
}  # fmt: skip


@pytest.fixture(params=COMMANDS)
def old(request, tmp_path, monkeypatch):
    """A folder as the first version left it, and the command; whoever trains, fails."""
    monkeypatch.setattr(trials, "fit", None)
    shutil.copytree(GOLDEN / request.param, tmp_path / "out")
    return tmp_path / "out", ["study", *COMMANDS[request.param], "--out", str(tmp_path / "out")]


def test_finished_trials_are_read(old):
    out, command = old
    before = (out / "results.csv").read_bytes()
    (out / "results.csv").unlink()
    assert main(command) == 0
    assert (out / "results.csv").read_bytes() == before


def test_trained_models_are_measured_again(old):
    out, command = old
    rows = read_rows(out / "results.csv")
    for path in out.glob("cells/*/sweep-*.csv"):
        path.unlink()
    assert main(command) == 0
    for row, again in zip(rows, read_rows(out / "results.csv"), strict=True):
        assert (row.policy, row.size, row.n) == (again.policy, again.size, again.n)
        assert again.loss == pytest.approx(row.loss, rel=1e-5)


def test_flat_settings_are_understood(old, tmp_path):
    """Of config.yaml, as it was: every setting on one level, text where sizes and lists are meant."""
    out, command = old
    typed = check(settings("study", StudyConfig, [*command[1:], "--threads", "1"])).config
    flat = re.sub("^out: .*", f"out: {out}", (out / "config.yaml").read_text(), flags=re.MULTILINE)
    (tmp_path / "out.yaml").write_text(flat)
    assert check(settings("study", StudyConfig, ["--config", str(tmp_path / "out.yaml")])).config == typed
    assert main(command) == 0  # and as it is now
    assert check(settings("study", StudyConfig, ["--config", str(out / "config.yaml")])).config.task == typed.task


def test_settings_that_are_new_to_a_study_train_anew(old):
    with pytest.raises(TypeError):  # of `fit`, which is None
        main([*old[1], "--optim.betas", "[0.8, 0.9]"])


def test_a_square_size_is_found_however_it_was_typed(tmp_path, monkeypatch):
    """The first version kept the text: a study with --train-size 16x16 has other digests than one with 16."""
    monkeypatch.setattr(trials, "fit", None)
    shutil.copytree(GOLDEN / "images", tmp_path / "out")
    (folder,) = tmp_path.glob("out/cells/*")
    trained = json.loads((folder / "last" / "model.json").read_text())["trained"]
    assert folder.name.endswith(trials.digest_of(trained))
    typed = trials.digest_of(trained | dict(train_size="16x16"))
    folder.rename(folder.with_name(f"rope_base=10-seed0-{typed}"))
    assert main(["study", *COMMANDS["images"], "--out", str(tmp_path / "out")]) == 0


def test_tables_of_all_versions_are_read(tmp_path):
    row = Row(encoding="rope", policy="ntk", mode="scale", seed=1, train_height=16, train_width=16, height=24, width=32,
              top1=50.0, loss=1.5, n=40, value=50.0)  # fmt: skip
    path = tmp_path / "results.csv"
    path.write_text(to_csv([row]))
    assert read_rows(path) == [row]
    header, line = path.read_text().splitlines()
    assert tuple(header.split(",")) == COLUMNS[: COLUMNS.index("depth")]
    path.write_text(f"{header},newer\n{line},7\n")
    assert read_rows(path) == [row], "columns of a newer version are passed over"
    path.write_text("encoding,policy,mode,seed,height,width,top1\nrope,ntk,scale,,24,32,50\n")
    (old,) = read_rows(path)
    assert (old.temperature, old.seed, old.train_size, old.metric, old.value) == ("none", None, (24, 32), "top1", 50)
    for text, message in (("encoding,policy\nrope,ntk\n", "it has no mode, height"), (f"{header}\nrope", "cannot be")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_rows(path)


@pytest.mark.need("D10a")
@pytest.mark.parametrize(("first", "then"), [("memory", "none"), ("none", "memory")])
def test_trials_are_found_where_the_cache_was_decided_otherwise(first, then, cache, tmp_path, monkeypatch):
    """Those of older versions, whose folders are named by the digest of one kind alone, in the same kind."""
    for i in range(12):
        save(tmp_path / "data" / ("val" if i < 4 else "train") / "ab"[i % 2] / f"{i}.bmp", pixels(i, 8, 8))
    words = ["study", "--data", "folder", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *COMMON]
    words += ["--depth", "1", "--epochs", "1", "--encodings", "rope", "--sizes", "8", "--patch", "4", "--train-size",
              "8", "--modes", "scale", "--policies", "default", "--data.workers", "0"]  # fmt: skip
    assert main([*words, "--data.cache", first]) == 0
    monkeypatch.setattr(trials, "fit", None)
    before = (tmp_path / "out/results.csv").read_bytes()
    assert main([*words, "--data.cache", then]) == 0
    assert (tmp_path / "out/results.csv").read_bytes() == before
    (folder,) = tmp_path.glob("out/cells/*")
    for results in folder.glob("sweep-*.csv"):
        results.unlink()
    meta = json.loads((folder / "last/model.json").read_text())
    listing = meta.pop("digest_of_files").partition("-")[0]
    meta["trained"]["data"] = meta["trained"]["data"] if first == "memory" else listing
    (folder / "last/model.json").write_text(json.dumps(seal(meta)))
    folder.rename(folder.with_name(f"rope-seed0-{trials.digest_of(meta['trained'])}"))
    assert main([*words, "--data.cache", first]) == 0
    save(tmp_path / "data/train/a/0.bmp", pixels(0, 9, 9))
    with pytest.raises(TypeError):  # of `fit`: other data are trained anew
        main([*words, "--data.cache", then, "--source-size", "8"])
