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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from pellucid_shared.card import ModelCard
from pellucid_shared.check import Scene, Size, check_flat, check_node, require_room
from pellucid_shared.errors import InputError, PellucidError, RecordingError, ValueNotReadyError
from pellucid_shared.flat import Flat, flatten
from pellucid_shared.graph import GET, GRAD, LOG, Each, Generation, Graph, Invoke, Node, Trace
from pellucid_shared.lint import lint
from pellucid_shared.ops import Alias, Cost, lookup
from pellucid_shared.packing import WireTensor, digest
from pellucid_shared.regions import Cond, Loop, Outside, above, closing
from pellucid_shared.specs import Spec, TensorSpec
from pellucid_shared.storage import Timeline, aliased, timeline
from pellucid_shared.values import Site, TensorRef

from ._files import Experiment
from ._inputs import Prompt, check_ids
from ._lines import at_users_line, users_line
from ._target import Target

if TYPE_CHECKING:
    from ._any_model import Model
    from ._edit import Edit
    from ._model import LanguageModel
    from ._tracer import Session
    from ._whole import WholeBatch

#: The invoke that a site names in a body over the whole batch; no node has it.
WHOLE = -1

#: Two unlike sets of placeholders: a spec that is the same under both depends on no token count.
_FIRST_PRIME, _OTHER_PRIME = 10_007, 20_011

#: Spec, bound arguments and cost of a node.
Checked: TypeAlias = "tuple[Spec, dict[str, Any] | None, Cost]"

#: The recorder of the trace this thread (or task) is in.
_ACTIVE: ContextVar[Recorder | None] = ContextVar("pellucid_recorder", default=None)


@dataclass(slots=True)
class OpenTrace:
    """A trace as it is written.

    Attributes:
        start: position of its first prompt among all of the job.
        prompts: one per invoke.
    """

    start: int
    generation: Generation | None
    seed: int
    parent: int | None = None
    prompts: list[Prompt] = field(default_factory=list)

    def region(self) -> Trace:
        return Trace(tuple(prompt.invoke for prompt in self.prompts), self.generation, self.seed, self.parent)


