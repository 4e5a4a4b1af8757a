"""Parts of labelled images: balanced, nested, always the same; images of a batch at another size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from tests.data.pictures import pixels
from vit2dpe.data.datasets import load_images, normalize
from vit2dpe.data.splits import Split, resize
from vit2dpe.errors import ConfigError


def split(labels: list[int]) -> Split:
    n = len(labels)
    return Split(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2), torch.tensor(labels))


class TestTake:
    def test_balanced(self) -> None:
        whole = split([0] * 50 + [1] * 30 + [2] * 20)
        assert whole.subsample(30).labels.bincount().tolist() == [10, 10, 10]
        assert whole.subsample(32).labels.bincount().tolist() == [11, 11, 10]

    def test_a_class_that_runs_out_leaves_its_share_to_the_others(self) -> None:
        assert split([0] * 50 + [1] * 3 + [2] * 20).subsample(33).labels.bincount().tolist() == [15, 3, 15]

    def test_same_every_time_nested_and_in_order(self) -> None:
        whole = split([i % 3 for i in range(90)])
        ids = [whole.subsample(n).images[:, 0, 0, 0].tolist() for n in (9, 9, 40)]
        assert ids[0] == ids[1] == sorted(ids[0])
        assert set(ids[0]) < set(ids[2])
        assert ids[0] != list(range(9))  # drawn, not the first ones

    def test_labels_stay_with_their_images(self) -> None:
        part = split([i % 7 for i in range(90)]).subsample(33)
        assert torch.equal(part.images[:, 0, 0, 0].long() % 7, part.labels)

    def test_more_than_there_are(self) -> None:
        whole = split([0, 1])
        assert whole.subsample(5) is whole
        assert len(whole) == 2

    def test_without_what_cannot_be_had_the_others_stay(self) -> None:
        whole = split([i % 3 for i in range(90)])
        ids = [whole.subsample(12, without).images[:, 0, 0, 0].tolist() for without in ((), (), range(0, 90, 3))]
        lost = set(ids[0][:2])
        part = whole.subsample(12, lost)
        left = set(part.images[:, 0, 0, 0].tolist())
        assert part.labels.bincount().tolist() == [4, 4, 4]
        assert set(ids[0]) - lost < left
        assert not lost & left
        assert whole.subsample(90, lost).labels.numel() == 88
        assert not set(ids[2]) & set(range(0, 90, 3))
        assert whole.subsample(12, range(0, 90, 3)).labels.bincount().tolist() == [0, 6, 6]

    @pytest.mark.parametrize("n", [0, -1])
    def test_none_is_refused(self, n: int) -> None:
        with pytest.raises(ConfigError, match=f"at least 1 image, got {n}"):
            split([0, 1]).subsample(n)


class TestBatch:
    def test_identity_is_exact(self) -> None:
        batch = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert torch.equal(resize(batch, (16, 16)), batch.float() / 255)
        values = torch.rand(2, 3, 5, 7, dtype=torch.float64)
        assert resize(values, (5, 7)) is values

    @pytest.mark.parametrize("size", [(4, 6), (24, 40), (8, 3), (1, 1)])
    def test_equals_torchvision(self, size: tuple[int, int]) -> None:
        batch = torch.from_numpy(np.stack([pixels(s, 9, 13) for s in range(2)])).permute(0, 3, 1, 2)
        ours = resize(batch, size)
        theirs = TF.resize(batch.float() / 255, list(size), TF.InterpolationMode.BICUBIC, antialias=True)
        assert torch.allclose(ours, theirs.clamp(0, 1), atol=1e-6)
        assert ours.shape == (2, 3, *size)

    def test_overshoot_is_clamped(self) -> None:
        edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        edge[..., 4:] = 255
        large = resize(edge, (32, 32))
        assert (large.min(), large.max()) == (0, 1)

    def test_rows_before_columns(self) -> None:
        assert resize(torch.zeros(1, 1, 4, 4), (2, 6)).shape == (1, 1, 2, 6)

    def test_normalize(self, root: Path) -> None:
        loaded = load_images("folder", root)
        x = normalize(loaded.train.images.double() / 255, loaded.mean, loaded.std)
        assert x.mean((0, 2, 3)).abs().max() < 1e-14
        assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-14
        assert normalize(torch.zeros(1, 3, 2, 2), loaded.mean, loaded.std).dtype == torch.float32

    def test_channels_must_match(self) -> None:
        with pytest.raises(ConfigError, match="1 channels, mean 3 and std 3"):
            normalize(torch.zeros(1, 1, 2, 2), (0, 0, 0), (1, 1, 1))
