"""A resident model that runs graphs, one at a time. No HTTP, no Redis, no Celery."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pellucid_shared.card import ModelCard
from pellucid_shared.check import check, require_room
from pellucid_shared.errors import EmptyPromptError, InputError
from pellucid_shared.flat import split
from pellucid_shared.graph import Graph
from pellucid_shared.lint import lint
from pellucid_shared.packing import WireTensor
from pellucid_shared.wire import TokenizedInvoke

from .compile import compile_graph
from .emit import Runtime
from .inputs import rows
from .interleave import Notify, Run
from .plan import Plan
from .probe import probe
from .tensors import from_wire

_PLANS_KEPT = 256
#: Literals are checked by shape and dtype, and the plan of a graph depends on its sizes.
_Key = tuple[str, tuple[tuple[int, int], ...]]


class Engine:
    """A model in memory, its card, and its tokenizer.

    Attributes:
        model: a transformers model in evaluation mode; its weights are never changed.
        card: what probing the model found.
        tokenizer: the transformers tokenizer, or None.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, card: ModelCard) -> None:
        self.model, self.tokenizer, self.card = model, tokenizer, card
        self._lock = threading.Lock()
        self._plans: OrderedDict[_Key, tuple[Plan, Runtime]] = OrderedDict()

    @staticmethod
    def from_model(model: torch.nn.Module, tokenizer: Any = None, *, id: str, source: str = "") -> Engine:
        """Probe a loaded transformers model, which is put into evaluation mode."""
        model.eval()
        return Engine(
            model, tokenizer, probe(model, id=id, source=source, has_tokenizer=tokenizer is not None)
        )

    @property
    def tokenizer_json(self) -> str | None:
        """The text of tokenizer.json, where the tokenizer is a fast one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())

    def run(
        self,
        graph: Graph,
        inputs: Sequence[TokenizedInvoke],
        tensors: Mapping[str, WireTensor],
        *,
        cancelled: threading.Event | None = None,
        notify: Notify | None = None,
    ) -> dict[str, Any]:
        """Run a graph; waits for its turn.

        Args:
            inputs: ids of each invoke, trace after trace.
            tensors: the literals the graph names, by digest.
            cancelled: set it to end the run at the next touched site or step.
            notify: told of tokens as they are chosen ("token") and of what the graph logs ("log"); called in
                the thread that runs.

        Returns:
            Saved structures by name, in program order; tensors are on the CPU, contiguous, with memory of
            their own.

        Raises:
            GraphError: the graph does not fit the model; ``node`` is set.
            InputError: the ids do not fit the model.
            ExecutionError: an op failed; ``node`` is set.
            JobCancelledError: ``cancelled`` was set.
        """
        self._check_inputs(graph, inputs)
        with self._lock, torch.no_grad():
            plan, runtime = self._plan(graph, inputs, tensors)
            device = next(self.model.parameters()).device
            literals = {name: from_wire(tensors[name]).to(device) for name in plan.literals}
            own = list(split(plan.flat, [rows(invoke, self._pad, device) for invoke in inputs]))
            samplers = [[_generator(device, t.seed) for _ in t.invokes] for t in plan.flat.traces]
            run = Run(self.model, plan, own, literals, samplers, cancelled, notify)
            runtime.apply, runtime.device, runtime.model = run.apply, device, self.model
            runtime.generators = [_generator(device, t.seed) for t in plan.flat.traces]
            try:
                saved = run.execute()
            finally:
                del runtime.apply  # the plan is kept; the run and its tensors are not
        return {name: saved[name] for name in graph.save_names().values() if name in saved}

    @property
    def _pad(self) -> int:
        config: Any = self.model.config
        return getattr(config, "pad_token_id", None) or 0

    def _plan(
        self, graph: Graph, inputs: Sequence[TokenizedInvoke], tensors: Mapping[str, WireTensor]
    ) -> tuple[Plan, Runtime]:
        sizes = tuple(invoke.size for invoke in inputs)
        key = (graph.sha256, sizes)
        found = self._plans.pop(key, None)
        if found is None or not found[0].literals.keys() <= tensors.keys():
            lint(graph)
            checked = check(graph, self.card, sizes, {name: t.spec for name, t in tensors.items()})
            runtime = Runtime()
            found = compile_graph(checked, self.card, runtime), runtime
        self._plans[key] = found
        if len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        return found

    def _check_inputs(self, graph: Graph, inputs: Sequence[TokenizedInvoke]) -> None:
        traces = [trace for trace in graph.traces for _ in trace.invokes]
        count = len(traces)
        if count != len(inputs):
            raise InputError(f"the graph has {count} invokes and {len(inputs)} inputs were given")
        for index, invoke in enumerate(inputs):
            if not invoke.ids or not all(invoke.ids):
                raise EmptyPromptError(f"invoke {index} is empty: give it text or at least one token id")
            if invoke.mask is not None and not _masks(invoke.mask, invoke.ids):
                raise InputError(
                    f"invoke {index}: a mask is rows of 0 and 1 with a 1 in each, as long as the rows of ids"
                )
            worst = max(max(row) for row in invoke.ids)
            lowest = min(min(row) for row in invoke.ids)
            if worst >= self.card.vocab_size or lowest < 0:
                wrong = worst if lowest >= 0 else lowest
                raise InputError(
                    f"token id {wrong} is not in the vocabulary of {self.card.id}, which has "
                    f"{self.card.vocab_size}"
                )
            require_room(index, invoke.size[1], traces[index], self.card)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _masks(mask: list[list[int]], ids: list[list[int]]) -> bool:
    """Whether a mask fits its rows of ids."""
    return [len(row) for row in mask] == [len(row) for row in ids] and all(
        1 in row and set(row) <= {0, 1} for row in mask
    )
