"""Pictures of a model that is on a device: the same as of one on the CPU, whatever is given where."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.devices import Device
from tests.helpers import redrawn
from vit2dpe import MAE, Swin, ViT
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.plots import attention, encodings, reconstruction, trained

SIZES = dict(img_size=(16, 24), patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=0)
MODELS = {
    "a sum": lambda: ViT("sincos+learned+rope+rope_mixed", **SIZES),
    "two biases": lambda: ViT("alibi+relative+logcpb", **SIZES),
    "windows": lambda: Swin("relative", img_size=(16, 24), patch_size=4, embed_dim=24, depths=(1,), num_heads=(2,),
                            window_size=2, num_classes=0),
    "a text": lambda: TextDecoder("learned+t5", vocab_size=9, context=8, embed_dim=24, depth=1, num_heads=2),
}  # fmt: skip


def drawn(figure):
    """All numbers of a figure."""
    images = [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]
    return images + [np.asarray(line.get_ydata()) for ax in figure.axes for line in ax.lines]


def equal(found, expected):
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def made(name):
    torch.manual_seed(0)
    return redrawn(MODELS[name](), 0.3, lambda parameter: False)


@pytest.mark.need("A10a")
@pytest.mark.parametrize("name", MODELS)
def test_encodings_of_a_trained_model(name):
    model = made(name)
    expected = drawn(trained.draw(model))
    with Device("cuda"):
        equal(drawn(trained.draw(model.to("cuda"))), expected)


@pytest.mark.need("A10a")
def test_attention_to_an_image_wherever_image_and_normalisation_are(tmp_path):
    model, image = made("a sum").eval(), torch.rand(1, 3, 16, 24)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    expected = drawn(attention.draw(model, image, mean=mean, std=std))
    Image.fromarray((255 * image[0].movedim(0, -1).numpy()).astype("uint8")).save(tmp_path / "cat.png")
    with Device("cuda"):
        model.to("cuda")
        there = torch.tensor(mean, device="cuda"), torch.tensor(std, device="cuda")
        for picture, m, s in ((image, *there), (image.to("cuda"), mean, std)):
            equal(drawn(attention.draw(model, picture, mean=m, std=s)), expected)
        assert attention.save(model, tmp_path / "cat.png", tmp_path / "map.png").stat().st_size > 1000


def test_attention_in_half_precision():
    model, image = made("a sum").eval().bfloat16(), torch.rand(1, 3, 16, 24)
    attention.draw(model, image.bfloat16())
    attention.draw(model, image, mean=0.5, std=torch.tensor(0.25))


@pytest.mark.need("A10a")
def test_reconstructions_wherever_images_and_noise_are():
    torch.manual_seed(0)
    model = MAE(ViT("learned", **SIZES), decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    images, noise, half = torch.rand(2, 3, 16, 24), torch.rand(2, 6), [0.5] * 3
    expected = drawn(reconstruction.draw(model, images, half, half, 0.5, noise))
    with Device("cuda"):
        model.to("cuda")
        there = torch.tensor(half, device="cuda")
        equal(drawn(reconstruction.draw(model, images.to("cuda"), there, there, 0.5, noise)), expected)


def test_panels_of_tensors_of_a_device():
    with Device("cuda"):
        values = torch.randn(3, 4).to("cuda")
        panel = encodings.Panel("kernel", "a kernel", values, (1, 2))
        assert len(drawn(encodings.figure_of([("title", [panel])]))) > 1
