"""Make a classification of real text out of Shakespeare: who speaks?

    python recipes/shakespeare_speakers.py tinyshakespeare.txt speakers.tsv

The file has a paragraph for each speech, its first line the speaker and a colon. Written are lines of speaker, tab and
speech, of the `--speakers` who speak most often, in the order of the text; speeches under 20 characters are left out.
"""

import argparse
from collections import Counter
from pathlib import Path


def speeches(text: str) -> list[tuple[str, str]]:
    """(speaker, what is said in one line) of each paragraph."""
    found = []
    for paragraph in text.split("\n\n"):
        first, _, rest = paragraph.strip().partition("\n")
        said = " ".join(rest.split())
        if first.endswith(":") and len(said) >= 20:
            found.append((first[:-1].title(), said))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--speakers", type=int, default=8)
    options = parser.parse_args()
    found = speeches(options.text.read_text(encoding="utf-8"))
    kept = [speaker for speaker, _ in Counter(speaker for speaker, _ in found).most_common(options.speakers)]
    lines = [f"{speaker}\t{said}\n" for speaker, said in found if speaker in kept]
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} speeches of {', '.join(kept)}")


if __name__ == "__main__":
    main()
