"""The op registry: every operation a graph may name. Importing it registers all families."""

from . import (  # noqa: F401
    activations,
    arithmetic,
    comparison,
    complexes,
    convolution,
    copying,
    creation,
    einops_ops,
    equations,
    functional,
    indexing,
    joining,
    linalg,
    losses,
    products,
    reduction,
    selecting,
    shaping,
    sorting,
    unary,
)
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
