"""Model cards: the hub can read them, they say what is known and what is not, and the folder still loads."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models import save_for_hf

from vit2dpe import ViT, sweep
from vit2dpe.models.card import card, encoding_of
from vit2dpe.models.swin.model import Swin

MICRO = dict(depth=1, embed_dim=48, num_heads=3)
MICRO_SWIN = dict(embed_dim=24, depths=(1, 1), num_heads=(1, 2))


def front(path):
    """The YAML in front, and what follows."""
    _, head, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def every_model():
    for name in timm.list_models("vit2dpe_*", exclude_filters="vit2dpe_from_timm"):
        with torch.device("meta"):
            yield name, timm.create_model(name, num_classes=7)


def test_every_registered_model_has_a_card(tmp_path):
    for name, model in every_model():
        head, body = front(model.save_card(tmp_path / name))
        assert head["library_name"] == "timm"
        assert head["pipeline_tag"] == "image-classification"
        assert head["license"] == "other"  # nobody said
        assert f"(`{name}`)" in body
        assert "**Data:** not stated" in body
        assert "**Holds up at:** not measured" in body
        assert f"**Training size:** {model.patch_embed.patch_size[0] * model.train_grid[0]}x" in body


def test_it_says_what_is_known(tmp_path):
    model = timm.create_model(
        "vit2dpe_tiny_patch4_32", position="rope+alibi", num_classes=10, img_size=(32, 48), **MICRO
    )
    images = [(torch.randn(6, 3, 32, 48), torch.randint(10, (6,)))]
    rows = sweep(model.eval(), images, [(32, 48), (48, 72)], ["extrapolate", "interpolate"])
    for row, top1 in zip(rows, (90.0, 60.0, 90.0, 88.0), strict=True):
        row["top1"] = top1
    said = dict(recipe="vit2dpe train --config recipe.yaml", data="JPEG CIFAR-10", license="apache-2.0")
    head, body = front(model.save_card(tmp_path / "card.md", rows, **said))
    assert head["license"] == "apache-2.0"
    assert "`rope+alibi` (`AxialRoPE`, `Alibi`)" in body
    assert "32x48 pixels, 8x12 patches of 4x4" in body
    assert "scale: 32x48 (extrapolate), 48x72 (interpolate); within 5 points of 90.0% top-1" in body
    assert "| scale | extrapolate | 90.0 | 60.0 |" in body
    assert "JPEG CIFAR-10" in body
    assert "vit2dpe train --config recipe.yaml" in body


def test_results_come_from_a_file_too(tmp_path):
    model = timm.create_model("vit2dpe_tiny_patch4_32", position="rope", num_classes=10, **MICRO)
    columns = "policy,temperature,mode,train_height,train_width,height,width,top1,n"
    (tmp_path / "results.csv").write_text(
        f"{columns}\nntk,log,scale,32,32,32,32,81.0,360\nntk,log,scale,32,32,64,64,70,360\n"
    )
    found = card(model, tmp_path / "results.csv")
    assert found["details"]["Holds up at"] == ["scale: 32x32 (ntk, log); within 5 points of 81.0% top-1"]
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="they lack"):
        card(model, tmp_path / "results.csv")


def test_a_folder_with_a_card_loads_again(tmp_path):
    for name, sizes in (("vit2dpe_tiny_patch4_32", MICRO), ("vit2dpe_swin_tiny_patch2_window4_32", MICRO_SWIN)):
        model = timm.create_model(name, position="rope_mixed", num_classes=5, **sizes).eval()
        folder = tmp_path / name
        save_for_hf(model, folder)
        model.save_card(folder)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
            text = (folder / "README.md").read_text()
            (usage,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)  # as its reader would run it
            exec(usage.replace("hf-hub:<user>/<name>", f"local-dir:{folder}"), {})


def test_what_is_pushed_is_the_same_card(tmp_path, monkeypatch):
    """timm's push_to_hf_hub, with the hub's own calls replaced."""
    from timm.models import _hub

    pushed = {}

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": name})()

        def file_exists(self, **_):
            return False

        def upload_folder(self, folder_path, **_):
            pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(_hub, "HfApi", Hub, raising=False)
    model = timm.create_model("vit2dpe_tiny_patch4_32", position="rope", num_classes=5, **MICRO)
    _hub.push_to_hf_hub(model, "someone/vit2dpe_tiny_patch4_32", model_card=card(model), safe_serialization=True)
    assert pushed["README.md"] == model.save_card(tmp_path).read_bytes()
    assert "model.safetensors" in pushed
    assert "pytorch_model.bin" not in pushed


def test_models_built_by_hand():
    assert encoding_of(ViT("none", img_size=32, patch_size=4, **MICRO)) == "none"
    assert encoding_of(ViT("sincos+rope_mixed", img_size=32, patch_size=4, **MICRO)) == "`SinCos`, `MixedRoPE`"
    swin = Swin(img_size=32, patch_size=2, window_size=4, **MICRO_SWIN)
    assert card(swin)["details"]["Positional encoding"] == "`RelativeBias`"
