"""Digests of data: one for memory and for disk, another one whatever changes the data."""

from __future__ import annotations

import hashlib
import os
import tarfile

import pytest

from tests.data.pictures import pixels, save
from vit2dpe.data.datasets import load_images
from vit2dpe.data.identity import same_data

need = pytest.mark.need("D10")
CHANGES = {
    "": {}, "limit": dict(limit_train=4), "test": dict(limit_test=2), "held out": dict(val_fraction=0.5),
    "seed": dict(val_fraction=0.5, seed=1), "size": dict(source_size=(4, 4)),
    "fit": dict(source_size=(4, 4), fit="pad"),
}  # fmt: skip


def digests(root, kind="folder", **more):
    """(digest, digest of files) in memory and on disk."""
    both = [load_images(kind, root, cache=cache, **more) for cache in ("memory", "none")]
    return [(data.digest, data.digest_of_files) for data in both]


def records(root, **more):
    return [dict(zip(("digest", "digest_of_files"), each, strict=True)) for each in digests(root, **more)]


@need
def test_one_digest_of_files_in_memory_and_on_disk(root):
    """Pixels are what the digest in memory is of, as ever; on disk it is that of the files."""
    for more in CHANGES.values():
        (pixels_, files), on_disk = digests(root, **more)
        assert on_disk == (files, files) != (pixels_, files)
    found = [digests(root, **more)[0] for more in CHANGES.values()]
    assert len({pixels_ for pixels_, _ in found}) == len({files for _, files in found}) == len(CHANGES)


@need
def test_archives_have_it_too(root, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(root / split, split)
    (in_memory, files), on_disk = digests(tmp_path, "tar")
    assert on_disk == (files, files)
    assert in_memory == digests(root)[0][0], "the same pixels"
    assert load_images("digits").digest_of_files is None


@need
@pytest.mark.parametrize("change", ["length", "name", "label", "one more"])
def test_what_changes_files_changes_both(root, change):
    before = records(root)
    first = root / "train/cat/0.png"
    if change == "length":
        save(first, pixels(99) * 0)
    elif change == "name":
        first.rename(first.with_name("9.png"))
    elif change == "label":
        first.rename(root / "train/dog/3.png")
    else:
        save(root / "train/cat/9.png", pixels(99))
    after = records(root)
    assert not any(same_data(one, other) for one in before for other in after)


@need
def test_pixels_decide_where_both_have_them(root):
    """A bitmap whose pixels change keeps its length: in memory that is seen. Files that are named anew in their order
    hold the same pixels."""
    for i in range(3):
        save(root / f"train/cat/{i}.bmp", pixels(i))
        (root / f"train/cat/{i}.png").unlink()
    (in_memory, on_disk) = records(root)
    save(root / "train/cat/0.bmp", pixels(99))
    now = records(root)
    assert [same_data(in_memory, now[0]), same_data(in_memory, now[1]), same_data(on_disk, now[0])] == [
        False,
        True,
        True,
    ]
    save(root / "train/cat/0.bmp", pixels(0))
    (root / "train/cat/2.bmp").rename(root / "train/cat/3.bmp")
    now = records(root)
    assert [same_data(in_memory, now[0]), same_data(in_memory, now[1]), same_data(on_disk, now[1])] == [
        True,
        False,
        False,
    ]


@need
def test_records_of_older_versions(root):
    """They hold one digest, of pixels or of names, labels and lengths."""
    data = load_images("folder", root, cache="none")
    listing = hashlib.sha256()
    for split in (data.train, data.test):
        for name, label in zip(split.names, split.labels.tolist(), strict=True):
            listing.update(name + f"\0{label} {os.stat(os.fsencode(root) + b'/' + name).st_size}\n".encode())
    (in_memory, on_disk), old = records(root), {"digest": listing.hexdigest()}
    assert same_data(old, in_memory)
    assert same_data(old, on_disk)
    assert same_data({"digest": in_memory["digest"]}, in_memory)
    assert not same_data({"digest": in_memory["digest"]}, on_disk), "without decoding all images nobody can tell"
    assert not same_data({"digest": "other"}, in_memory)
    assert same_data({}, {}), "a task without data"
