"""The fault board: `pytest tests/faults --board` prints every fault, what is expected, and whether it came about.

A test says which fault it causes with `@pytest.mark.fault("F01", ...)`; several tests of one fault must all pass.
"""

from __future__ import annotations

import pytest

FAULTS = {
    "F01": ("truncated JPEG or PNG", "refused, with the path; or left out, counted and listed"),
    "F02": ("image file of zero bytes", "refused, with the path; or left out, counted and listed"),
    "F03": ("HTML or text named .jpg", "refused, with the path; or left out, counted and listed"),
    "F04": ("PNG with a flipped bit", "refused, with the path"),
    "F05": ("CMYK image", "converted to RGB, counted"),
    "F06": ("grayscale image", "converted to RGB, counted"),
    "F07": ("1-bit, palette, gray with alpha", "converted to RGB, counted"),
    "F08": ("transparent pixels", "composited on black, counted"),
    "F09": ("16-bit PNG", "scaled by 257, not clipped"),
    "F10": ("EXIF orientation", "turned upright"),
    "F11": ("animation", "first frame, counted"),
    "F12": ("decompression bomb", "refused before it is decoded"),
    "F13": ("1x1 and 1x5000 images", "read"),
    "F14": ("dangling link, folder named x.jpg", "refused, with the path"),
    "F15": ("empty class folder", "refused, with the folder"),
    "F16": ("one class", "refused"),
    "F17": ("no images", "refused"),
    "F18": ("no such root", "refused, with the path"),
    "F19": ("no held-out split", "refused; no other folder is taken for it"),
    "F20": ("classes differ between splits", "refused, with the classes"),
    "F21": ("hidden folders of tools", "ignored"),
    "F22": ("one image in train and test", "counted and told"),
    "F23": ("pickle in CIFAR's batches", "not opened: its checksum is wrong"),
    "F24": ("unknown encoding, model, option", "refused, with the nearest name"),
    "F25": ("width not a multiple of heads", "refused, with both"),
    "F26": ("channels that an encoding cannot take", "refused, with the rule"),
    "F27": ("patch does not divide the image", "refused, with the nearest size; padding if asked"),
    "F28": ("patch larger than the image", "refused"),
    "F29": ("window does not divide the grid", "padded or refused, never changed silently"),
    "F30": ("base or ratio out of range", "refused, with the range"),
    "F31": ("sizes of zero or below", "refused"),
    "F32": ("bias and a flash-only backend", "an error, never a wrong result"),
    "F33": ("wrong types, duplicate keys, NaN in YAML", "refused, with the key"),
    "F34": ("longer sequence than a table", "resized by its policy, or refused"),
    "F35": ("checkpoint truncated at every 16th", "refused, with the path"),
    "F36": ("checkpoint of zero bytes", "refused, with the path"),
    "F37": ("one flipped byte, 256 places and the JSON", "refused, with the path"),
    "F38": ("weights of another architecture", "refused, with both shapes"),
    "F39": ("missing and unexpected names", "five of each and their number"),
    "F40": ("another shape", "tables resized, heads drawn anew and told, else refused"),
    "F41": ("newer and older format", "upgrade said; migrated to equal logits"),
    "F42": ("malicious pickles", "nothing runs, named error"),
    "F43": ("hostile safetensors", "refused"),
    "F44": ("weights that are not finite", "refused unless allowed"),
    "F45": ("file names that climb out, links in archives", "refused"),
    "F46": ("another grid, both non-square", "resized right, rows and columns told apart"),
    "F47": ("bfloat16 weights into float32 and back", "equal bits"),
    "F48": ("SIGKILL at random times while saving", "last is whole"),
    "F49": ("SIGKILL at every contact with the disk", "last is whole, nothing is left over"),
    "F50": ("full disk", "what was there stays; path and bytes"),
    "F51": ("folder that cannot be written to", "refused before training"),
    "F52": ("SIGTERM, SIGINT, a second one", "saved, 143 and 130; at once"),
    "F53": ("kill and resume", "equal bits"),
    "F54": ("resume on 1, 2, 1 processes", "losses within 1e-5"),
    "F55": ("data worker dies, raises or hangs", "named error, checkpoint kept"),
    "F56": ("a rank dies", "the others end within 60 s, last is whole"),
    "F57": ("loss that is NaN", "step not taken, samples recorded, end after 3"),
    "F58": ("out of memory", "advice, checkpoint kept"),
    "F59": ("no GPU", "auto says so; cuda is refused"),
    "F60": ("two runs in one folder", "the second is refused; a dead one's lock is taken over"),
    "F61": ("interrupted study", "finished trials kept, final table equal"),
    "F62": ("clock that jumps, no time zone", "no matter"),
    "F63": ("spaces, bytes that are no UTF-8, long paths", "work"),
    "F64": ("PYTHONHASHSEED", "equal bits"),
    "F65": ("no network, no HOME", "works"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--board", action="store_true", help="print the table of faults")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(*ids): the faults of the board that a test causes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            if unknown := set(mark.args) - set(FAULTS):
                raise pytest.UsageError(f"{item.nodeid} causes {', '.join(sorted(unknown))}: no fault of the board")


_RESULTS: dict[str, list[str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        report.user_properties += [("fault", fault) for mark in item.iter_markers("fault") for fault in mark.args]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Also called for what another process of `pytest -n 2` ran."""
    for name, value in report.user_properties if report.when == "call" or report.outcome != "passed" else ():
        if name == "fault":
            _RESULTS.setdefault(str(value), []).append(report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--board", default=False):
        return
    lines, right = [], 0
    for fault, (what, expected) in FAULTS.items():
        outcomes = _RESULTS.get(fault, [])
        if not outcomes:
            result = "not run"
        else:
            good = set(outcomes) == {"passed"}
            right += good
            result = f"right ({len(outcomes)})" if good else f"WRONG ({', '.join(sorted(set(outcomes)))})"
        lines.append(f"{fault} | {what:45} | {expected:60} | {result}")
    terminalreporter.section("fault board")
    terminalreporter.write_line("\n".join(lines))
    terminalreporter.write_line(f"{right} of {len(FAULTS)} right")
