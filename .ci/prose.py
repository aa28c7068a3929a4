"""Find phrases that readers stumble over: python .ci/prose.py PATH...

It prints FILE:LINE, the phrase, and what to write in its place. The status is 1 where it has found any. Rewrite the
whole sentence, not only the phrase.
"""

from __future__ import annotations

import re
import sys
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

SUFFIXES = {"", ".lua", ".md", ".py", ".rst"}
GENERATED = {"__pycache__", "node_modules", "out", "target"}

PHRASES = {
    r"\b(at|by|for|from|of|than|to|with) who\b": "name the actor: 'callers that'",
    r"(?<=[.:;!?] )Who (?![^.]*\?)|^(?!##)[^\w\[]*Who (?![^.]*\?)": "name the actor: 'Callers that'",
    r"(?<!there )(?<!There )\bis no (?!fewer|greater|larger|later|less|longer|more|older|sooner)\w+": "'is not a'",
    r"\"\"\"(The same\b|Of |As |It has\b)": "begin a docstring with a sentence that stands alone",
    r"\b(anew|whence|lest)\b": "old-fashioned: 'again', 'from where', 'so that ... not'",
    r"\b(for ever|in vain|to and fro)\b": "old-fashioned: 'forever', 'without success', 'back and forth'",
    r"\bwhat (be)?comes of\b": "'what happens to', 'the result of'",
}
# These are searched for in comments and strings of the library only. "Tell apart" is plain English.
OF_THE_LIBRARY = {
    r"(?<![.\w])([Tt]ells?|[Tt]elling|[Tt]old)\b(?!( \w+)? (apart|from)\b)": "'report', 'notify', 'return', 'show'"
}


def main(paths: list[str]) -> int:
    found = sorted(hit for path in paths for file in files(Path(path)) for hit in hits(file))
    for file, line, phrase, why in found:
        print(f"{file}:{line}: {phrase!r}: {why}")
    return bool(found)


def files(path: Path) -> Iterator[Path]:
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.suffix in SUFFIXES and file.is_file() and file.name != "prose.py" and not GENERATED & set(file.parts):
            yield file


def hits(file: Path) -> Iterator[tuple[Path, int, str, str]]:
    yield from found_in(file, file.read_text(), PHRASES)
    if file.parts[0] == "ratelimit" and file.suffix == ".py":
        with file.open("rb") as code:
            for token in tokenize.tokenize(code.readline):
                if token.type in {tokenize.COMMENT, tokenize.STRING}:
                    yield from found_in(file, token.string, OF_THE_LIBRARY, token.start[0])


def found_in(file: Path, text: str, phrases: dict[str, str], first: int = 1) -> Iterator[tuple[Path, int, str, str]]:
    lines = [*text.splitlines(), ""]
    for number, (line, following) in enumerate(pairwise(lines), first):
        # A phrase may go on in the next line, behind the mark of a comment.
        longer = f"{line} {following.lstrip(' #-/')[:20]}"
        for phrase, why in phrases.items():
            for match in re.finditer(phrase, longer):
                if match.start() < len(line):
                    yield file, number, match[0].strip(), why


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
