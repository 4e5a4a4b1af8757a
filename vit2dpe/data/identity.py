"""Whether data are those of before: digests of a dataset, in memory or on disk.

In memory pixels and labels are hashed. On disk that would mean decoding every image, so names, labels and lengths of
files are; those of images in memory are too, so that `data.cache` may be decided otherwise when a run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from .splits import FileSplit, Split

FILES: Final = "digest_of_files"  # the entry beside "digest" in a record of data


def digest_of(*splits: Split | FileSplit) -> str:
    """The digest of splits: `digest_of_files` of those on disk, else sha256 of pixels and labels."""
    on_disk = any(isinstance(split, FileSplit) for split in splits)
    return (digest_of_files(*splits) if on_disk else None) or _sha256(*splits)


def digest_of_files(*splits: Split | FileSplit) -> str | None:
    """sha256 of names, labels and lengths of the files, and the size that they are decoded at: `<hex>-<H>x<W>`.

    None where not all images come from files. Pixels that change while names and lengths stay go unnoticed.
    """
    files = [split.origin if isinstance(split, Split) else split for split in splits]
    listed = [split for split in files if split is not None]
    if not listed or len(listed) < len(files):
        return None
    height, width = listed[0].native
    return f"{_sha256(*listed)}-{height}x{width}"


def same_data(before: Mapping[str, object], here: Mapping[str, object]) -> bool:
    """Whether two records, with "digest" and "digest_of_files", are of the same data.

    Pixels decide where both were in memory, else the files. Older versions recorded one kind alone: pixels, or files
    without the size.
    """
    digest, files, listed = here.get("digest"), here.get(FILES), before.get(FILES)
    if before.get("digest") == digest:
        return True
    if files is None:
        return False
    if listed is None:
        return before.get("digest") == str(files).partition("-")[0]
    return listed == files and (digest == files or before.get("digest") == listed)


def _sha256(*splits: Split | FileSplit) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for chunk in split.content():
            digest.update(chunk)
    return digest.hexdigest()
