"""What the README and docs/ name is there: files, make targets, commands, variables, routes, problems."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pellucid._cli import main
from pellucid_server.app import create_app
from pellucid_server.settings import Settings
from pellucid_shared import errors

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_VARIABLE = re.compile(r"\bPELLUCID_[A-Z_]+\b")


def code(page: Path) -> Iterator[str]:
    """Every line of code of a page, and every code span in its prose."""
    text = page.read_text()
    for block in _FENCE.findall(text):
        yield from block.splitlines()[1:-1]
    prose = _FENCE.sub("", text)
    yield from (line for line in prose.splitlines() if line.startswith("    "))
    yield from _SPAN.findall(prose)


def named(page: Path, program: str) -> set[str]:
    """The words that follow a program's name where a line of code begins with it."""
    found = (re.match(rf"\s*(?:\$ )?{program} ([a-z][a-z-]*)", line) for line in code(page))
    return {match[1] for match in found if match}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    prose = _SPAN.sub("", _FENCE.sub("", page.read_text()))
    for link in _LINK.findall(prose):
        if not re.match(r"[a-z]+:", link):
            target = link.partition("#")[0]
            assert not target or (page.parent / target).is_file(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_and_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named(page, "make") <= targets
    commands = main.list_commands(main.make_context("pellucid", ["--help"], resilient_parsing=True))
    assert named(page, "pellucid") <= set(commands)


def test_what_is_named_is_found_at_all() -> None:
    assert {"demo", "test"} <= named(ROOT / "README.md", "make")
    assert {"up", "serve", "worker"} <= named(ROOT / "docs" / "self-hosting.md", "pellucid")


def test_self_hosting_names_every_variable_and_no_other() -> None:
    page = (ROOT / "docs" / "self-hosting.md").read_text()
    sources = [p for f in ("client", "server", "worker") for p in sorted((ROOT / f).rglob("*.py"))]
    read = set().union(*(_VARIABLE.findall(path.read_text()) for path in sources))
    example = set(re.findall(r"^(?:# )?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert example <= set(re.findall(r"\b[A-Z_]{3,}\b", page))
    assert set(_VARIABLE.findall(page)) == read | {name for name in example if name.startswith("PELLUCID_")}


def test_http_api_has_every_route_and_no_other(tmp_path: Path) -> None:
    app = create_app(Settings("unix:///nowhere", tmp_path.as_uri()))
    routes = {
        (method.upper(), re.sub(r"\{[^}]*\}", "{}", path))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    page = (ROOT / "docs" / "http-api.md").read_text()
    rows = re.findall(r"^\| `(GET|POST|DELETE|PUT|PATCH) (\S+)` \|", page, re.MULTILINE)
    assert {(method, re.sub(r"\{[^}]*\}", "{}", path)) for method, path in rows} == routes


def test_http_api_has_every_problem_a_server_sends() -> None:
    page = (ROOT / "docs" / "http-api.md").read_text()
    table = page[page.index("| type, after") :]
    rows: dict[str, str] = {}
    for names, status in re.findall(r"^\| (`.*?) \| (\d+) \|", table, re.MULTILINE):
        rows.update(dict.fromkeys(_SPAN.findall(names), status))
    classes: list[type[errors.PellucidError]] = [errors.PellucidError]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    known = {cls.slug: str(cls.status) for cls in classes if cls.__module__ == errors.__name__}
    #: Raised in the client alone, or by nothing yet.
    ours = {"unreachable", "value-not-ready", "recording", "missing-extra", "not-yet", "wait-timeout"}
    ours |= {"job-timeout", "not-exported"}
    assert rows == {slug: status for slug, status in known.items() if slug not in ours}


def test_the_site_lists_every_page() -> None:
    site: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [page for entry in site["nav"] for page in entry.values()]
    assert sorted(listed) == [page.name for page in DOCS]
