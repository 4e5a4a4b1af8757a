"""Places that a table does not have are refused on every device; those of a grid are known, and not looked at."""

from unittest import mock

import pytest
import torch

from benchmarks import devtrace
from tests.devices import Device
from vit2dpe import MAE, ConfigError, Dims, Positions, Swin, ViT, build, grids
from vit2dpe.attention.cache import KVCache
from vit2dpe.encodings import ENCODINGS
from vit2dpe.grids import Bounds
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.models.text.model import Encoded
from vit2dpe.models.text.seq2seq import Seq2Seq
from vit2dpe.stock.places import InputLayout
from vit2dpe.testing import tensors

GRIDS = ((7,), (3, 5), (2, 3, 2))
WORDS = [*ENCODINGS, "fire(reach=extent)", "relative(prefix=true)", "logcpb(form=cr)", "sincos+t5"]


def wrong(grid, device=None):
    """Hand-made places of each kind: between whole numbers, before the grid, behind it, infinite."""
    coords = Positions.grid(grid, device).coords
    whole = torch.stack([coords[:, 0], coords[:, -1]], dim=1)
    for change in (0.5, -1.0, 1.0, float("inf"), float("nan")):
        coords = whole.clone()
        coords[:, 0 if change < 0 else 1] += change
        yield Positions(coords, grid)


def outcome(encoding, at):
    try:
        tensors(encoding(at))
    except ValueError as error:
        return str(error)
    return ""


def built(word):
    for grid in GRIDS:
        try:
            yield build(word, Dims(72, 3, grid, block=0, depth=2)), grid
        except ConfigError:
            continue


@pytest.mark.need("A9")
@pytest.mark.parametrize("word", WORDS)
def test_places_that_a_table_does_not_have_are_refused_as_on_the_cpu(word):
    for encoding, grid in built(word):
        expected = [outcome(encoding, at) for at in wrong(grid)]
        with Device("cuda"):
            encoding.to("cuda")
            assert [outcome(encoding, at) for at in wrong(grid, "cuda")] == expected
            assert not outcome(encoding, Positions(Positions.grid(grid, "cuda").coords, grid))
        if not encoding.continuous:
            assert all("whole coordinates only" in expected[i] for i in (0, 3, 4))
            assert all("leave the table" in message for message in expected[1:3])
            continue
        assert not expected[0], "half a patch outside is the edge of the image"
        if word in ("learned", "windowed", "factorized"):
            assert all("leave the grid of" in message for message in expected[1:3])
        if word in ("relative", "t5", "logcpb"):
            assert all("leave the table" in message for message in expected[1:3])
        if encoding.resizes or word in ("t5", "logcpb"):
            assert all("finite" in message for message in expected[3:])


@pytest.mark.parametrize(
    "word", ["learned", "windowed", "factorized", "relative", "t5", "fire(reach=extent)", "sincos+learned+t5"]
)
def test_hand_made_places_are_read_once_and_never_in_a_graph(word):
    encoding, grid = list(built(word))[1 if "fire" in word else 0]
    with Device("cuda"):
        encoding.to("cuda")
        at = Positions(Positions.grid(grid, "cuda").coords, grid)
        with mock.patch.object(Bounds, "of", side_effect=Bounds.of) as read:
            for _ in range(3):
                tensors(encoding(at))
            assert read.call_count == 1
            with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
                tensors(encoding(Positions(at.coords, grid)))
                between = tensors(encoding(Positions(at.coords + 0.25, grid)))
            for name, tensor in tensors(encoding(Positions(at.coords + 0.25, grid))).items():
                assert torch.equal(tensor, between[name]), "not rounded"
            assert read.call_count == 2
            tensors(encoding(Positions.grid(grid, "cuda")))
            assert read.call_count == 2


def test_what_can_be_looked_at():
    assert grids.readable(torch.zeros(1))
    assert not grids.readable(torch.zeros(1, device="meta"))
    with Device("cuda"):
        here = torch.zeros(1, device="cuda")
        assert grids.readable(here)
        assert not grids.checkable(here)
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            assert not grids.readable(here)
            assert grids.readable(torch.zeros(1))
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        seen.append(grids.readable(x))
        return x + 1

    compiled(torch.zeros(1))
    assert seen == [False]


