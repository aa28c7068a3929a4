"""README.md and docs/*.md tell the truth: examples run, commands exist, links lead somewhere.

Two conventions show results to readers and to this test. ``expression  # -> value`` shows the repr of a value. A block
of ``text`` right after one of ``python`` shows the error that the latter ends with. The blocks of a page are one
program, from top to bottom. A block of ``python fastapi`` needs that package: where it is missing, as in the
environment of ``make test``, the block is compiled and does not run. A block of ``python before`` shows code for
another library, which is not installed: it is compiled and never runs.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import textwrap
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import CodeType
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from ratelimit import Bucket, BucketConfiguration, InvalidConfigurationError, ProxyManager, cli, errors
from ratelimit.core.token_bucket import limit_text
from ratelimit.settings import Settings, SettingsByName
from ratelimit.stores.urls import _DEFAULTS, _POOL_DEFAULTS, FORMS, URL_VARIABLE
from tests.support.permissions import ACL_COMMANDS, ACL_COMMANDS_FOR_A_CLUSTER, ACL_COMMANDS_FOR_A_DATABASE
from tests.support.servers import RedisServer, ServerBinary
from tests.test_packaging import FLOORS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPERATIONS, LIMITS = ROOT / "docs/operations.md", ROOT / "docs/choosing-limits.md"
START, VERBS, INDEX = ROOT / "docs/getting-started.md", ROOT / "docs/verbs.md", ROOT / "docs/index.md"
CONTRIBUTING = ROOT / "docs/CONTRIBUTING.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
URL = "redis://localhost:6379/0"

SHOWN = re.compile(r"# -> (.*)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block.

    :param line: that of the page on which its code begins.
    :param error: what it ends with, as the block of text after it says.
    """

    page: Path
    line: int
    language: str
    needs: list[str]
    code: str
    error: str | None

    @classmethod
    def all_of(cls, page: Path) -> Iterator[Block]:
        text = page.read_text()
        for match in re.finditer(r"(?ms)^```(\w*)([^\n]*)\n(.*?)^```$(?=(?:\n\n```text\n(.*?)^```$)?)", text):
            language, needs, code, after = match.groups()
            yield cls(page, text.count("\n", 0, match.start(3)) + 1, language, needs.split(), code, after)


class Checked(ast.NodeTransformer):
    """Makes calls of ``shows(value, wanted, line)`` of the expressions whose value is shown."""

    def __init__(self, code: str) -> None:
        self.lines = code.splitlines()
        self.found: set[int] = set()

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        assert node.end_lineno
        comment = SHOWN.search(self.lines[node.end_lineno - 1])
        if not comment:
            return node
        self.found.add(node.end_lineno)
        call = ast.Call(
            ast.Name("shows", ast.Load()), [node.value, ast.Constant(comment[1]), ast.Constant(node.end_lineno)], []
        )
        return ast.copy_location(ast.fix_missing_locations(ast.Expr(ast.copy_location(call, node))), node)


def compiled(block: Block, code: str) -> tuple[CodeType, set[int]]:
    """The program, and the lines that show a value."""
    checked = Checked(code)
    tree = checked.visit(ast.parse(code))
    shown = {number for number, line in enumerate(code.splitlines(), 1) if "->" in line.partition("#")[2]}
    assert checked.found == shown, f"{name_of(block.page)}: a value is shown of what is not an expression"
    ast.increment_lineno(tree, block.line - 1)
    return compile(tree, name_of(block.page), "exec", dont_inherit=True), shown


def run(block: Block, names: dict[str, Any], redis_url: str) -> None:
    program, expected = compiled(block, block.code.replace(URL, redis_url))
    if "before" in block.needs or not all(importlib.util.find_spec(package) for package in block.needs):
        return
    seen: set[int] = set()

    def shows(value: object, wanted: str, line: int) -> None:
        seen.add(line)
        assert repr(value) == wanted, f"{name_of(block.page)}:{block.line + line - 1}"

    names["shows"] = shows
    try:
        exec(program, names)
    except AssertionError:
        raise
    except Exception as error:
        if block.error is None:
            raise
        assert "".join(traceback.format_exception_only(error)) == block.error
    else:
        assert block.error is None, f"{name_of(block.page)}:{block.line}: ends without the error that is shown"
    assert seen == expected, f"{name_of(block.page)}: a value is shown that was never computed"


def pages_with_examples(*, redis: bool) -> list[Path]:
    pages = [page for page in PAGES if any(block.language == "python" for block in Block.all_of(page))]
    return [page for page in pages if (URL in page.read_text()) is redis]


