"""What the tests of this folder may use: a folder of images, and a cache that goes with the test."""

from pathlib import Path

import pytest

from tests.data.pictures import pixels, save


@pytest.fixture(autouse=True)
def cache_of_its_own(cache: Path) -> None:
    """No test of this folder reads or writes the cache of the machine."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, 6 x 8 pixels: train 3 each, val 2 each, every image another."""
    seed = 0
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                save(tmp_path / "pets" / split / name / f"{index}.png", pixels(seed))
                seed += 1
    return tmp_path / "pets"