class Recorder:
    """One job being written: a trace, or the traces of a session.

    Attributes:
        model: name of the model, as the graph gives it.
        target: where the trace will run.
        owner: the LanguageModel whose modules may be used.
        nodes: the nodes so far, in program order.
        lines: the user's ``file:line`` of each node.
        literals: the tensors the nodes name, by digest.
        regions: the traces, and the bodies inside and around them, as they are opened.
        region: index of the region that nodes are now written in; None between the traces of a session.
        session_loop: index of the loop around traces that is open, or None.
        closed_branches: region -> the branch inside it that was closed last, where another may continue it.
        invoke: index of the invoke whose body is being written, or None between bodies.
        step: step of generation that sites name now, counted from that of the body; ``next()`` raises it.
        steps_ahead: the same for single modules, by path.
        saved: position of each ``save`` node -> the user's value or structure.
        adopted: the user's own tensors that were written with values.
        last_set: position of the last ``site.set`` of each site.
        last_grad_set: position of the last ``grad.set`` of each (node, backward pass).
        backward: number of the backward pass whose block is being written, or None outside one.
        unread: structures of each (trace, module, kind, invoke, step) whose members may not be read yet.
        save_names: name of each saved value -> position of its ``save`` node.
        session: the session it belongs to, or None.
        skimmed: the user's line that went through all steps of a loop and wrote nothing in any, or None.
        tracks: whether gradients passed what was written when recording began.
        lost: nodes that were saved in a step or a branch that did not run -> why they have no value.
        endings: what is still to be read when the body that is being written ends.
        tuple_outputs: blocks that return a tensor are seen as returning a tuple of one (``compat.py``).
        edits: what is written at the head of each body.
        whole: the bodies over the whole batch, once there is one.
    """

    def __init__(self, model: str, target: Target, owner: object) -> None:
        self.model = model
        self.target = target
        self.owner = owner
        self.nodes: list[Node] = []
        self.lines: list[str] = []
        self.literals: dict[str, WireTensor] = {}
        self.regions: list[OpenTrace | Each | Cond | Loop | Outside] = []
        self.region: int | None = None
        self.session_loop: int | None = None
        self.closed_branches: dict[int, int] = {}
        self.invoke: int | None = None
        self.step = 0
        self.steps_ahead: dict[str, int] = {}
        self.saved: dict[int, Any] = {}
        self.adopted: list[Any] = []
        self.last_set: dict[tuple[int, Site], int] = {}
        self.last_grad_set: dict[tuple[int, int], int] = {}
        self.backward: int | None = None
        self.unread: dict[tuple[Any, ...], weakref.WeakSet[Any]] = {}
        self.save_names: dict[str, int] = {}
        self.session: Session | None = None
        self.skimmed: str | None = None
        self.lost: dict[int, str] = {}
        self.endings: list[Callable[[], None]] = []
        self.tuple_outputs = False
        self.edits: tuple[Edit, ...] = ()
        self.whole: WholeBatch | None = None
        self.tracks = True
        self._backwards: list[tuple[int, int | None, int]] = []  # per pass its trace, invoke and node
        self._literal_specs: dict[str, TensorSpec] = {}
        self._specs: list[Spec] = []
        self._bounds: list[dict[str, Any] | None] = []
        self._other_specs: list[Spec] = []
        self._sized: dict[int, list[tuple[int, int]]] = {}
        self._scenes: dict[tuple[int, int], Scene] = {}
        self._closed: str | None = None
        self._refuted: PellucidError | None = None

    @property
    def card(self) -> ModelCard:
        return self.target.card

    # --- regions -------------------------------------------------------------------------------------------

    def open_trace(self, generation: Generation | None = None, seed: int = 0) -> None:
        """Begin a trace: nodes and prompts from here on are its own."""
        self.require_open()
        self.regions.append(OpenTrace(len(self.prompts), generation, seed, self.session_loop))
        self.region, self.invoke = len(self.regions) - 1, None

    def close_trace(self) -> None:
        """End the trace that is being written."""
        self.region = self.invoke = None

    def open_steps(self, steps: int | list[int] | slice, *, optional: bool = False) -> None:
        """Begin a body for steps of the trace's generation.

        Raises:
            RecordingError: the trace does not generate, or such a body is open.
        """
        trace = self.current_trace()
        if isinstance(self.here, Cond | Loop):
            raise RecordingError(
                "steps of generation cannot be opened inside a branch or a loop; open the steps first and "
                "write the branch or loop inside them",
                where=users_line(),
            )
        if isinstance(self.here, Each):
            raise RecordingError(
                "a body for steps of generation cannot be opened inside another", where=users_line()
            )
        if trace.generation is None:
            raise RecordingError(
                "a trace is one forward pass and has no steps; generate with "
                "`with model.generate(prompt, max_new_tokens=n):`",
                where=users_line(),
            )
        self.regions.append(Each(self.regions.index(trace), steps, optional))
        self.region = len(self.regions) - 1

    def require_steps(self) -> None:
        """Raise RecordingError where steps of a generation cannot be named at all."""

    def close_steps(self) -> None:
        """End the body for steps."""
        if isinstance(self.here, Each):
            self.region = self.here.parent

    def open_region(self, region: Cond | Loop) -> int:
        """Begin a branch or a loop; its index."""
        self.regions.append(region)
        opened = len(self.regions) - 1
        if self.region is None:
            self.session_loop = opened
        else:
            self.region = opened
        return opened

    def close_region(self) -> int:
        """End the branch or loop that is being written; its index."""
        closed = self.session_loop if self.region is None else self.region
        assert closed is not None
        region = self.regions[closed]
        assert isinstance(region, Cond | Loop)
        self.closed_branches = {k: v for k, v in self.closed_branches.items() if k != closed}
        if self.region is None:
            self.session_loop = region.parent if isinstance(self.regions[region.parent], Loop) else None
        else:
            self.region = region.parent
        return closed

    def current_region(self) -> int:
        """Index of the region inside a trace, or of the loop around traces, that is being written.

        Raises:
            RecordingError: the code stands between the traces of a session, in no loop.
        """
        self.require_open()
        if self.region is None and self.session_loop is not None:
            return self.session_loop
        self.current_trace()
        assert self.region is not None
        return self.region

    def loop_parent(self) -> int:
        """What a loop that is opened here stands in: between the traces of a session, the session."""
        if self.session is None or self.region is not None or self.session_loop is not None:
            return self.current_region()
        self.require_open()
        found = next((i for i, region in enumerate(self.regions) if isinstance(region, Outside)), None)
        if found is None:
            self.regions.append(Outside())
            found = len(self.regions) - 1
        return found

    def repeats(self) -> int:
        """In how many bodies that run several times the code stands, one inside another."""
        region = self.session_loop if self.region is None else self.region
        found = () if region is None else closing(self.regions, region)
        return sum(not isinstance(self.regions[r], Cond) for r in found)

    def ground(self) -> int | None:
        """Index of the trace, or of the body for steps, that is being written."""
        return None if self.region is None else self.ground_of(self.region)

    def ground_of(self, region: int) -> int | None:
        """Index of the trace, or of the body for steps, that a region is or stands in."""
        around = above(self.regions, region)
        return next((r for r in around if isinstance(self.regions[r], OpenTrace | Each)), None)

    @property
    def here(self) -> OpenTrace | Each | Cond | Loop | Outside | None:
        """The region that is being written."""
        return None if self.region is None else self.regions[self.region]

    def current_trace(self) -> OpenTrace:
        """The trace that is being written.

        Raises:
            RecordingError: the code stands between the traces of a session.
        """
        self.require_open()
        if self.region is None:
            raise RecordingError(
                "a site belongs to a trace: read and write it under `with model.trace(prompt):`",
                where=users_line(),
            )
        return self._trace(self.region)

    def has_input(self) -> bool:
        """Whether the trace that is being written has an input."""
        return self.region is not None and bool(self._trace(self.region).prompts)

    def trace_index(self) -> int:
        """Index of the region of the trace that is being written."""
        return self.regions.index(self.current_trace())

    def step_of(self, module: str) -> int:
        """The step that a site of a module names now, as the graph has it."""
        return self.step + self.steps_ahead.get(module, 0)

    def phase_of(self, module: str) -> int:
        """The same, counted from the prefill; of a body for several steps, the first of them."""
        return self.step_of(module) + self._first_step(self.region)

    def scene(self, region: int, start: int | None = None) -> Scene:
        """What sites in a region are seen in; unknown token counts are primes from ``start`` on."""
        trace, start = self._trace(region), start or _FIRST_PRIME
        known = self._scenes.get((trace.start, start))
        if known is None or len(known.sizes) != len(trace.prompts):
            sizes = self._sizes(start)[trace.start : trace.start + len(trace.prompts)]
            known = self._scenes[trace.start, start] = Scene(trace.region(), sizes)
        return known

    def _trace(self, region: int) -> OpenTrace:
        around = (self.regions[r] for r in above(self.regions, region))
        found = next((r for r in around if isinstance(r, OpenTrace)), None)
        return found or next(reversed(self._traces()), OpenTrace(0, None, 0))

    def _first_step(self, region: int | None) -> int:
        around = () if region is None else above(self.regions, region)
        found = next((self.regions[r] for r in around if isinstance(self.regions[r], Each)), None)
        if not isinstance(found, Each):
            return 0
        generation = self._trace(found.parent).generation
        assert generation is not None
        return next(iter(found.of(generation.max_new_tokens)), 0)

    # --- writing -------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of every trace, in order."""
        return [prompt for trace in self._traces() for prompt in trace.prompts]

    def _traces(self) -> list[OpenTrace]:
        return [region for region in self.regions if isinstance(region, OpenTrace)]

    def add_prompt(self, prompt: Prompt) -> int:
        """Add an invoke to the trace; its index. Texts are tokenized at once where that costs no trip.

        Raises:
            InputError: an id the model's vocabulary does not have, text for a model without tokenizer, or
                more tokens than the model takes.
        """
        trace = self.current_trace()
        if prompt.tokens is None and not self.card.has_tokenizer:
            raise InputError(f"{self.model} has no tokenizer; give it token ids instead of text")
        if prompt.chats is not None:
            prompt.rendered(self.target.render(prompt.chats))
        if prompt.tokens is None and not self.target.distant:
            prompt.tokenized(self.target.tokenize(prompt.texts))
        self._require_fit(len(trace.prompts), prompt, trace)
        trace.prompts.append(prompt)
        self.step, self.steps_ahead = 0, {}
        return len(trace.prompts) - 1

    def add(self, op: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
        """Record a node whose arguments are graph values; its position.

        Raises:
            GraphError: it does not fit; ``where`` is the user's line.
            ValueNotReadyError: the trace has ended.
        """
        self.require_open()
        if args and isinstance(args[0], Site) and args[0].invoke == WHOLE:
            raise RecordingError(
                f"{replace(args[0], invoke=0)} is of one input, and this body is over the whole batch: write "
                "it under `with tracer.invoke(prompt):`",
                where=users_line(),
            )
        region = self._between() if self.region is None else self.region
        node, line = Node(op, tuple(args), kwargs or {}, region), users_line()
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

    def count_backward(self) -> int:
        """The number of the backward pass whose node was just added."""
        trace = self._trace_region(self.nodes[-1].region)
        self._backwards.append((trace, self.invoke, len(self.nodes) - 1))
        return len(self._backwards) - 1

    def backward_of(self, value: int) -> int:
        """The number of the backward pass that ``.grad`` of a node means here: that of the block it is in;
        else the last one written in this trace, unless that was in the body of another invoke and before the
        value; else the next."""
        if self.backward is not None:
            return self.backward
        count = len(self._backwards)
        if not count:
            return 0
        trace, invoke, node = self._backwards[-1]
        here = self._trace_region(self._between() if self.region is None else self.region)
        elsewhere = invoke != self.invoke and value > node
        return count if trace != here or elsewhere else count - 1

    def _trace_region(self, region: int) -> int:
        around = above(self.regions, region)
        return next((r for r in around if isinstance(self.regions[r], OpenTrace)), region)

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
        self.current_trace()
        if self.skimmed is not None:
            raise RecordingError(
                f"the steps of tracer.iter[...] were gone through at {self.skimmed} with nothing written in "
                "any. Sites name a step only inside the loop: use them under `for step in tracer.iter[...]:`",
                where=users_line(),
            )
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

    @property
    def tells(self) -> bool:
        """Whether anything is to come of a run."""
        return bool(self.saved) or any(node.op == LOG for node in self.nodes)

    def shows(self, node: int, site: Site) -> bool:
        """Whether a node's value is the very tensor that is at the site now."""
        made = self.nodes[node]
        trace = self.trace_index()
        same = made.op == GET and made.site == site and made.region == self.region
        return same and node > self.last_set.get((trace, site), -1)

    def is_seen(self, node: int) -> bool:
        """Whether a node's value may be used here: it was not made inside a branch or a body left since."""
        here = () if self.region is None else above(self.regions, self.region)
        return set(closing(self.regions, self.nodes[node].region)) <= set(here)

    @contextlib.contextmanager
    def outside_branches(self, region: int | None) -> Iterator[None]:
        """Inside, nodes are written in a region around this one, where only branches lie between."""
        here, own = self.region, set() if self.region is None else set(above(self.regions, self.region))
        between = own - (set() if region is None else set(above(self.regions, region)))
        if region in own and all(isinstance(self.regions[r], Cond) for r in between):
            self.region = region
        try:
            yield
        finally:
            self.region = here

    def in_branch(self, node: int) -> bool:
        """Whether a node stands in a branch."""
        return any(isinstance(self.regions[r], Cond) for r in above(self.regions, self.nodes[node].region))

    def is_view(self, node: int) -> bool:
        """Whether the value of a registry node shares the storage of what it was made from."""
        bound = self._bounds[node]
        return bound is not None and lookup(self.nodes[node].op).alias_of(bound) is Alias.VIEW

    def source_of(self, node: int) -> int | None:
        """The node whose storage a node's value lies in, or may lie in; None where it has its own."""
        bound = self._bounds[node]
        source, alias = (None, Alias.FRESH) if bound is None else aliased(self.nodes[node], bound)
        return None if alias is Alias.FRESH else source

    def spec_at(self, value: int | TensorRef) -> Spec:
        """The spec of a node, or of a tensor of the user's."""
        return self._literal_specs[value.digest] if isinstance(value, TensorRef) else self._specs[value]

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

    def prompt_of(self, node: int) -> Prompt:
        """The prompt that a site's value belongs to."""
        made = self.nodes[node]
        return self._trace(made.region).prompts[made.site.invoke]

    def spec_of(self, node: Node, specs: Sequence[Spec], prompt: Prompt, size: Size) -> Spec:
        """The spec a node would have after nodes of these specs, if a prompt had that size."""
        trace = self._trace(node.region)
        scene = self.scene(node.region)
        sizes = [size if own is prompt else s for own, s in zip(trace.prompts, scene.sizes, strict=True)]
        return self._check_in(node, specs, Scene(scene.trace, sizes))[0]

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
        pending = [
            (trace, i, prompt)
            for trace in self._traces()
            for i, prompt in enumerate(trace.prompts)
            if prompt.tokens is None
        ]
        with at_users_line():
            ids = self.target.tokenize([text for *_, prompt in pending for text in prompt.texts])
        for trace, index, prompt in pending:
            count = len(prompt.texts)
            with at_users_line():
                prompt.tokenized(ids[:count])
                self._require_fit(index, prompt, trace)
            ids = ids[count:]
            assert prompt.ids is not None
            prompt.invoke = Invoke(prompt.ids[0] if isinstance(prompt.invoke.input, str) else prompt.ids)
        self._sized.clear()
        self._scenes.clear()
        self._specs, self._bounds, self._other_specs = [], [], []
        for node, line in zip(self.nodes, self.lines, strict=True):
            try:
                spec, bound, _ = self._check(node, self._specs, _FIRST_PRIME)
            except PellucidError as error:
                error.where = error.where or line
                self.refute(error)
                raise
            self._specs.append(spec)
            self._bounds.append(bound)

    def _require_fit(self, index: int, prompt: Prompt, trace: OpenTrace) -> None:
        """Raise InputError unless what is known of a prompt, and what it generates, fit the model."""
        check_ids(prompt, self.card)
        if prompt.tokens is not None:
            require_room(index, prompt.tokens, trace.region(), self.card)

    def _sizes(self, start: int) -> list[tuple[int, int]]:
        """(batch, tokens) of each invoke, primes from ``start`` on in place of unknown counts."""
        if start not in self._sized or len(self._sized[start]) != len(self.prompts):
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
                node_there = self.nodes[len(self._other_specs)]
                spec, _, _ = self._check(node_there, self._other_specs, _OTHER_PRIME)
            self._other_specs.append(spec)
        return self._other_specs[node]

    def _check_exactly(self, node: Node) -> Checked:
        """Check a new node; an error found under placeholders counts only if true sizes confirm it."""
        try:
            return self._check(node, self._specs, _FIRST_PRIME)
        except PellucidError:
            if not self.unsized:
                raise
        self.resolve()
        return self._check(node, self._specs, _FIRST_PRIME)

    def _check(self, node: Node, specs: Sequence[Spec], start: int) -> Checked:
        return self._check_in(node, specs, self.scene(node.region, start))

    def _check_in(self, node: Node, specs: Sequence[Spec], scene: Scene) -> Checked:
        first = self._first_step(node.region)
        if first and node.at is not None:
            node = replace(node, args=(replace(node.at, step=node.at.step + first), *node.args[1:]))
        return check_node(node, specs, self.card, scene, self._literal_specs)

    def _between(self) -> int:
        """Index of the region of what is written between the traces of a session: the loop around it, the
        trace begun last, or where all of them are in loops, the session."""
        if self.session_loop is not None:
            return self.session_loop
        traces = [i for i, r in enumerate(self.regions) if isinstance(r, OpenTrace) and r.parent is None]
        sessions = [i for i, r in enumerate(self.regions) if isinstance(r, Outside)]
        if not traces and not sessions:
            raise RecordingError(
                "a session's first value comes from a trace: open `with model.trace(prompt):` first",
                where=users_line(),
            )
        return (traces or sessions)[-1]

    # --- ending --------------------------------------------------------------------------------------------

    def finish(self) -> tuple[Graph, Flat, Timeline]:
        """The whole graph, the same written out step by step, and the order its nodes can run in.

        Raises:
            GraphError: a write that cannot reach the model, or a body that does not fit one of its steps;
                ``where`` is the user's line.
        """
        self.require_open()
        graph = self.graph()
        try:
            lint(graph)
            flat = flatten(graph)
            if len(flat.nodes) == len(self.nodes) and flat.origin == tuple(range(len(self.nodes))):
                return graph, flat, timeline(flat, self.card, self._bounds)
            return graph, flat, self._check_steps(flat)
        except PellucidError as error:
            raise self.at_users_line(error) from None

    def _check_steps(self, flat: Flat) -> Timeline:
        """Check bodies in each of their steps; as for one node, an error counts if true sizes confirm it."""
        try:
            return self._checked(flat)
        except PellucidError:
            if not self.unsized:
                raise
        self.resolve()
        return self._checked(flat)

    def _checked(self, flat: Flat) -> Timeline:
        own = {r.start: self.scene(i) for i, r in enumerate(self.regions) if isinstance(r, OpenTrace)}
        scenes = [own[start] for start in flat.starts]
        return check_flat(flat, self.card, scenes, self._literal_specs).timeline

    def graph(self) -> Graph:
        """The graph as written so far."""
        regions = tuple(r.region() if isinstance(r, OpenTrace) else r for r in self.regions)
        return Graph(self.model, regions, tuple(self.nodes))

    def experiment(self) -> Experiment:
        """The graph with the literals it names."""
        graph = self.graph()
        return Experiment(graph, {digest: self.literals[digest] for digest in sorted(graph.literals())})

    def close(self, reason: str) -> None:
        """End the trace; ``reason`` says why its values cannot be used any more."""
        self._closed = reason
        self.saved, self.adopted = {}, []  # the literals stay: they are part of the experiment

    def suspend(self, reason: str) -> None:
        """End the writing; the saved values wait for their results, and ``reason`` says for what."""
        self._closed = reason

    def refute(self, error: PellucidError) -> None:
        """The trace cannot be mended by catching this error: whatever is asked of it raises it again."""
        self._refuted = error

    def require_open(self, value: object = "this value") -> None:
        """Raise ValueNotReadyError once the trace has ended, and again the error that true sizes showed."""
        if self._closed is not None:
            raise self.not_ready(value)
        if self._refuted is not None:
            raise self._refuted

    def not_ready(self, value: object) -> ValueNotReadyError:
        """The error for asking for a value that is not there."""
        lost = self.lost.get(getattr(value, "_node", -1))
        if lost is not None:
            return ValueNotReadyError(f"{value} has no value: {lost}", where=users_line())
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
        if self.whole is not None and (site := self.whole.site_of(node)) is not None:
            return f"{site} of the whole batch"
        made = self.nodes[node]
        first = made.args[0] if made.args else None
        if made.op == GRAD:
            return f"{self.describe(made.args[0].node)}.grad"
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


def session_of(owner: LanguageModel | Model) -> Session | None:
    """The session of a model that this thread is in, between two of its traces."""
    recorder = _ACTIVE.get()
    if recorder is None or not owner._is_of(recorder.owner) or recorder.region is not None:
        return None
    return recorder.session


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
            "a trace or session cannot be opened inside another; give an open trace a further input with "
            "tracer.invoke(), and an open session a further trace with session.trace()",
            where=users_line(),
        )
    return _ACTIVE.set(recorder)


def enter_edit(recorder: Recorder) -> Token[Recorder | None]:
    """The same for an edit, which may stand in a session, between its traces.

    Raises:
        RecordingError: inside a trace, or another edit.
    """
    outer = _ACTIVE.get()
    if outer is not None and (outer.session is None or outer.region is not None):
        raise RecordingError(
            "an edit is not made inside a trace or another edit: write `with model.edit():` outside of it",
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
