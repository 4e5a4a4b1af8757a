"""Augmentation: every sample has draws of its own, operations are torchvision's, ranks draw as one process does."""

import pytest
import torch
from torch.nn.functional import grid_sample
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from vit2dpe.data.augment import Share, erase, mix, resized_crop
from vit2dpe.data.rand_augment import AFFINE, OPERATIONS, UNSIGNED, rand, strengths, trivial

THEIRS = {name: "".join(part.title() for part in name.split("_")) for name in OPERATIONS} | {
    "autocontrast": "AutoContrast"
}


def pictures(n, channels=3, h=11, w=17):
    torch.manual_seed(0)
    rough = torch.rand(n, channels, 4, 5)
    return (torch.nn.functional.interpolate(rough, (h, w), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("wide", [True, False])
def test_operations_are_torchvisions(name, wide):
    images = pictures(12)
    strength = strengths(name, torch.linspace(0, 1, 12), (11, 17), wide)
    for sign in (1,) if name in UNSIGNED else (1, -1):
        ours = OPERATIONS[name](images, sign * strength)
        for i, value in enumerate(strength.tolist()):
            theirs = _apply_op(images[i], THEIRS[name], sign * value, InterpolationMode.NEAREST, None)
            off = (ours[i].int() - theirs.int()).abs()
            if name in ("shear_x", "shear_y", "rotate"):  # which of two equally near pixels: up to rounding
                assert (off.amax(0) > 0).float().mean() < 0.06
            else:
                assert off.max() <= 1
                assert (off > 0).float().mean() < 0.25  # rounded after other sums


@pytest.mark.parametrize("policy", [trivial, rand])
def test_each_sample_has_its_own_operation(policy):
    images = pictures(1).expand(200, -1, -1, -1).clone()
    out = policy(images, draws())
    assert out.dtype == torch.uint8
    assert len({bytes(image.numpy().tobytes()) for image in out}) > (60 if policy is trivial else 30)
    assert torch.equal(out, policy(images, draws()))
    assert torch.equal(images, pictures(1).expand(200, -1, -1, -1)), "the input is left alone"
    gray = policy(pictures(30, 1), draws())
    assert gray.shape == (30, 1, 11, 17)


def one_after_the_other(images, step, generator, total, cut, wide):
    """Each operation on its samples, as they lie in the batch; affine ones by a matrix product for all their points."""
    h, w = images.shape[-2:]
    chosen = torch.randint(len(OPERATIONS), (total,), generator=generator)[cut]
    sign = torch.where(torch.rand(total, generator=generator) < 0.5, -1.0, 1.0)[cut]
    out = images.clone()
    for number, name in enumerate(OPERATIONS):
        index = (chosen == number).nonzero()[:, 0]
        s = strengths(name, (step[cut] / 30)[index], (h, w), wide) * (1 if name in UNSIGNED else sign[index])
        if len(index) and name in AFFINE:
            maps = AFFINE[name](s, (h, w))
            x0, y0 = maps[0, 6:].tolist()
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            points = torch.stack([x - x0, y - y0, torch.ones_like(x)]).flatten(1).float()
            source = maps[:, :6].view(-1, 2, 3) @ points
            grid = torch.stack([2 * (source[:, 0] + x0 + 0.5) / w - 1, 2 * (source[:, 1] + y0 + 0.5) / h - 1], -1)
            grid = grid.view(-1, h, w, 2)
            out[index] = grid_sample(images[index].float(), grid, mode="nearest", align_corners=False).byte()
        elif len(index):
            out[index] = OPERATIONS[name](images[index], s)
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_a_sorted_batch_has_the_pixels_of_one_that_is_not(seed, channels):
    images, cut = pictures(40, channels), slice(7, 40)
    magnitude = (9, 20, 30, 0)[seed % 4]  # at 20 points lie just between two pixels
    for share in (Share(40), Share(40, cut)):
        part, generator = images[share.samples], draws(seed)
        step = torch.full((40,), magnitude)
        expected = one_after_the_other(part, step, generator, 40, share.samples, wide=False)
        expected = one_after_the_other(expected, step, generator, 40, share.samples, wide=False)
        assert torch.equal(rand(part, draws(seed), magnitude=magnitude, share=share), expected)
        step = torch.randint(31, (40,), generator=(generator := draws(seed)))
        expected = one_after_the_other(part, step, generator, 40, share.samples, wide=True)
        assert torch.equal(trivial(part, draws(seed), share=share), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, **k: trivial(x, draws(), **k),
        lambda x, **k: rand(x, draws(), **k),
        lambda x, **k: resized_crop(x, (8, 12), 0.3, True, draws(), **k),
        lambda x, **k: erase(x.float(), 0.7, draws(), **k),
    ],
)
def test_a_part_of_a_batch_is_drawn_as_in_the_whole(make):
    images = pictures(20)
    cut = slice(6, 13)
    assert torch.equal(make(images)[cut], make(images[cut], share=Share(20, cut)))


def test_crops_are_parts_of_the_image_and_each_its_own():
    rows, cols = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    x = torch.stack([rows * 4, cols * 4]).expand(300, 2, 40, 60).to(torch.uint8)
    out = resized_crop(x, (20, 20), 0.25, False, draws()).float() / 4
    height, width = (out[:, 0, -1, 0] - out[:, 0, 0, 0]) * 20 / 19, (out[:, 1, 0, -1] - out[:, 1, 0, 0]) * 20 / 19
    share, ratio = height * width / 2400, width / height
    assert share.min() > 0.2
    assert share.max() > 0.85  # 4:3 in 3:2 is 0.89 of it
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.45
    assert len(set(share.tolist())) > 100
    whole = resized_crop(x, (40, 60), 1.0, False, draws())  # 3:2 is none of the ratios: all of it, then
    assert torch.equal(whole, x)
    mirrored = resized_crop(x, (40, 60), 1.0, True, draws())
    flips = (mirrored[:, 1, 0, 0] > mirrored[:, 1, 0, -1]).sum()
    assert 100 < flips < 200


def test_erasing_takes_rectangles_from_the_chosen():
    x = torch.ones(400, 3, 20, 30)
    out = erase(x, 0.25, draws())
    hit = (out == 0).flatten(1).any(1)
    assert 60 < hit.sum() < 140
    holes = out[hit][:, 0] == 0
    share = holes.flatten(1).float().mean(1)
    assert share.min() > 0.01
    assert share.max() < 0.36
    assert torch.equal(holes.any(2)[:, :, None] & holes.any(1)[:, None, :], holes), "rectangles"


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("n", [64, 63])
def test_labels_are_mixed_as_the_pixels_are(mixup, cutmix, n):
    labels = torch.arange(n)
    images = labels.float()[:, None, None, None].expand(n, 3, 12, 18)
    out, target = mix(images, labels, n, 0, mixup=mixup, cutmix=cutmix)
    torch.testing.assert_close(target.sum(1), torch.ones(n))
    expected = target @ labels.float()  # the mean pixel is the mean label
    torch.testing.assert_close(out.mean((1, 2, 3)), expected, atol=1e-3, rtol=1e-4)
    whole = torch.isin(out, labels.float()).flatten(1).all(1).float().mean()
    assert (whole == 1) if not mixup else (whole < 0.3) if not cutmix else (0.2 < whole < 0.8)
    assert len(set(target.max(1).values.tolist())) > 20, "each sample has a weight of its own"
    again, _ = mix(images, labels, n, 0, mixup=mixup, cutmix=cutmix)
    assert torch.equal(out, again)
