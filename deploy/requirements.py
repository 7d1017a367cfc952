"""Print what pyproject.toml says that pellucid and one of its extras need, one requirement a line."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib


def needs(pyproject: str, extra: str) -> list[str]:
    """The requirements of the base install and of an extra."""
    project = tomllib.loads(pyproject)["project"]
    return [*project["dependencies"], *project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print(*needs(Path("pyproject.toml").read_text(), sys.argv[1]), sep="\n")