def check_examples(page: Path, redis_url: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in Block.all_of(page):
        if block.language == "python":
            run(block, names, redis_url)


@pytest.mark.redis
@pytest.mark.parametrize("page", pages_with_examples(redis=True), ids=name_of)
def test_examples_do_what_they_show(page: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, redis_url)  # where integrations look for it
    check_examples(page, redis_url)


@pytest.mark.parametrize("page", pages_with_examples(redis=False), ids=name_of)
def test_examples_without_redis_do_what_they_show(page: Path) -> None:
    check_examples(page, "")


@pytest.mark.parametrize(
    ("code", "error", "complaint"),
    [
        ("1 + 1  # -> 3\n", None, r"README.md:7"),
        ("if False:\n    1 + 1  # -> 2\n", None, "never computed"),
        ("x = 2  # -> 2\n", None, "not an expression"),
        ("1 + 1  # ->3\n", None, "not an expression"),
        ("1 / 0\n", "ZeroDivisionError: of another kind\n", "of another kind"),
        ("1 / 1\n", "ZeroDivisionError: division by zero\n", "ends without the error"),
    ],
)
def test_an_example_that_is_wrong_is_found(code: str, error: str | None, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        run(Block(README, 7, "python", [], code, error), {}, "")


def test_an_example_that_fails_is_found() -> None:
    with pytest.raises(ZeroDivisionError):
        run(Block(README, 7, "python", [], "1 / 0\n", None), {}, "")


def shell_commands() -> Iterator[list[str]]:
    for page in PAGES:
        for block in Block.all_of(page):
            if block.language == "sh":
                yield from map(shlex.split, block.code.splitlines())


def inline_commands(program: str) -> set[str]:
    texts = [page.read_text() for page in PAGES]
    return {command for text in texts for command in re.findall(rf"`{program} ([\w-]+)", text)}


def test_commands_of_make_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text()))
    named = {arguments[1] for arguments in shell_commands() if arguments[0] == "make"}
    assert named | inline_commands("make") <= targets
    assert {"demo", "test"} <= named


