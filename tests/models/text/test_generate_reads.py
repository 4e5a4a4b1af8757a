"""Writing without a look at each token: the texts are the same, and the host of a device does not wait for them."""

import pytest
import torch

from benchmarks import devtrace
from tests.helpers import redrawn
from vit2dpe.attention.cache import KVCache
from vit2dpe.models.text import generate as writing
from vit2dpe.models.text.generate import beam_search, generate
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.models.text.seq2seq import Seq2Seq

SIZES = dict(vocab_size=13, context=12, embed_dim=24, depth=2, num_heads=2, hidden=32)


def decoder(word="rope", **more):
    torch.manual_seed(0)
    return redrawn(TextDecoder(word, **(SIZES | more)), 0.4, lambda name: False).eval()


def ids(*shape):
    return torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(1))


def texts(model, new, stops):
    drawn = [generate(model, ids(3, 4), new, temperature=2.0, stop=stop, seed=stop) for stop in stops]
    greedy = [generate(model, ids(3, 4), new, temperature=0, stop=stop) for stop in stops]
    return drawn + greedy + [beam_search(model, ids(3, 4), new, stop=stop, beams=3) for stop in stops]


def test_looking_seldom_gives_the_same_texts(monkeypatch):
    """As on a device: what is drawn after all texts have ended is cut off, beyond the context too."""
    model, stops = decoder("learned", depth=1), (5, 6, 8, 12)
    expected = texts(model, 11, stops)
    lengths = {text.shape[1] for text in expected}
    assert len(lengths) > 3, lengths  # some end early, some never
    assert max(lengths) == 15
    for every in (3, 100):
        monkeypatch.setitem(writing.EVERY, "cpu", every)
        for one, other in zip(texts(model, 11, stops), expected, strict=True):
            assert torch.equal(one, other)


def test_draws_are_those_of_torch():
    p = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    p[:, 7] = 0.0
    for dtype in (torch.float32, torch.float64):
        drawn = writing.first(p.to(dtype), torch.Generator().manual_seed(5))
        theirs = torch.multinomial(p.to(dtype), 1, generator=torch.Generator().manual_seed(5))[:, 0]
        assert torch.equal(drawn, theirs)
        assert drawn.unique().numel() > 20
        assert not (drawn == 7).any()


PADDED = torch.tensor([[False] * 2 + [True] * 3, [True] * 5])


@pytest.mark.parametrize(
    ("more", "reads"),
    [
        (dict(), 0),
        (dict(temperature=0), 0),
        (dict(top_k=3, top_p=0.9), 0),
        (dict(stop=3), 1),  # once, at the end, where the surplus is cut
        (dict(valid=PADDED), 1),  # how many columns are padding alone
    ],
    ids=["drawn", "greedy", "top", "stop", "padded"],
)
def test_no_token_is_waited_for(more, reads):
    """Up to the context; a padded batch that slides is trimmed anew."""
    traffic = written(generate, 3, **more)
    assert traffic.reads.total() == reads, traffic.report(str(more))
    assert traffic.stalls == reads, traffic.report(str(more))


def test_a_text_that_slides_and_a_search_wait_for_no_token():
    slid = written(generate, 5, "rope")
    assert slid.stalls == 0, slid.report("slid")
    found = written(beam_search, 3, "rope", stop=3)
    assert found.stalls == found.reads.total() == 1, found.report("beams")


def test_a_stop_is_looked_for_every_so_many_tokens(monkeypatch):
    """Numbers that are read are 1 here: at the first look all have ended, after two tokens."""
    monkeypatch.setattr(writing, "ELSEWHERE", 3)
    traffic = written(generate, 20, "rope", stop=3)
    assert traffic.reads.total() == traffic.stalls == 2, traffic.report("stop")


def test_a_translation_waits_for_no_token():
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"} | dict(depth=1)
    model = Seq2Seq("rope", source_vocab=13, target_vocab=13, **sizes)
    with devtrace.fake_cuda() as recorder:
        devtrace.on_fake_cuda(model).eval()
        source = torch.zeros(2, 6, dtype=torch.long, device="cuda")
        with recorder() as recorded, torch.no_grad():
            memory = model.encode(source, source == 0)
            generate(model.decoder, source[:, :1], 3, memory=memory)
    assert recorded.traffic.stalls == 0, recorded.traffic.report("translation")


def written(write, new, word="rope+learned+t5", **more):
    model = decoder(word, depth=1, context=8)
    with devtrace.fake_cuda() as recorder:
        devtrace.on_fake_cuda(model)
        more = {name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in more.items()}
        tokens = torch.zeros(2, 5, dtype=torch.long, device="cuda")
        with recorder() as recorded:
            write(model, tokens, new, **more)
    return recorded.traffic


def test_a_cache_is_written_in_place():
    """Keys and values have their room from the first token on."""
    model, cache = decoder(), KVCache(9)
    with torch.no_grad():
        model(ids(2, 4), cache=cache)
        rooms = {layer.keys.data_ptr() for layer in cache.layers.values()}
        for step in range(5):
            model(ids(2, 1), cache=cache)
            assert {layer.keys.data_ptr() for layer in cache.layers.values()} == rooms, step
    assert [tuple(layer.keys.shape) for layer in cache.layers.values()] == [(2, 2, 9, 12)] * 2
