"""What a trace has written so far: nodes, their specs, the user's line of each, and the literals they name.

Specs are inferred as nodes are recorded, so that a mistake is raised at the line that made it. How many
tokens a text has is not known before the tokenizer is asked, and for a server that is a trip. Until then
a prime stands for it; an error found under a prime, or a size that depends on one, asks for the true count
and infers again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, TypeAlias

from pellucid_shared.card import ModelCard
from pellucid_shared.check import check_node
from pellucid_shared.errors import InputError, PellucidError, RecordingError, ValueNotReadyError
from pellucid_shared.graph import GET, Graph, Invoke, Node, Trace
from pellucid_shared.lint import lint
from pellucid_shared.ops import Alias, Cost, lookup
from pellucid_shared.packing import WireTensor, digest
from pellucid_shared.specs import Spec, TensorSpec
from pellucid_shared.storage import Timeline, timeline
from pellucid_shared.values import Site, TensorRef

from ._inputs import Prompt, check_ids
from ._lines import at_users_line, users_line
from ._target import Target

#: Two unlike sets of placeholders: a spec that is the same under both depends on no token count.
_FIRST_PRIME, _OTHER_PRIME = 10_007, 20_011

#: Spec, bound arguments and cost of a node.
Checked: TypeAlias = "tuple[Spec, dict[str, Any] | None, Cost]"

#: The recorder of the trace this thread (or task) is in.
_ACTIVE: ContextVar[Recorder | None] = ContextVar("pellucid_recorder", default=None)


class Recorder:
    """One trace being written.

    Attributes:
        model: name of the model, as the graph gives it.
        target: where the trace will run.
        owner: the LanguageModel whose modules may be used.
        nodes: the nodes so far, in program order.
        lines: the user's ``file:line`` of each node.
        literals: the tensors the nodes name, by digest.
        prompts: one per invoke.
        invoke: index of the invoke whose body is being written, or None between bodies.
        saved: position of each ``save`` node -> the user's value or structure.
        adopted: the user's own tensors that were written with values.
        last_set: position of the last ``site.set`` of each site.
        unread: structures of each (module, kind, invoke) whose members may not be read yet.
        save_names: name of each saved value -> position of its ``save`` node.
        endings: what is still to be read when the body that is being written ends.
        tuple_outputs: blocks that return a tensor are seen as returning a tuple of one (``compat.py``).
    """

    def __init__(self, model: str, target: Target, owner: object) -> None:
        self.model = model
        self.target = target
        self.owner = owner
        self.nodes: list[Node] = []
        self.lines: list[str] = []
        self.literals: dict[str, WireTensor] = {}
        self.prompts: list[Prompt] = []
        self.invoke: int | None = None
        self.saved: dict[int, Any] = {}
        self.adopted: list[Any] = []
        self.last_set: dict[Site, int] = {}
        self.unread: dict[tuple[str, str, int], weakref.WeakSet[Any]] = {}
        self.save_names: dict[str, int] = {}
        self.endings: list[Callable[[], None]] = []
        self.tuple_outputs = False
        self._literal_specs: dict[str, TensorSpec] = {}
        self._specs: list[Spec] = []
        self._bounds: list[dict[str, Any] | None] = []
        self._other_specs: list[Spec] = []
        self._sized: dict[int, list[tuple[int, int]]] = {}
        self._closed: str | None = None
        self._refuted: PellucidError | None = None

    @property
    def card(self) -> ModelCard:
        return self.target.card

    # --- writing -------------------------------------------------------------------------------------------

    def add_prompt(self, prompt: Prompt) -> int:
        """Add an invoke; its index. Texts are tokenized at once where that costs no trip.

        Raises:
            InputError: an id the model's vocabulary does not have, text for a model without tokenizer, or
                more tokens than the model takes.
        """
        if prompt.tokens is None and not self.card.has_tokenizer:
            raise InputError(f"{self.model} has no tokenizer; give it token ids instead of text")
        if prompt.chats is not None:
            prompt.rendered(self.target.render(prompt.chats))
        self.prompts.append(prompt)
        if prompt.tokens is None and not self.target.distant:
            prompt.tokenized(self.target.tokenize(prompt.texts))
        check_ids(prompt, self.card)
        return len(self.prompts) - 1

    def add(self, op: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
        """Record a node whose arguments are graph values; its position.

        Raises:
            GraphError: it does not fit; ``where`` is the user's line.
            ValueNotReadyError: the trace has ended.
        """
        self.require_open()
        node, line = Node(op, tuple(args), kwargs or {}), users_line()
        try:
            spec, bound, _ = self._check_exactly(node)
        except PellucidError as error:
            error.where = error.where or line
            raise
        self.nodes.append(node)
        self.lines.append(line)
        self._specs.append(spec)
        self._bounds.append(bound)
        return len(self.nodes) - 1

    def add_literal(self, tensor: WireTensor) -> TensorRef:
        """Name a tensor of the user's; the same bytes are sent once."""
        name = digest(tensor)
        self.literals.setdefault(name, tensor)
        self._literal_specs[name] = tensor.spec
        return TensorRef(name)

    def current_invoke(self) -> int:
        """The invoke whose body is being written.

        Raises:
            RecordingError: the code stands between two bodies.
        """
        self.require_open()
        if self.invoke is None:
            raise RecordingError(
                "a site belongs to one input: read and write it under `with tracer.invoke(prompt):`",
                where=users_line(),
            )
        return self.invoke

    def end_invoke(self) -> None:
        """End the body that is being written: what was to be read at its end is read now."""
        endings, self.endings = self.endings, []
        try:
            for ending in endings:
                ending()
        finally:
            self.invoke = None

    def shows(self, node: int, site: Site) -> bool:
        """Whether a node's value is the very tensor that is at the site now."""
        made = self.nodes[node]
        return made.op == GET and made.site == site and node > self.last_set.get(site, -1)

    def is_view(self, node: int) -> bool:
        """Whether the value of a registry node shares the storage of what it was made from."""
        bound = self._bounds[node]
        return bound is not None and lookup(self.nodes[node].op).alias_of(bound) is Alias.VIEW

    # --- sizes ---------------------------------------------------------------------------------------------

    @property
    def unsized(self) -> bool:
        """Whether some invoke's token count is not known yet."""
        return any(prompt.tokens is None for prompt in self.prompts)

    def spec(self, node: int) -> Spec:
        """The spec of a node; sizes that depend on an unknown token count are placeholders."""
        return self._specs[node]

    def exact_spec(self, node: int) -> Spec:
        """The spec of a node with true sizes; asks the tokenizer where they depend on it."""
        if self.unsized and self.unknown_axes(node) != ():
            self.resolve()
        return self._specs[node]

    def exact_size(self, node: int, axis: int) -> int:
        """One size of a tensor; asks the tokenizer only where this one depends on it."""
        unknown = self.unknown_axes(node) if self.unsized else ()
        if unknown is None or axis in unknown:
            self.resolve()
        spec = self._specs[node]
        assert isinstance(spec, TensorSpec)
        return spec.shape[axis]

    def spec_of(self, node: Node, specs: Sequence[Spec], sizes: Sequence[tuple[int, int]]) -> Spec:
        """The spec a node would have after nodes of these specs, with these sizes of the invokes."""
        return self._check(node, specs, sizes)[0]

    def unknown_axes(self, node: int) -> tuple[int, ...] | None:
        """The axes of a tensor whose sizes depend on an unknown token count; None where the spec as a
        whole does."""
        spec, other = self._specs[node], self._other_spec(node)
        if isinstance(spec, TensorSpec) and isinstance(other, TensorSpec) and spec.ndim == other.ndim:
            return tuple(i for i, (a, b) in enumerate(zip(spec.shape, other.shape, strict=True)) if a != b)
        return () if spec == other else None

    def resolve(self) -> None:
        """Ask the tokenizer for every unknown count and infer every spec again.

        Raises:
            GraphError: with true sizes a node does not fit; ``where`` is its own line.
        """
        pending = [prompt for prompt in self.prompts if prompt.tokens is None]
        with at_users_line():
            ids = self.target.tokenize([text for prompt in pending for text in prompt.texts])
        for prompt in pending:
            count = len(prompt.texts)
            with at_users_line():
                prompt.tokenized(ids[:count])
                check_ids(prompt, self.card)
            ids = ids[count:]
            assert prompt.ids is not None
            prompt.invoke = Invoke(prompt.ids[0] if isinstance(prompt.invoke.input, str) else prompt.ids)
        self._sized.clear()
        self._specs, self._bounds, self._other_specs = [], [], []
        for node, line in zip(self.nodes, self.lines, strict=True):
            try:
                spec, bound, _ = self._check(node, self._specs, self._sizes(_FIRST_PRIME))
            except PellucidError as error:
                error.where = error.where or line
                self._refuted = error  # an earlier line is wrong: catching the error does not mend it
                raise
            self._specs.append(spec)
            self._bounds.append(bound)

    def _sizes(self, start: int) -> list[tuple[int, int]]:
        """(batch, tokens) of each invoke, primes from ``start`` on in place of unknown counts."""
        if len(self._sized.get(start, ())) != len(self.prompts):
            self._sized[start] = [
                (prompt.rows, prime if prompt.tokens is None else prompt.tokens)
                for prompt, prime in zip(self.prompts, _primes(start), strict=False)
            ]
        return self._sized[start]

    def _other_spec(self, node: int) -> Spec:
        """The spec of a node under the other placeholders, None where it cannot be inferred."""
        while len(self._other_specs) <= node:
            spec: Spec = None
            with contextlib.suppress(PellucidError):
                spec, _, _ = self._check(
                    self.nodes[len(self._other_specs)], self._other_specs, self._sizes(_OTHER_PRIME)
                )
            self._other_specs.append(spec)
        return self._other_specs[node]

    def _check_exactly(self, node: Node) -> Checked:
        """Check a new node; an error found under placeholders counts only if true sizes confirm it."""
        try:
            return self._check(node, self._specs, self._sizes(_FIRST_PRIME))
        except PellucidError:
            if not self.unsized:
                raise
        self.resolve()
        return self._check(node, self._specs, self._sizes(_FIRST_PRIME))

    def _check(self, node: Node, specs: Sequence[Spec], sizes: Sequence[tuple[int, int]]) -> Checked:
        return check_node(node, specs, self.card, sizes, self._literal_specs)

    # --- ending --------------------------------------------------------------------------------------------

    def finish(self) -> tuple[Graph, Timeline]:
        """The whole graph, and the order its nodes can run in.

        Raises:
            GraphError: a write that cannot reach the model; ``where`` is the user's line.
        """
        self.require_open()
        graph = self.graph()
        try:
            lint(graph)
            return graph, timeline(graph, self.card, self._bounds)
        except PellucidError as error:
            raise self.at_users_line(error) from None

    def graph(self) -> Graph:
        """The graph as written so far."""
        invokes = tuple(prompt.invoke for prompt in self.prompts)
        return Graph(self.model, (Trace(invokes),), tuple(self.nodes))

    def close(self, reason: str) -> None:
        """End the trace; ``reason`` says why its values cannot be used any more."""
        self._closed = reason
        self.literals, self.saved, self.adopted = {}, {}, []

    def require_open(self, value: object = "this value") -> None:
        """Raise ValueNotReadyError once the trace has ended, and again the error that true sizes showed."""
        if self._closed is not None:
            raise self.not_ready(value)
        if self._refuted is not None:
            raise self._refuted

    def not_ready(self, value: object) -> ValueNotReadyError:
        """The error for asking for a value that is not there."""
        reason = self._closed or "does not exist before the block ends; .save() it and use it after the block"
        return ValueNotReadyError(f"{value} {reason}", where=users_line())

    def at_users_line(self, error: PellucidError) -> PellucidError:
        """The error with the user's line of its node, where it names one."""
        if error.node is not None and error.node < len(self.lines) and error.where is None:
            error.where = self.lines[error.node]
        return error

    # --- showing -------------------------------------------------------------------------------------------

    def describe(self, node: int) -> str:
        """Where a value comes from: its site, or its op."""
        made = self.nodes[node]
        first = made.args[0] if made.args else None
        return str(first) if isinstance(first, Site) else made.op

    def show_spec(self, node: int) -> str:
        """Shape and dtype for people; a size that waits for the tokenizer is shown by name."""
        spec = self._specs[node]
        if not isinstance(spec, TensorSpec):
            return type(spec).__name__
        unknown = self.unknown_axes(node) if self.unsized else ()
        if unknown is None:
            return f"[?] {spec.dtype}"
        counts = [tokens for _, tokens in self._sizes(_FIRST_PRIME)]
        sizes = [
            ("tokens" if size in counts else "?") if axis in unknown else repr(size)
            for axis, size in enumerate(spec.shape)
        ]
        return f"[{', '.join(sizes)}] {spec.dtype}"


def active() -> Recorder:
    """The recorder of the trace this thread is in.

    Raises:
        RecordingError: it is in none.
    """
    recorder = _ACTIVE.get()
    if recorder is None:
        raise RecordingError(
            "this is recorded inside a trace, and none is open here: write it under `with model.trace(...):`",
            where=users_line(),
        )
    return recorder


def enter(recorder: Recorder) -> Token[Recorder | None]:
    """Make this the recorder of the thread's trace; the token ends it.

    Raises:
        RecordingError: a trace is open already.
    """
    if _ACTIVE.get() is not None:
        raise RecordingError(
            "a trace cannot be opened inside another; give the open one a further input with tracer.invoke()",
            where=users_line(),
        )
    return _ACTIVE.set(recorder)


def leave(token: Token[Recorder | None]) -> None:
    _ACTIVE.reset(token)


def recording() -> bool:
    """Whether this thread is in a trace."""
    return _ACTIVE.get() is not None


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """What this thread does inside is not part of its trace."""
    token = _ACTIVE.set(None)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _primes(start: int) -> Iterator[int]:
    number = start
    while True:
        if all(number % d for d in range(2, int(number**0.5) + 1)):
            yield number
        number += 1
