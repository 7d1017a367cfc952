"""The command line: quick help, one line where an extra or a server is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pellucid import _cli
from pellucid_shared import __version__


def run(*arguments: str, **env: str) -> Result:
    return CliRunner(env={"PELLUCID_HOST": "", **env}).invoke(_cli.main, arguments)


def test_help_lists_every_command_and_loads_none() -> None:
    code = (
        "import sys\nfrom pellucid._cli import main\ntry: main(['--help'])\nfinally: "
        "print([n for n in ('pellucid_server', 'pellucid_worker', 'httpx', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    listed = lines[lines.index("Commands:") + 1 : -1]
    assert [line.split()[0] for line in listed] == sorted(
        ("cancel", "diff", "export", "models", "run", "serve", "show", "status", "up", "whoami", "worker")
    )
    assert all(len(line.split()) > 2 for line in listed), "each has a line that says what it does"


def test_version() -> None:
    assert run("--version").output == f"pellucid, version {__version__}\n"


def test_a_command_whose_extra_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: EntryPoint) -> Any:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    monkeypatch.setattr(EntryPoint, "load", absent)
    for name, extra in (("up", "server"), ("serve", "server"), ("worker", "worker")):
        result = run(name, "x=y")
        assert result.exit_code == 2
        wanted = f"pellucid {name} needs the {extra} part (fastapi is not installed): "
        assert result.stderr == f"{wanted}pip install 'pellucid[{extra}]'\n"


def test_an_extra_missed_only_when_the_command_runs_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # importing it raises, as if it were not installed
    result = run("serve")
    assert result.exit_code == 2
    assert "needs the server part (uvicorn is not installed)" in result.stderr


def test_a_module_of_ours_that_is_missing_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pellucid_server.app", None)
    assert isinstance(run("serve").exception, ModuleNotFoundError)


def test_asking_without_a_server_says_how_to_name_one() -> None:
    result = run("models")
    assert result.exit_code == 1
    assert result.stderr == "Error: no server is named: set PELLUCID_HOST to its URL, or give --host\n"


def test_a_server_that_does_not_answer_is_one_line() -> None:
    result = run("whoami", PELLUCID_HOST="http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "no server answers at http://127.0.0.1:9" in result.stderr
    assert result.stderr.count("\n") == 1
