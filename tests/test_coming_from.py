"""The pages about other libraries name only what this library has.

In a table, the left cell is the other library's, and the right one is ours: every name, limit and URL in it must exist
here. Text around the tables may name both. ``tests/test_docs.py`` runs the examples.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ratelimit import InvalidConfigurationError
from ratelimit.core.limits import parse
from ratelimit.stores import urls

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs/coming-from.md"
PAGES = sorted(ROOT.glob("docs/coming-from/*.md"))

SOURCES = [
    *("manager.py", "bucket.py", "settings.py", "errors.py", "testing.py", "telemetry/counting.py", "runtime/clock.py"),
    *("core/results.py", "core/expiration.py", "core/inheritance.py", "core/token_bucket/bandwidth.py"),
    *("core/token_bucket/state.py", "engine/observing.py", "engine/on_error.py", "engine/optimization.py"),
    *("stores/protocol.py", "stores/memory.py", "stores/redis/store.py"),
    *("policy/*.py", "integrations/*.py", "integrations/http/*.py", "integrations/django/*.py"),
]
"""The modules with names that users see."""

FIELDS = {
    *("RateLimit", "RateLimit-Policy", "Retry-After", "X-Forwarded-For"),
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"),
}

# Names in examples that neither library has: those of frameworks, of the standard library, and of variables.
OTHERS = {
    *("request", "response", "native", "state", "POST", "get", "client", "app", "user", "path", "before_request"),
    *("dispatch", "method_decorator", "timedelta", "minutes", "Depends", "TooManyRequests", "CACHES", "async"),
    *("tokens", "bandwidth", "other", "instances", "service", "redis", "memcached", "PermissionDenied", "f"),
}


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def without_blocks(page: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def rows(page: Path) -> Iterator[tuple[str, str]]:
    for row in re.findall(r"(?m)^\| (.*) \|$", without_blocks(page)):
        theirs, _, ours = row.partition(" | ")
        yield theirs, ours


def words(text: str) -> set[str]:
    """Return the names in a piece of code, without what is in its strings."""
    return set(re.findall(r"\b[A-Za-z_]\w*", re.sub(r"\"[^\"]*\"", "", text)))


@cache
def our_names() -> frozenset[str]:
    """Return the public names in the source of this library, whether or not what it integrates with is installed."""
    names = {*dir(builtins), "await", "if", "not", "lambda", *urls._DEFAULTS}
    names |= {*urls._SENTINEL_OPTIONS}
    for pattern in SOURCES:
        found = sorted((ROOT / "ratelimit").glob(pattern))
        assert found, pattern
        for path in found:
            names |= {path.stem, path.parent.name, *names_in(path)}
    return frozenset(name for name in names if not name.startswith("_"))


def names_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield name
            # Settings, variables of the environment, and the verbs that a class takes over.
            case ast.Constant(value=str(name)) if re.fullmatch(r"[A-Z][A-Z0-9_]+", name):
                yield name
            case _:
                pass


def is_ours(span: str, others: set[str]) -> bool:
    """Return whether a piece of code is a limit, a URL, a header field, a command or a name of this library."""
    if span in FIELDS or span.startswith("ratelimit "):  # commands are tried by tests/test_docs.py
        return True
    for url in re.findall(r"[a-z+]+://[^\"]*", span):
        urls._parsed(url)
        span = span.replace(url, "")
    if not span:
        return True
    try:
        parse(span)
    except InvalidConfigurationError:
        return words(span) <= our_names() | others
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_to_be_written_here_exists(page: Path) -> None:
    table = list(rows(page))
    assert len(table) > 20
    unknown = [span for _, ours in table for span in spans(ours) if not is_ours(span, OTHERS)]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_text_names_what_one_of_the_two_libraries_has(page: Path) -> None:
    foreign = "\n".join(re.findall(r"(?ms)^```(?:python before|java)\n(.*?)^```$", page.read_text()))
    theirs = words(foreign).union(*[words(span) for cell, _ in rows(page) for span in spans(cell)])
    text = re.sub(r"(?m)^\|.*$", "", without_blocks(page))
    unknown = [span for span in spans(text) if span[0] not in "/." and not is_ours(span, OTHERS | theirs)]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_setting_has_an_answer(page: Path) -> None:
    table = [row for row in rows(page) if set(row[0]) != {"-", "|"}]
    assert [theirs for theirs, ours in table if not ours.strip()] == []


def test_limits_in_examples_are_read() -> None:
    texts = [text for page in PAGES for _, ours in rows(page) for text in re.findall(r"\"(\d[^\"]*/[^\"]*)\"", ours)]
    assert len(texts) > 5
    for text in texts:
        if not re.fullmatch(r"[\d.]+/\d+", text):  # a network
            parse(text)


def test_the_index_names_each_page_and_version() -> None:
    table = re.findall(r"(?m)^\| .* \| (.*) \| \[.*\]\((coming-from/.*)\) \|$", INDEX.read_text())
    assert {ROOT / "docs" / path for _, path in table} == set(PAGES)
    for versions, path in table:
        page = (ROOT / "docs" / path).read_text()
        for version in re.findall(r"\d+\.\d+\.\d+", versions):
            assert version in page, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_there_is_an_example_before_and_after(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"(?m)^```(python before|java)$", text)
    assert re.search(r"(?m)^[\[\w].* # -> ", text)


@pytest.mark.parametrize(
    ("span", "is_one"),
    [
        ("try_consume(tokens)", True),
        ("OnError.ALLOW", True),
        ("RATELIMIT_URL", True),
        ("100/5 minutes", True),
        ("redis+cluster://localhost:7000", True),
        ("tryConsume(tokens)", False),
        ("RATELIMIT_STORAGE_URI", False),
        ("storage_uri=", False),
        ("100/fortnight", False),
    ],
)
def test_a_name_that_is_not_ours_is_found(span: str, is_one: bool) -> None:
    assert is_ours(span, OTHERS) is is_one
