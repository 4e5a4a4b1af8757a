"""The doctor names what is bad, and the exit status says so."""

import importlib.metadata
import shutil
from collections import namedtuple

import pytest

from vit2dpe.cli import doctor as module
from vit2dpe.cli import main
from vit2dpe.cli.doctor import DoctorConfig, bad_pairs, disk, doctor, release, versions


def test_this_machine(tmp_path, capsys):
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in ("torch ", "timm ", "CPU:", "attention with bias on", "GiB free", "gloo"):
        assert part in out


HERE = DoctorConfig()


def graded(check, config=HERE):
    return [(finding.grade, finding.text) for finding in check(config)]


@pytest.mark.parametrize(
    ("name", "version", "grade", "said"),
    [
        ("torch", "2.5.1+cu121", "bad", "older than 2."),
        ("timm", None, "bad", "timm is not installed"),
        ("timm", "1.0.31", "ok", "timm 1.0.31"),
        ("tokenizers", None, "note", 'not installed: tokenizers: pip install -e ".[text]"'),
    ],
)
def test_versions(monkeypatch, name, version, grade, said):
    real = module.version_of
    monkeypatch.setattr(module, "version_of", lambda n: version if n == name else real(n))
    assert any(g == grade and said in text for g, text in graded(versions))


def test_bad_pairs(monkeypatch):
    versions = {"pillow": "13.0.0", "torch": "2.5.1"}
    monkeypatch.setattr(module, "version_of", versions.get)
    found = graded(bad_pairs)
    assert [grade for grade, _ in found] == ["note", "bad"]
    assert "posterize" in found[0][1]
    versions["pillow"], versions["torch"] = "12.3.0", "2.15.0"
    assert graded(bad_pairs) == []


def test_a_full_disk_and_the_exit_status(monkeypatch, tmp_path, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 2**20))
    assert graded(disk, DoctorConfig(str(tmp_path / "not/yet")))[0][0] == "bad"
    assert main(["doctor", "--out", str(tmp_path)]) == 1
    assert "0.0 GiB free" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in graded(disk, DoctorConfig(str(tmp_path / "file/run")))[0][1]


def test_a_package_that_does_not_load(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    assert any(grade == "bad" and "torchvision does not import" in text for grade, text in graded(module.imports))


def test_versions_are_compared_as_numbers():
    assert release("2.15.0+cu132") == (2, 15, 0) > release("2.9.1")
    assert release("3.0.0rc1") == (3, 0, 0)
    assert release("2.11.0a0+5228986c39.nv25.05") >= release("2.11"), "a vendor's build is no older one"


def test_requirements_are_those_of_the_package():
    """What pyproject.toml names is what is checked; nothing is listed twice."""
    texts = [text for _, text in graded(versions)]
    for name in ("torch", "torchvision", "timm", "einops", "pillow", "safetensors"):
        assert sum(text.startswith(f"{name} ") for text in texts) == 1, name
    assert sum(text.startswith("[") for text in texts) == 4


def test_a_package_that_is_not_installed_itself(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert graded(versions)[-1][0] == "note"
    assert callable(doctor)
