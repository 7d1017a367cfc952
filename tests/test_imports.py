"""Who may import whom (the table in docs/architecture.md), and what `import pellucid` leaves alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "client": "pellucid",
    "server": "pellucid_server",
    "shared": "pellucid_shared",
    "worker": "pellucid_worker",
}
#: Package -> which of ours it may import anywhere, and which inside functions only.
OURS: dict[str, tuple[set[str], set[str]]] = {
    "pellucid_shared": (set(), set()),
    "pellucid": ({"pellucid_shared"}, {"pellucid_worker"}),
    "pellucid_server": ({"pellucid_shared"}, set()),
    "pellucid_worker": ({"pellucid_shared"}, set()),
}
#: The same for third parties of the base install.
THIRD: dict[str, tuple[set[str], set[str]]] = {
    "pellucid_shared": ({"pydantic"}, {"numpy", "safetensors", "ml_dtypes"}),
    "pellucid": ({"click"}, {"numpy", "httpx", "rich", "torch", "einops"}),
}
#: Modules of the client that are imported only once the package they are for is known to be there.
SIDES = {"client/pellucid/_tensor.py": {"torch"}, "client/pellucid/_einops.py": {"einops"}}


def sources(package: str) -> list[Path]:
    folder = next(f for f, p in PACKAGES.items() if p == package)
    return sorted((ROOT / folder / package).rglob("*.py"))


def imports(tree: ast.AST, *, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether it is inside a function) of every import; those for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], inside
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], inside
        deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, inside=deeper)


@pytest.mark.parametrize("package", sorted(OURS))
def test_each_package_imports_only_what_it_may_of_ours(package: str) -> None:
    anywhere, inside_only = OURS[package]
    for path in sources(package):
        for name, inside in imports(ast.parse(path.read_text())):
            if name in PACKAGES.values() and name != package:
                allowed = anywhere | (inside_only if inside else set())
                assert name in allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", sorted(THIRD))
def test_the_base_install_imports_only_its_dependencies(package: str) -> None:
    anywhere, inside_only = THIRD[package]
    for path in sources(package):
        side = SIDES.get(str(path.relative_to(ROOT)), set())
        for name, inside in imports(ast.parse(path.read_text())):
            if name in sys.stdlib_module_names or name in PACKAGES.values():
                continue
            allowed = anywhere | side | (inside_only if inside else set())
            assert name in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_server_never_imports_torch() -> None:
    for path in sources("pellucid_server"):
        names = {name for name, _ in imports(ast.parse(path.read_text()))}
        assert not names & {"torch", "transformers", "accelerate"}, path


def test_importing_pellucid_imports_none_of_the_heavy_packages() -> None:
    heavy = ["numpy", "httpx", "rich", "torch", "transformers", "accelerate", "safetensors", "einops"]
    code = f"import sys, pellucid; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_client_reads_no_variables_and_no_source_of_its_caller() -> None:
    for path in sources("pellucid"):
        text = path.read_text()
        for trick in ("f_locals", "f_globals", "settrace", "setprofile", "getsource", "pickle", "ctypes"):
            assert trick not in text, f"{path.relative_to(ROOT)} contains {trick}"


def test_no_package_runs_text_or_reads_pickles() -> None:
    calls = re.compile(r"(?<![\w.])(exec|eval|__import__)\(|\b(f_locals|settrace|setprofile|getsource)\b")
    for package in PACKAGES.values():
        for path in sources(package):
            text = path.read_text()
            assert not re.search(
                r"\b(import|from) +(cloud|c)?pickle|\bpickle\.|torch\.load\(|\bmarshal\b", text
            ), path
            assert package != "pellucid" or not calls.search(text), path


def test_the_public_names_are_there() -> None:
    import pellucid

    for name in pellucid.__all__:
        assert getattr(pellucid, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pellucid.nothing
