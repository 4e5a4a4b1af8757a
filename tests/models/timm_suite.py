"""timm's own model tests on our names, and on one micro model for each encoding. Run by hand:

    pip download --no-deps --no-binary timm timm==1.0.31
    python tests/models/timm_suite.py timm-1.0.31.tar.gz

timm's wheel leaves its tests out, its source distribution holds them. They are read from the archive, told which of
their lists our names belong to (models that are no CNNs; models with `forward_intermediates`), and run unchanged.
What follows the archive goes to pytest. TorchScript is the stated exception, and is left out. timm's tests have limits
of time: on a busy machine put `-p no:timeout` behind the archive.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from timm.models import build_model_with_cfg, generate_default_cfgs, list_models, register_model

from vit2dpe.encodings import ENCODINGS
from vit2dpe.models import ViT, registry

MICRO = dict(img_size=(32, 48), patch_size=4, embed_dim=48, depth=3, num_heads=3)
NAMES = {f"vit2dpe_micro_{word}": word for word in ENCODINGS}
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": dict(registry._cfg(32), input_size=(3, 32, 48)) for name in NAMES}
)
MARK = "NUM_NON_STD = "  # the first line after timm's lists
LISTS = """
NON_STD_FILTERS += [name for name in list_models('vit2dpe_*') if 'swin' not in name]
EXCLUDE_FILTERS += ['vit2dpe_from_timm']  # a name that needs a base
FEAT_INTER_FILTERS += ['registry', '__main__']
"""


def entry(name: str, word: str):
    def create(pretrained: bool = False, **kwargs):
        return build_model_with_cfg(
            ViT,
            name,
            pretrained,
            feature_cfg=dict(out_indices=3, feature_cls="getter"),
            **{"position": word, **MICRO, **kwargs},
        )

    create.__name__, create.__module__ = name, __name__
    return register_model(create)


def main(archive: str, *args: str) -> int:
    for name, word in NAMES.items():
        entry(name, word)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
        (tests,) = Path(folder).glob("*/tests/test_models.py")
        before, mark, after = tests.read_text().partition(MARK)
        if not mark:
            raise SystemExit(f"{tests.name} of {archive} has no line {MARK!r}: is it timm's source distribution?")
        tests.write_text(f"{before}{LISTS}\n{mark}{after}")
        print(f"{len(list_models('vit2dpe_*')) - 1} names")
        ours = "vit2dpe and not torchscript"
        return pytest.main([str(tests), "--rootdir", folder, "-q", "-k", ours, "-p", "no:cacheprovider", *args])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
