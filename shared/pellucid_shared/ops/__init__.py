"""The op registry: every operation a graph may name. Importing it registers all families."""

from . import arithmetic, comparison, unary  # noqa: F401
from .registry import (
    REQUIRED,
    Alias,
    Cost,
    Kind,
    Op,
    Param,
    all_ops,
    lookup,
)

__all__ = ["REQUIRED", "Alias", "Cost", "Kind", "Op", "Param", "all_ops", "lookup"]
