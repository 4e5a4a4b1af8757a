"""Settings: text becomes its type once, prints as it was written, and has one name in full and several short ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from vit2dpe import ConfigError
from vit2dpe.cli.options import settings
from vit2dpe.data.settings import AugmentConfig, DataConfig
from vit2dpe.spec import Numbers, Settings, Size, Sizes, Term, Words, changed, filled, flat, full_name, plain
from vit2dpe.training.settings import OptimConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class Every(Settings):
    """One of each kind.

    Args:
        size: of images.
        sizes: several.
        words: specs.
        numbers: of blocks.
        term: a policy.
        optim: optimizer and schedule.
        run: the run.
    """

    SHORT: ClassVar = {"wide": "optim.batch_size"}

    size: Size | None = None
    sizes: Sizes = ((8, 8),)
    words: Words = ()
    numbers: Numbers = (1,)
    term: Term = Term("none", {})  # noqa: RUF009
    optim: OptimConfig = OptimConfig()  # noqa: RUF009
    run: RunConfig = RunConfig()  # noqa: RUF009

    @classmethod
    def preset(cls, given):
        return {"optim.epochs": 7} if given.get("size") else {}


@pytest.mark.parametrize(
    ("name", "value", "typed", "text"),
    [
        ("size", "32x48", (32, 48), "32x48"),
        ("size", 32, (32, 32), "32"),
        ("size", [32, 48], (32, 48), "32x48"),
        ("sizes", "24, 32x48", ((24, 24), (32, 48)), "24,32x48"),
        ("sizes", [24, "32x48"], ((24, 24), (32, 48)), "24,32x48"),
        ("sizes", 24, ((24, 24),), "24"),
        ("words", "none,rope(a=1, b=2)", ("none", "rope(a=1, b=2)"), "none,rope(a=1, b=2)"),
        ("words", ["none", "rope"], ("none", "rope"), "none,rope"),
        ("numbers", "2,6,4", (2, 6, 4), "2,6,4"),
        ("numbers", 3, (3,), "3"),
        ("term", "rand(ops=2,magnitude=9)", Term("rand", {"ops": 2, "magnitude": 9}), "rand(ops=2, magnitude=9)"),
    ],
)
def test_text_numbers_and_lists_become_types_once(name, value, typed, text, tmp_path):
    config = Every(**{name: value})
    assert getattr(config, name) == typed
    assert plain(config)[name] == text
    assert getattr(replace(config, numbers=(5,)), name) == ((5,) if name == "numbers" else typed)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({name: value}))
    assert getattr(settings("x", Every, ["--config", str(tmp_path / "x.yaml")]), name) == typed
    (tmp_path / "y.yaml").write_text(yaml.safe_dump(plain(config)))
    assert settings("x", Every, ["--config", str(tmp_path / "y.yaml")]) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", "8xx"), ("sizes", "24,x"), ("numbers", "2,0"), ("numbers", "two"), ("term", "a+b"), ("term", "a(")],
)
def test_what_cannot_be_read_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        Every(**{name: value})


def test_short_names_presets_and_changes():
    config = Every.of(epochs=3, wide=5, size="16")
    assert (config.optim.epochs, config.optim.batch_size, config.size) == (3, 5, (16, 16))
    assert Every.of(size="16").optim.epochs == 7
    assert Every.of().optim == OptimConfig()
    with pytest.raises(ConfigError, match=r"name may be .*data.name.*: write one of them in full"):
        full_name(TrainConfig, "name")
    with pytest.raises(ConfigError, match=r"did you mean .optim\.epochs."):
        Every.of(optim_epochs=3)
    later = changed(config, {"optim.lr": 0.5, "run.out": "there"})
    assert (later.optim.lr, later.run.out, later.optim.epochs) == (0.5, "there", 3)
    assert filled(TrainConfig(), {"data.size": "16", "optim.lr": 9}).data.size == (16, 16)
    assert filled(TrainConfig(), {"data.size": "16", "optim.lr": 9}).optim.lr == OptimConfig().lr


def test_a_config_prints_as_it_was_written():
    config = TrainConfig(
        data=DataConfig(size="32x48"), augment=AugmentConfig(policy="rand(ops=2, magnitude=9)", train_sizes="32,32x48")
    )
    assert flat(config)["data.size"] == "32x48"
    assert flat(config)["augment.policy"] == "rand(ops=2, magnitude=9)"
    assert plain(config)["augment"]["train_sizes"] == "32,32x48"
    assert plain(replace(config, optim=OptimConfig(betas=(0.9, 0.95))))["optim"]["betas"] == [0.9, 0.95]
    assert set(flat(config)) == {
        f"{group}.{name}" if isinstance(values, dict) and values else group
        for group, values in plain(config).items()
        for name in (values if isinstance(values, dict) and values else [group])
    }


@pytest.mark.need("D15c")
def test_a_group_of_settings_may_be_given_as_yaml_nests_it():
    assert TrainConfig.of(model={"heads": 2}, optim={"lr": 0.5}) == TrainConfig.of(heads=2, lr=0.5)
    assert TrainConfig.of({"model": {"name": "vit2dpe_tiny_patch4_32"}}) == TrainConfig.of(
        model="vit2dpe_tiny_patch4_32"
    )
    with pytest.raises(ConfigError, match=r"model\.heads must be at least 1"):
        TrainConfig.of(model={"heads": 0})
    with pytest.raises(ConfigError, match=r"did you mean 'model\.depth'"):
        TrainConfig.of(model={"depht": 2})


@pytest.mark.need("D15c")
@pytest.mark.parametrize("given", [{"optim": 3}, {"model.position": 5}, {"resume": "yes"}, {"model.options": 3}])
def test_a_setting_of_another_type_is_refused(given: dict):
    with pytest.raises(ConfigError, match=r"must be of type (str|bool|dict)"):
        TrainConfig.of(given)


@pytest.mark.need("D15c")
def test_a_group_that_is_none_is_refused():
    for wrong in (3, None, {"lr": 1.0}):
        with pytest.raises(ConfigError, match="optim must be of type OptimConfig"):
            TrainConfig(optim=wrong)
    assert RunConfig(out=Path("runs")).out == Path("runs")