@pytest.mark.redis
def test_commands_of_the_command_line_work(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATELIMIT_URL", redis_url)
    statuses = [cli.main(arguments[1:]) for arguments in shell_commands() if arguments[0] == "ratelimit"]
    assert statuses == [0] * len(statuses)
    assert len(statuses) >= 4


def test_commands_that_are_named_exist() -> None:
    for command in inline_commands("ratelimit"):
        with pytest.raises(SystemExit) as ending:
            cli.main([command, "--help"])
        assert ending.value.code == 0, command


def test_no_other_programs_are_named() -> None:
    others = [arguments for arguments in shell_commands() if arguments[0] not in ("make", "ratelimit", "redis-cli")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert others == [["pip", "install", project["name"]]]
    assert f"\n## [{project['version']}]\n" in (ROOT / "CHANGELOG.md").read_text()


def without_blocks(page: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def slugs(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", without_blocks(page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tests_that_are_named_exist(page: Path) -> None:
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert not test or re.search(rf"def {test}\(", (ROOT / path).read_text()), test


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", without_blocks(page)):
        if link.startswith("https://"):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not fragment or fragment in slugs(target), link


def test_the_readme_can_be_read_at_once() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_index_leads_to_every_page() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", INDEX.read_text())
    linked = {(INDEX.parent / link).resolve() for link in links}
    assert linked >= {page for page in PAGES if page not in (README, INDEX)}


def test_the_picture_of_a_decision_names_the_layers_in_their_order() -> None:
    picture = ET.parse(ROOT / "docs/decision.svg")
    names = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "name"]
    assert names[:7] == ["manager", "listener", "on_error", "local decisions", "coalescing", "swapping", "Redis"]


def additions() -> dict[str, list[str]]:
    """Return the files that each kind of addition touches, as the page for contributors lists them."""
    sections = re.split(r"(?m)^## (Add .*)\n", CONTRIBUTING.read_text())[1:]
    tables = [section.split("\n## ")[0] for section in sections[1::2]]
    return {title: re.findall(r"(?m)^\| `(.*?)` \|", table) for title, table in zip(sections[::2], tables, strict=True)}


def test_an_addition_touches_six_files_at_most_and_they_exist() -> None:
    listed = additions()
    assert len(listed) == 5
    for title, paths in listed.items():
        assert 1 <= len(paths) <= 6, title
        assert all((ROOT / path).is_file() or "<name>" in path for path in paths), title
        assert all((ROOT / path).parent.is_dir() for path in paths), title


def test_the_order_of_the_rooms_is_that_of_the_imports() -> None:
    rooms = "\n".join(", ".join(floor) for floor in FLOORS)
    assert f"```text\n{rooms}\n```" in CONTRIBUTING.read_text()


def test_the_grammar_is_that_of_the_parser() -> None:
    assert limit_text.__doc__
    _, grammar, words = re.split(r"::\n\n|\n\n(?=Words)", limit_text.__doc__)
    assert f"```\n{textwrap.dedent(grammar)}\n```\n\n{words}" in LIMITS.read_text()


def test_what_other_libraries_write_is_read_or_refused_as_the_page_says() -> None:
    _, taken, refused, *_ = LIMITS.read_text().split("### What other libraries write")[1].split("|---|---|---|")
    rows = [re.findall(r"`([^`]+)`", row) for row in re.findall(r"(?m)^(\|.*)\|.*\|$", taken)][:-1]
    assert len(rows) == 8
    for *pasted, read in rows:
        assert {str(BucketConfiguration.parse(text.replace("\\|", "|"))) for text in pasted} == {read}
    rows = re.findall(r"(?m)^\| (`.*`) \| (`.*`) \|", refused)
    assert len(rows) == 8
    for texts, meant in rows:
        for text in re.findall(r"`([^`]+)`", texts):
            with pytest.raises(InvalidConfigurationError, match=f"write {meant.replace('`', '')}"):
                BucketConfiguration.parse(text)


def test_the_errors_are_those_of_the_library() -> None:
    assert errors.__doc__
    tree = errors.__doc__.split("::\n\n")[1].split("\n\n")[0]
    assert f"```text\n{textwrap.dedent(tree)}\n```" in VERBS.read_text()
    names = re.findall(r"\w+Error", tree)
    rows = set(re.findall(r"(?m)^\| `(\w+Error)`", OPERATIONS.read_text()))
    assert rows == set(names) - {"RateLimitError", "ValueError"}


def test_the_error_about_the_other_distribution_is_that_of_the_tripwire() -> None:
    with pytest.raises(ImportError) as caught:
        importlib.import_module("ratelimit.decorators")
    assert f"```text\nImportError: {caught.value}\n```" in START.read_text()


def test_the_verbs_are_those_of_a_bucket() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)(\(.*?\))` \|", VERBS.read_text())
    verbs = inspect.getmembers(Bucket, inspect.isfunction)
    assert dict(rows) == {name: signature(verb) for name, verb in verbs if not name.startswith("_")}


def signature(verb: Any) -> str:
    whole = inspect.signature(verb)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in whole.parameters.values()]
    parameters = [each for each in parameters if each.name != "timeout"]
    return str(inspect.Signature(parameters[1:]))


def test_the_reference_has_every_module_that_the_pages_import_from() -> None:
    imported = {name for page in PAGES for name in re.findall(r"(?m)^from (ratelimit[\w.]*) import ", page.read_text())}
    described = {
        name
        for page in ROOT.glob("docs/reference/*.rst")
        for name in re.findall(r"(?m)^\.\. automodule:: (\S+)$", page.read_text())
    }
    assert imported <= described


def test_the_urls_are_those_that_are_taken() -> None:
    rows = re.findall(r"(?m)^\| `(\w[\w+]*://.*?)` \|", OPERATIONS.read_text())
    assert tuple(rows) == FORMS


def test_the_options_and_settings_are_those_of_the_library() -> None:
    rows = dict(re.findall(r"(?m)^\| `([a-z_]+)` \| `?([\w.]+)", OPERATIONS.read_text()))
    options = {name: "on" if value is True else f"{value:g}" for name, value in {**_DEFAULTS, **_POOL_DEFAULTS}.items()}
    assert rows == options | {name: rows[name] for name in SettingsByName.__annotations__}
    defaults = {each.name: str(each.default) for each in fields(Settings)}
    plain = ["configuration_version", "inheritance", "recovery", "merging", "max_attempts"]
    assert {name: rows[name] for name in plain} == {name: defaults[name] for name in plain}
    assert rows["memory_limit_bytes"] == str(int(defaults["memory_limit_bytes"]) // 2**20)


def test_the_permissions_are_those_that_are_tested() -> None:
    match = re.search(r"(?m)^```\n(\+.*)\n```$", OPERATIONS.read_text())
    assert match
    permissions = match[1]
    assert set(permissions.split()) == {f"+{command}" for command in ACL_COMMANDS}
    assert f"`{permissions}`" in START.read_text()
    (example,) = [arguments for arguments in shell_commands() if "ACL" in arguments]
    assert [argument for argument in example if argument.startswith("+")] == permissions.split()
    for commands in (ACL_COMMANDS_FOR_A_DATABASE, ACL_COMMANDS_FOR_A_CLUSTER):
        more = " ".join(f"+{command}" for command in commands).replace("|", "\\|")  # as a table has it
        assert f" | `{more}` |" in OPERATIONS.read_text()


@pytest.mark.redis
def test_the_permissions_suffice(server_binary: ServerBinary) -> None:
    (example,) = [arguments for arguments in shell_commands() if "ACL" in arguments]
    with RedisServer.start(server_binary) as server:
        with server.client() as client:
            client.execute_command(*example[1:])
        url = f"redis://limiter:secret@{server.host}:{server.port}/0"
        with ProxyManager.from_url(url, "3/hour", prefix="limits:") as manager:
            assert [manager.try_consume("user:42") for _ in range(4)] == [True, True, True, False]
            manager.remove("user:42")
            assert manager.configuration("user:42") is None
