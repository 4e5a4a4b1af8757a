"""F24 to F34: settings that cannot work are refused, with what was required, what came, and the nearest that exists."""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit2dpe import Dims, Positions, Swin, ViT, build
from vit2dpe.cli import main
from vit2dpe.errors import ConfigError
from vit2dpe.models.layers import PatchEmbed
from vit2dpe.models.mae import keep_count
from vit2dpe.spec import parse_size

fault = pytest.mark.fault
MICRO = dict(img_size=(8, 12), patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)


@fault("F24")
@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["train", "--model.position", "roep"], "'rope'"),
        (["train", "--model.position", "rope(bsae=3)"], "'base'"),
        (["train", "--model.name", "vit2dpe_tiny_patch4_23"], "'vit2dpe_tiny_patch4_32'"),
        (["train", "--model.widht", "3"], "--model.width"),
        (["trian"], "'train'"),
    ],
)
def test_names_that_do_not_exist(args, near, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert f"did you mean {near}" in error
    assert error.count("\n") == 1


@fault("F25", "F26")
@pytest.mark.parametrize(
    ("word", "sizes", "message"),
    [
        ("none", dict(embed_dim=20, num_heads=3), "multiple of num_heads: got 20 and 3"),
        ("sincos", dict(embed_dim=18, num_heads=2), "multiple of 2 x axes: got dim=18, axes=2"),
        ("rope", dict(embed_dim=30, num_heads=6), "even head width, got 5"),
    ],
)
def test_channels_that_do_not_divide(word, sizes, message):
    with pytest.raises(ConfigError, match=message):
        ViT(word, **MICRO | sizes)


@fault("F26")
def test_rope_of_three_axes_needs_a_pair_for_each():
    with pytest.raises(ConfigError, match="of 3 axes needs a head width of at least 6: got 4"):
        build("rope", Dims(width=8, heads=2, grid=(2, 3, 4)))


@fault("F27", "F28")
def test_patches_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"multiple of the patch 4x4: got 9x12; nearest: 8x12"):
        ViT("rope", **MICRO)(torch.zeros(1, 3, 9, 12))
    with pytest.raises(ConfigError, match=r"multiple of the patch 16x16: got 8x12"):
        ViT("rope", **MICRO | dict(patch_size=16))
    assert ViT("rope", **MICRO | dict(dynamic_img_pad=True))(torch.zeros(1, 3, 9, 13)).shape == (1, 3)


@fault("F29")
def test_windows_never_change_silently():
    # A table of windows repeats over the grid, whichever it is; the model is told the window and keeps it.
    encoding = build("windowed(window=3)", Dims(width=8, heads=2, grid=(4, 5)))
    token = encoding(Positions.grid((7, 8))).token[0].view(7, 8, 8)
    torch.testing.assert_close(token[0, 0] - token[3, 3], token[3, 0] - token[6, 3], atol=1, rtol=0)
    with pytest.raises(ConfigError, match="window"):
        build("windowed(window=0)", Dims(width=8, heads=2, grid=(4, 5)))


@fault("F29")
def test_a_grid_that_windows_do_not_divide_is_filled_up():
    """Windows of 4x6 on a grid of 5x7: whole windows see what they saw alone, the last one its single token."""
    sizes = dict(embed_dim=16, depths=(1,), num_heads=(2,), num_classes=3)
    model = Swin("relative", img_size=(16, 24), window_size=(4, 6), **sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(1, 3, 20, 28)
    with torch.no_grad():
        whole = model.forward_features(images)
        for rows, columns in ((slice(0, 4), slice(0, 6)), (slice(4, 5), slice(6, 7)), (slice(4, 5), slice(0, 6))):
            pixels = [slice(4 * part.start, 4 * part.stop) for part in (rows, columns)]
            alone = model.forward_features(images[:, :, pixels[0], pixels[1]])
            torch.testing.assert_close(whole[:, rows, columns], alone)
    assert model.window_sizes == ((4, 6),)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="at least 1"):
        Swin("relative", img_size=(16, 24), window_size=0, **sizes)


@fault("F30")
@pytest.mark.parametrize("name", ["rope", "rope_mixed", "rope_dinov3", "sincos"])
@pytest.mark.parametrize("base", ["0", "-1", "1", "nan", "1e999"])
def test_bases_out_of_range(name, base):
    with pytest.raises(ConfigError, match=r"base"):
        build(f"{name}(base={base})", Dims(width=16, heads=2, grid=(4, 5)))


@fault("F30")
@pytest.mark.parametrize("ratio", ["0", "1", "-0.5", "1.5", "nan"])
def test_masks_that_hide_nothing_or_everything(ratio, capsys, monkeypatch):
    monkeypatch.setattr("vit2dpe.training.objectives.images.load_fitted", None)  # before data are read
    assert main(["pretrain", f"--mask_ratio={ratio}"]) == 2
    error = capsys.readouterr().err
    assert ratio in error
    assert "mask_ratio" in error


@fault("F30")
def test_masks_keep_something_and_hide_something():
    for n in range(2, 400):
        for ratio in (1e-6, 0.1, 0.5, 0.75, 0.8, 0.9, 1 - 1e-9):
            assert 1 <= keep_count(n, ratio) <= n - 1
    assert (keep_count(5, 0.8), keep_count(10, 0.9), keep_count(196, 0.75)) == (1, 1, 49)
    with pytest.raises(ConfigError, match="one patch cannot be masked"):
        keep_count(1, 0.5)


@fault("F30")
@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rates_out_of_range(rate):
    with pytest.raises(ConfigError, match=rf"patch_drop_rate must be in \[0, 1\).*, got {rate}"):
        ViT("rope", **MICRO | dict(patch_drop_rate=rate))


@fault("F31")
@pytest.mark.parametrize("text", ["0", "0x8", "-8", "8x", "8x8x8"])
def test_sizes_of_nothing(text):
    with pytest.raises(ConfigError, match="32 or 32x48"):
        parse_size(text)
    with pytest.raises(ConfigError, match="img_size must be at least 1, got 0"):
        ViT("rope", **MICRO | dict(img_size=(0, 8)))
    with pytest.raises(ConfigError, match="multiple of the patch"):
        PatchEmbed((4, 4), 3, 8, img_size=(8, 8)).grid(0, 8)


@fault("F32")
def test_a_bias_and_a_backend_that_takes_none():
    model, images = ViT("alibi", **MICRO), torch.randn(1, 3, 8, 12)
    torch.nn.init.normal_(model.head.weight)
    with sdpa_kernel([SDPBackend.MATH]):
        expected = model(images)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says why the kernel does not serve
        try:
            torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)
        except RuntimeError as error:
            assert "kernel" in str(error)  # noqa: PT017


@fault("F33")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  epochs: true\n", "optim.epochs"),
        ("optim:\n  lr: fast\n", "optim.lr"),
        ("optim:\n  lr: 1\n  lr: 2\n", "optim.lr is given twice"),
        ("optim:\n  lr: .nan\n", "optim.lr must be a finite number"),
        ("run:\n  compile: 3\n", "run.compile"),
    ],
)
def test_yaml_that_does_not_say_what_it_means(tmp_path, text, message, capsys):
    (tmp_path / "x.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "x.yaml"), "--run.out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@fault("F34")
def test_a_line_longer_than_its_table():
    encoding = build("learned", Dims(width=8, heads=2, grid=(5,)))
    token = encoding(Positions.sequence(9)).token
    assert token.shape == (1, 9, 8)
    assert torch.isfinite(token).all()
    torch.testing.assert_close(encoding(Positions.sequence(5)).token[0], encoding.pos_embed[0])
