"""The input of a torch module: the tensors its forward is called with, in the user's process only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import GraphError
from .values import TensorRef, Value, decode, encode


@dataclass(frozen=True, slots=True)
class TensorInput:
    """What a module is called with: ``module(*args, **kwargs)``.

    Attributes:
        args, kwargs: tensors by digest, and tuples, lists and dicts of them.
    """

    args: tuple[Value, ...] = ()
    kwargs: Mapping[str, Value] = field(default_factory=dict)

    def digests(self) -> Iterator[str]:
        """The digest of every tensor, in order, with repeats."""
        for value in (*self.args, *self.kwargs.values()):
            yield from _digests(value)

    def encode(self) -> dict[str, Any]:
        """Its JSON form."""
        data: dict[str, Any] = {"args": [encode(v) for v in self.args]} if self.args else {}
        if self.kwargs:
            data["kwargs"] = {k: encode(v) for k, v in self.kwargs.items()}
        return data

    @staticmethod
    def decode(data: Any) -> TensorInput:
        """The input whose JSON form is ``data``.

        Raises:
            GraphError: it is none, or holds something else than tensors.
        """
        if not isinstance(data, dict) or not data or set(data) - {"args", "kwargs"}:
            raise GraphError("the tensors of an invoke are an object of args and kwargs")
        args, kwargs = data.get("args", []), data.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(data.values()):
            raise GraphError(
                "the args of an invoke are a list and its kwargs an object; what is empty is left out"
            )
        found = TensorInput(tuple(map(decode, args)), {str(decode(k)): decode(v) for k, v in kwargs.items()})
        if not list(found.digests()):
            raise GraphError("the tensors of an invoke hold at least one")
        return found


def _digests(value: Value) -> Iterator[str]:
    if isinstance(value, TensorRef):
        yield value.digest
    elif isinstance(value, tuple | list):
        for member in value:
            yield from _digests(member)
    elif isinstance(value, dict):
        for member in value.values():
            yield from _digests(member)
    else:
        raise GraphError(f"an input of tensors holds tensors, found {value!r:.60}")
