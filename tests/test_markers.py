"""`one_of_each_kind` leaves a test to the default run for some encodings, to `-m slow` for the others."""

from pathlib import Path

import pytest

from tests.conftest import KINDS
from vit2dpe import Dims, build

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
@pytest.mark.parametrize("size", [8, 16])
def test_position(position, size): pass

@pytest.mark.parametrize("position", ["rope", "learned"])
def test_unmarked(position): pass
"""


def collected(pytester, tests, *options):
    """What `pytest --collect-only` says of these tests, with our conftest.py, in this process."""
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makeini("[pytest]\naddopts = -q --strict-markers --collect-only -m 'not slow'\nmarkers = slow: minutes\n")
    pytester.makepyfile(tests)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


def names(done):
    return {line.partition("::test_")[2] for line in done.outlines if "::" in line}


def test_kinds_are_encodings():
    for word in KINDS:
        build(word, Dims(48, 6, (3, 5), depth=2))


def test_other_encodings_are_slow(pytester):
    always = {"unmarked[rope]", "unmarked[learned]"}
    kinds = {f"position[{size}-{word}]" for size in (8, 16) for word in ("learned", "alibi")}
    assert names(collected(pytester, TESTS)) == always | kinds
    assert names(collected(pytester, TESTS, "-m", "slow")) == {"position[8-rope]", "position[16-rope]"}


@pytest.mark.parametrize("parameters", ["", '@pytest.mark.parametrize("size", [8, 16])\n'], ids=["none", "others"])
def test_a_mark_that_does_nothing_is_refused(pytester, parameters):
    tests = (
        f"import pytest\n\n{parameters}@pytest.mark.one_of_each_kind\ndef test_f({'size' * bool(parameters)}): pass\n"
    )
    done = collected(pytester, tests)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "is one_of_each_kind without an encoding" in "\n".join(done.errlines)
