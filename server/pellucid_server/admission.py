"""From the bytes of a request to a job that will run, or the reason why not. Pure; no Redis, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pellucid_shared.check import check, require_room
from pellucid_shared.errors import EmptyPromptError, InputError, RequestError
from pellucid_shared.graph import Graph, Invoke, loads
from pellucid_shared.lint import lint
from pellucid_shared.packing import WireTensor
from pellucid_shared.wire import TokenizedInvoke

from .deployments import Model


@dataclass(frozen=True, slots=True)
class Admitted:
    """A job as it goes into the record."""

    graph: Graph
    inputs: tuple[TokenizedInvoke, ...]


def read_graph(body: bytes) -> Graph:
    """The graph in a request's JSON, linted.

    Raises:
        RequestError: the JSON is not ``{"graph": {...}}``.
        GraphError, LimitError, EmptyPromptError: what is wrong with the graph; ``node`` names the node.
    """
    request = loads(body)
    if not isinstance(request, dict) or set(request) != {"graph"}:
        found = sorted(request) if isinstance(request, dict) else type(request).__name__
        raise RequestError(f'a request is {{"graph": {{...}}}}, found {str(found)[:80]}')
    graph = Graph.from_object(request["graph"])
    lint(graph)
    return graph


def admit(graph: Graph, model: Model, tensors: Mapping[str, WireTensor]) -> Admitted:
    """Tokenize the inputs and check the graph against the model's card.

    Raises:
        InputError: text for a model without tokenizer, ids out of the vocabulary, more tokens than fit.
        GraphError: it does not fit; ``node`` names the node.
    """
    invokes = [(trace, invoke) for trace in graph.traces for invoke in trace.invokes]
    if any(invoke.tensors is not None for _, invoke in invokes):
        raise InputError(
            f"this graph calls a torch module with tensors, which runs in its user's process only; "
            f"{model.card.id} takes text or token ids"
        )
    inputs = tuple(tokenized(i, invoke, model) for i, (_, invoke) in enumerate(invokes))
    for index, ((trace, _), own) in enumerate(zip(invokes, inputs, strict=True)):
        require_room(index, own.size[1], trace, model.card)
    sizes = [invoke.size for invoke in inputs]
    check(graph, model.card, sizes, {name: tensor.spec for name, tensor in tensors.items()})
    return Admitted(graph, inputs)


def tokenized(index: int, invoke: Invoke, model: Model) -> TokenizedInvoke:
    """One invoke as ids, within the model's bounds."""
    rows = _rows(invoke, model)
    card = model.card
    if not all(rows):
        raise EmptyPromptError(f"invoke {index} is empty: its text has no tokens")
    for row in rows:
        wrong = next((i for i in row if not 0 <= i < card.vocab_size), None)
        if wrong is not None:
            raise InputError(
                f"token id {wrong} is not in the vocabulary of {card.id}, which has {card.vocab_size}"
            )
    return TokenizedInvoke(ids=rows, mask=invoke.mask)


def _rows(invoke: Invoke, model: Model) -> list[list[int]]:
    value: Sequence[Any] = [invoke.input] if isinstance(invoke.input, str) else invoke.input
    if isinstance(value[0], str):
        return model.encode(list(value))
    return [list(value)] if isinstance(value[0], int) else [list(row) for row in value]
