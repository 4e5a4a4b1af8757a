"""Which encodings a model holds, and which of its parameters and modules are theirs."""

from torch import nn

from vit2dpe import ViT
from vit2dpe.encodings import encoding_parameters, encodings_of, modules_outside_encodings, named_encodings

SIZES = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=2)


def test_shared_and_per_block_encodings_of_a_sum():
    model = ViT("learned+alibi", block_position="logcpb", **SIZES)
    assert list(named_encodings(model)) == [
        "position",
        "position.terms.0",
        "position.terms.1",
        "blocks.0.attn.position",
        "blocks.1.attn.position",
    ]
    names = [type(encoding).__name__ for encoding in encodings_of(model)]
    assert names == ["LearnedTable", "Alibi", "LogCPB", "LogCPB"]
    parameters = {name for name, _ in model.named_parameters()}
    assert encoding_parameters(model) < parameters
    assert "position.terms.0.pos_embed" in encoding_parameters(model)
    linear = {name for name, module in modules_outside_encodings(model) if isinstance(module, nn.Linear)}
    assert "blocks.0.mlp.fc1" in linear
    assert not any("cpb_mlp" in name for name in linear)  # a network inside an encoding


def test_a_model_without_encodings_has_none():
    plain = nn.Sequential(nn.Linear(2, 2))
    assert named_encodings(plain) == {}
    assert encodings_of(plain) == []
    assert encoding_parameters(plain) == set()
    assert [name for name, _ in modules_outside_encodings(plain)] == ["", "0"]
    assert encodings_of(ViT("none", **SIZES)) == []
