"""How Sphinx makes a site of README.md, docs/ and the docstrings: ``make docs``."""

import re
from importlib import metadata
from typing import Any

import django.conf
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain

# Django REST framework reads Django's settings when it is imported.
django.conf.settings.configure()

project = "ratelimit-redis"
version = release = metadata.version(project)
html_title = f"{project} {version}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_extra_path = ["site"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxarg.ext"]

# The sources begin at the root of the repository, so that links between pages lead to the same files as on GitHub.
root_doc = "docs/contents"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**", "examples/README.md", "benchmarks/*.md"]
# Directories are searched for pages unless they are named here.
exclude_patterns = [".*", "build", "dist", "lua", "ratelimit", "tests", "benchmarks/*/**", "examples/*/**"]
myst_heading_anchors = 3

# The members of private base classes are shown, and those of these bases are not.
FOREIGN_BASES = ["APIException", "BaseException", "BaseThrottle", "Enum", "HTTPException", "dict", "tuple"]
autodoc_default_options = {"members": True, "inherited-members": ", ".join(FOREIGN_BASES)}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# The decorator of a fixture hides its docstring, and Celery's base class brings forty attributes of its own. Mocks do
# neither.
autodoc_mock_imports = ["celery", "pytest"]
# Signatures show these by name, not as the unions that they stand for.
ALIASES = [
    "AsyncLimitsOfKey",
    "Duration",
    "ErrorPolicy",
    "Key",
    "Limits",
    "LimitsOfKey",
    "RefundOn",
    "RpcLimits",
    "RuleLimits",
]
autodoc_type_aliases = dict(zip(ALIASES, ALIASES, strict=True))
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


def shorten(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, *parts: str | None) -> Any:
    # Sphinx 9.0 writes an alias in a union as the repr of its placeholder. The repr of a function that is a default
    # helps no reader.
    parts = tuple(part and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", part) for part in parts)
    return tuple(part and re.sub(r" = <[^<>]*>", " = ...", part) for part in parts)


def show_bases(_app: Sphinx, what: str, _name: str, error: Any, _options: Any, lines: list[str]) -> None:
    # `show-inheritance` would show private bases of other classes too.
    if what == "exception":
        lines += ["Subclass of " + ", ".join(f"``{base.__name__}``" for base in error.__bases__) + ".", ""]


def allow_foreign_names(_app: Sphinx, _domain: Any, node: Any) -> bool | None:
    target = node["reftarget"]
    is_private = target.rpartition(".")[2].startswith("_")
    return True if is_private or ("." in target and not target.startswith("ratelimit.")) else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", show_bases)
    app.connect("warn-missing-reference", allow_foreign_names)
    # Warn where a docstring refers to a name that is not in the reference. `nitpicky` would also warn of every private
    # type in a signature.
    for role in PythonDomain.roles.values():
        role.warn_dangling = True