def test_places_stay_known_through_what_keeps_them():
    grid = Positions.grid((3, 4))
    index = torch.tensor([[0, 5], [2, 1]])
    for at in (grid, grid.take(index), grid.take(index[0]), grid.take(index).with_prefix(2), Positions.sequence(4)):
        assert at.on_grid
        assert at.bounds().whole
        assert max(at.bounds().most) < max(at.extent)
    assert Positions.sequence(4, start=2, length=6).on_grid
    made = (
        Positions(grid.coords, (3, 4)),
        Positions.sequence(4, start=3, length=6),
        Positions.sequence(4, start=-1),
        Positions.sequence(4, start=torch.tensor([0, 2])),
    )
    assert not any(at.on_grid or at.with_prefix(1).on_grid or at.take(index[0, :1]).on_grid for at in made)


def test_other_places_are_looked_at():
    assert Positions(torch.tensor([[[1.0, 2], [0, 5]]]), (3, 6)).bounds() == ([0, 2], [1, 5], True)
    assert not Positions(torch.tensor([[[1.0, 2.5]]]), (3, 6)).bounds().whole
    assert Positions(torch.empty(0, 3, 2), (3, 6)).bounds() is None


def test_the_places_of_text_are_known():
    model = TextDecoder("learned", vocab_size=9, context=8, embed_dim=24, depth=1, num_heads=2)
    tokens, cache = torch.zeros(2, 5, dtype=torch.long), KVCache(8)
    valid = torch.tensor([[False, True, True, True, True], [True] * 5])
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    for at in (model.positions(tokens), model.positions(tokens, valid), model.positions(tokens, segments=segments)):
        assert at.on_grid
        assert at.bounds().most[0] < at.extent[0]
    model(tokens, valid, cache=cache)
    model(tokens[:, :1], cache=cache)
    cache.reorder(torch.tensor([1, 0]))
    assert cache.at.on_grid
    assert Encoded(torch.zeros(2, 6, 24), cache.at).take(torch.tensor([1, 0])).at.on_grid
    q, k = InputLayout((5,), 0, True).between(torch.zeros(2, 4, 8), torch.zeros(2, 9, 8))
    assert q.on_grid
    assert k.on_grid


def vit(images):
    ViT("learned+relative", img_size=(16, 24), **SIZES)(images)


def mae(images):
    encoder = ViT("windowed+t5", img_size=(16, 24), **SIZES | dict(num_classes=0))
    MAE(encoder, decoder_position="relative", decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)(images)


def swin(images):
    sizes = dict(img_size=(16, 24), patch_size=4, depths=(2,), num_heads=(2,), window_size=2, embed_dim=24)
    Swin("relative", **sizes, num_classes=3)(images)


def text(images):
    tokens = images[:, 0, 0, :6].long()
    TextDecoder("learned+t5", vocab_size=9, context=8, embed_dim=24, depth=1, num_heads=2)(tokens, tokens > 0)


def pairs(images):
    sizes = dict(source_vocab=9, target_vocab=9, context=8, embed_dim=24, depth=1, num_heads=2)
    tokens = images[:, 0, 0, :6].long()
    Seq2Seq("learned", cross_position="relative", **sizes)(tokens, tokens[:, :4], tokens > 0)


SIZES = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)


@pytest.mark.need("A9")
@pytest.mark.parametrize("run", [vit, mae, swin, text, pairs], ids=lambda run: run.__name__)
def test_a_model_reads_no_place(run):
    """On fake CUDA, where everything that is looked at is written down."""
    with devtrace.fake_cuda() as recorder:
        images = torch.empty(2, 3, 16, 24, device="cuda")
        with torch.device("cuda"), recorder() as recorded:
            run(images)
    assert not [line for line in recorded.traffic.reads if "grids.py" in line], recorded.traffic.report("places")


def test_a_place_of_ones_own_is_read_there():
    encoding = build("learned", Dims(24, 2, (3, 4)))
    with devtrace.fake_cuda() as recorder:
        devtrace.on_fake_cuda(encoding)
        with recorder() as recorded:
            encoding(Positions(torch.empty(1, 2, 2, device="cuda"), (3, 4)))
    assert [line.split(":")[0] for line in recorded.traffic.reads] == ["tolist grids.py"]
