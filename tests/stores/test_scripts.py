"""Scripts are put together from their parts, and lose on the way nothing but what a server does not need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ratelimit.stores.operations import Operation
from ratelimit.stores.redis.scripts import load, without_comments

LUA = Path(__file__).parents[2] / "lua"
SCRIPTS = sorted(path.stem for path in LUA.glob("*.lua") if "-- KEYS" in path.read_text())
DECIDE = load("decide").text.decode()


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_server_is_sent_has_no_comment_and_no_include(name: str) -> None:
    text = load(name).text.decode()
    assert "--" not in text
    assert not re.search(r"^\s|\s$", text, re.MULTILINE)


def test_every_part_stands_in_a_script() -> None:
    parts = {path.stem for path in LUA.glob("*.lua")} - set(SCRIPTS)
    assert parts
    texts = [path.read_text() for path in LUA.glob("*.lua")]
    included = [name for text in texts for name in re.findall(r"^ *-- include: (\w+)$", text, re.MULTILINE)]
    assert parts <= set(included)
    # A line that is meant to include, and does not, would be dropped as a comment.
    assert sum(text.count("-- include:") for text in texts) == len(included)


@pytest.mark.parametrize("operation", Operation)
def test_each_operation_has_its_number_and_its_function(operation: Operation) -> None:
    name = operation.name.lower()
    assert DECIDE.count(f"local function {name}(") == 1
    assert f"[{operation.value}] = {name}" in DECIDE
    constants, numbers = DECIDE.split("\n")[0].removeprefix("local ").split(" = ")
    assert dict(zip(constants.split(", "), map(int, numbers.split(", ")), strict=True))[operation.name] == operation


@pytest.mark.parametrize("path", sorted(LUA.glob("*.lua")), ids=lambda path: path.stem)
def test_no_string_and_no_comment_of_a_script_goes_over_lines(path: Path) -> None:
    assert not re.search(r"\[=*\[|--\[|\\$", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("-- a header\n\nreturn 1\n", "return 1"),
        ("if x then\n  -- why\n  return 1  -- why not\nend\n", "if x then\nreturn 1\nend"),
        ("return '--' .. \"--\" -- both\n", "return '--' .. \"--\""),
        ("return '\\'--', \"\\\"--\" -- '\n", "return '\\'--', \"\\\"--\""),
        ("return '\\\\' -- '\n", "return '\\\\'"),
        ("return 1 - -1\n", "return 1 - -1"),
        ("return '  a  b '\n", "return '  a  b '"),
    ],
)
def test_comments_are_dropped_and_strings_stay(text: str, left: str) -> None:
    assert without_comments(text) == left
