"""Generated arguments for each op: arithmetic, comparison, reduction, creation, complex, activations.

``STRATEGIES`` maps an op id to a strategy of ``(args, kwargs)`` as a graph node would hold them, with a
``TensorSpec`` wherever a tensor stands and ``DType``/``Device`` for dtypes and devices. Arguments that torch
refuses belong in it too: rule and torch must refuse the same ones.

``STRICTER`` maps an op id to the reason why its rule refuses some calls that torch takes.
``META_ONLY`` and ``REAL_ONLY`` name the ops compared on meta tensors alone (values decide whether torch
raises) or on real tensors alone (torch has no meta kernel, or none that checks its arguments).
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Call = tuple[tuple[Any, ...], dict[str, Any]]

STRATEGIES: dict[str, SearchStrategy[Call]] = {}
STRICTER: dict[str, str] = {}
META_ONLY: set[str] = set()
REAL_ONLY: set[str] = set()
