"""A CSV of paths and labels: columns by their names, splits, classes in order; errors that name file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.pictures import pixels, save
from vit2dpe.data.datasets import load_images
from vit2dpe.data.label_files import list_csv
from vit2dpe.errors import DataError

pytestmark = pytest.mark.need("D20a")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten images in a flat folder beside `labels.csv`, which has no lines yet."""
    for index in range(10):
        save(tmp_path / "data/images" / f"{index}.png", pixels(index))
    return tmp_path / "data/labels.csv"


def write(table: Path, *lines: str) -> Path:
    table.write_text("\n".join(lines))
    return table


@pytest.mark.parametrize("path", ["path", "file", "FileName", "image", " Image_Path"])
@pytest.mark.parametrize(("label", "between"), [("label", ","), ("class", ";"), ("Target", "\t"), ("category", ",")])
def test_columns_are_found_by_their_names(table: Path, path: str, label: str, between: str) -> None:
    lines = [between.join((str(i), ("dog", "cat")[i % 2], f"images/{i}.png")) for i in range(10)]
    table.write_text("\ufeff" + "\n".join([between.join(("width", label, path)), *lines]) + "\n\n")
    loaded = load_images("csv", table)
    assert loaded.classes == ("cat", "dog")
    assert (loaded.train.labels.bincount().tolist(), loaded.test.labels.bincount().tolist()) == ([4, 4], [1, 1])


def test_whole_numbers_are_classes_in_their_order(table: Path) -> None:
    write(table, "path,label", *(f"images/{i}.png,{(10, 9, 2)[i % 3]}" for i in range(9)))
    assert load_images("csv", table).classes == ("2", "9", "10")


def test_the_splits_of_the_table(table: Path) -> None:
    write(
        table, "path,label,split", *(f"images/{i}.png,{i % 2},{('train', 'valid', 'TEST')[i // 4]}" for i in range(10))
    )
    loaded = load_images("csv", table)
    assert loaded.val is not None
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (4, 4, 2)
    expected = pixels(8).transpose(2, 0, 1)
    assert (loaded.test.images[0].numpy() == expected).all()


def test_absolute_paths_and_lines_that_stand_twice(table: Path) -> None:
    lines = [f"{table.parent}/images/{i}.png,{i % 2}" for i in range(10)]
    write(table, "image,label", *lines, "images/3.png,1")
    loaded = load_images("csv", table)
    assert len(loaded.train) + len(loaded.test) == 10
    assert "labels.csv: images that stand in it twice, read once: 1" in loaded.notes
    assert "labels.csv: image holds the paths, label holds the labels" in loaded.notes


def test_images_alone(table: Path) -> None:
    write(table, "path", *(f"images/{i}.png" for i in range(10)))
    assert load_images("csv", table, labels=False).classes == ()
    with pytest.raises(DataError, match=r"labels\.csv has the columns path: expected a header"):
        load_images("csv", table)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,kind", "images/0.png,a"], "has the columns name, kind: expected a header with a column of paths"),
        (["path,label"], "has no lines of images"),
        (["path,label", "images/0.png,a", "images/77.png,b", "images/78.png,b"],
         r"line 3: there is no file .*images/77\.png; 2 of 3 are missing"),
        (["path,label", "images/0.png,a", "images/1.png"], "line 3: 1 values, the header has 2"),
        (["path,label", "images/0.png,a", "images/1.png,"], "line 3: no label in"),
        (["path,label", ",a"], "line 2: no path in"),
        (["path,label", "images/0.png,a", "images/0.png,b"], "line 3: images/0.png is in line 2 too, with another"),
        (["path,label", "images/0.png,a", "images/1.png,a"], r"has one class \(a\) of 2 images: there must be two"),
        (["path,label,split", "images/0.png,a,train", "images/1.png,b,later"],
         "line 3: split is one of train, .*'later'"),
        (["path,label,split", "images/0.png,a,val", "images/1.png,b,val"],
         "no image of the split train: its splits are val"),
        (["path,label,split", "images/0.png,a,train", "images/1.png,b,train", "images/2.png,a,val"],
         r"its split val has no image of b \(1 classes in all\)"),
        (["path,label", "images/0.png,a", "images/1.png,a", "images/2.png,b"], "1 of 2 classes have one image.*: b"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_file_and_line(table: Path, lines: list[str], message: str) -> None:
    write(table, *lines)
    with pytest.raises(DataError, match=message) as caught:
        load_images("csv", table)
    assert "one image" in message or str(table) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*no\.csv; expected a header"):
        list_csv(tmp_path / "no.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\nimages/é.png,a".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv cannot be read as a CSV"):
        list_csv(tmp_path / "latin.csv")
