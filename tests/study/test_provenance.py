"""Where each trial of a study was trained, and that trials of several machines are not one table without a word."""

import json
import shutil

import pytest
import torch

from tests.helpers import seal
from vit2dpe.study import StudyConfig, study, trials
from vit2dpe.study.plan import check
from vit2dpe.study.settings import resolve
from vit2dpe.study.sizes import OverSizes

pytestmark = pytest.mark.need("A8")
MICRO = dict(
    encodings="none,rope", sizes="16", epochs=1, limit_train=64, limit_test=40, width=16, depth=1, heads=2,
    batch_size=32, jobs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    study(StudyConfig.of(MICRO, out=str(out)))
    return out


@pytest.fixture
def again(finished, tmp_path, monkeypatch):
    """A copy of the study, and the same study once more in it; whoever trains, fails."""
    monkeypatch.setattr(trials, "fit", None)
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out", lambda: study(StudyConfig.of(MICRO, out=str(tmp_path / "out")))


def edit(out, encoding, **ran):
    """Change the record of a trial; without anything remove it."""
    (path,) = out.glob(f"cells/{encoding}-seed0-*/last/model.json")
    meta = json.loads(path.read_text())
    if ran:
        meta["ran"] |= ran
    else:
        del meta["ran"]
    path.write_text(json.dumps(seal(meta)))


def on_cuda(monkeypatch):
    monkeypatch.setattr(trials, "pick_device", lambda name: torch.device("cuda"))


def test_a_trial_keeps_where_it_was_trained(finished):
    for path in finished.glob("cells/*/last/model.json"):
        ran = json.loads(path.read_text())["ran"]
        assert (ran["device"], ran["precision"], ran["torch"]) == ("cpu", "float32", torch.__version__)
        assert ran["seconds"] > 0
        assert ran["hardware"]


def test_one_machine_is_told_once(again, capsys):
    out, run = again
    run()
    assert "several machines" not in (out / "summary.md").read_text() + capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [dict(hardware="NVIDIA H100", device="cuda:0"), dict(precision="bfloat16"), dict(torch="2.11.0"), {}],
)
def test_a_table_over_two_machines_says_so(again, change, capsys):
    out, run = again
    edit(out, "rope", **change)
    run()
    place = ", ".join(change.values()).replace("NVIDIA H100, cuda:0", "NVIDIA H100, cuda") or "not recorded"
    for text in ((out / "summary.md").read_text(), (out / "report.html").read_text(), capsys.readouterr().out):
        assert "several machines: " in text
        assert place in text
        assert "(rope" in text


def test_float32_on_a_cpu_and_bfloat16_on_cuda_are_two_trials(again, monkeypatch):
    _, run = again
    on_cuda(monkeypatch)
    with pytest.raises(TypeError):  # it trains
        run()


def test_a_trial_of_an_older_version_is_read_on_any_device(again, monkeypatch):
    out, run = again
    for encoding in ("none", "rope"):
        edit(out, encoding)
    on_cuda(monkeypatch)
    before = (out / "results.csv").read_bytes()
    run()
    assert (out / "results.csv").read_bytes() == before
    assert "several machines" not in (out / "summary.md").read_text()


def test_precisions_by_device():
    def found(device, precision):
        plan = check(resolve(StudyConfig.of(MICRO, precision=precision)))
        measure = OverSizes(plan=plan, data=None, source=("digits", "x"), classes=10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trials, "pick_device", lambda name: torch.device(device))
            return trials.training_settings(measure, plan.trials[0])["precision"]

    assert [found("cpu", word) for word in ("auto", "float32", "bfloat16")] == ["auto", "float32", "bfloat16"]
    assert [found("cuda", word) for word in ("auto", "float32", "bfloat16")] == ["bfloat16", "float32", "bfloat16"]
