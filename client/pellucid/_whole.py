"""``with tracer.invoke():`` a body over the whole batch: the invokes before it, seen as one.

A site read there is composed of what the invokes have: each padded on the left to the longest, rows one after
another. What is assigned is taken apart again. An edit in place of a composed value is carried on to each
invoke's own tensor, with the pads left out, so that it reaches the model as an edit of one invoke does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pellucid_shared.card import TensorLeaf, leaves
from pellucid_shared.errors import RecordingError, ShapeError, SiteError
from pellucid_shared.graph import GET, Each
from pellucid_shared.specs import TensorSpec, same_size
from pellucid_shared.values import RESULT, Ref, Site, TensorRef

from ._call import graph_value, value_of
from ._inputs import Prompt
from ._lines import users_line
from ._recorder import WHOLE, OpenTrace, Recorder
from ._value import Value

#: What a value is made of: rows of (batch, tokens) in one axis, or a batch axis and any axes of tokens.
Layout: TypeAlias = "tuple[int, tuple[int, ...], bool]"


@dataclass(slots=True)
class Part:
    """One invoke's place in a composed value.

    Attributes:
        invoke: its index in the trace.
        start, stop: its rows.
        missing: how many tokens it is padded by.
        tokens: how many it has.
    """

    invoke: int
    start: int
    stop: int
    missing: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class Reading:
    """A composed value.

    Attributes:
        node: the node that has its value.
        gets: of each part, the node that reads it from the model.
        overtaken: where one invoke's own tensor was edited by another name since, the line of that.
    """

    site: Site
    layout: Layout
    parts: list[Part]
    node: int
    gets: list[int]
    overtaken: str | None = None


class WholeBatch:
    """The bodies over a whole batch of one job.

    Attributes:
        count: how many invokes the body that is being written is about.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._readings: dict[int, Reading] = {}  # node that allocates a composed value -> what it is
        self._latest: dict[tuple[int | None, Site, int], Reading] = {}
        self.count = 0

    # --- reading -------------------------------------------------------------------------------------------

    def read(self, site: Site, leaf: TensorLeaf) -> Any:
        """The composed value of a site of every invoke.

        Raises:
            SiteError: it has no batch axis, so that the invokes' values cannot stand one after another.
            RecordingError: a body for several steps whose prompts are of unequal lengths.
        """
        found = self._current(site)
        if found is None:
            layout = self._layout(site, leaf)
            found = self._compose(site, layout, self._parts(site, layout), self._fill(leaf))
        return value_of(self._recorder, found.node)

    def read_result(self, site: Site) -> Any:
        """The ids every generation ends with."""
        generation = self._trace.generation
        if generation is None or generation.eos_token_id != ():
            raise RecordingError(
                "how many ids each input ends with is known only to the run where a token may end a row: "
                "read tracer.result in each invoke, or generate with eos_token_id=[]",
                where=users_line(),
            )
        layout: Layout = (0, (1,), False)
        pad = generation.pad_token_id
        fill = self._pad_id if pad is None else pad
        return value_of(self._recorder, self._compose(site, layout, self._parts(site, layout), fill).node)

    def _current(self, site: Site) -> Reading | None:
        """What the site was read as, as long as it is still that."""
        found = self._latest.get((self._recorder.region, site, self.count))
        if found is None or found.overtaken is not None:
            return None
        trace, sets = self._recorder.trace_index(), self._recorder.last_set
        replaced = any(
            sets.get((trace, replace(site, invoke=part.invoke)), -1) > get
            for part, get in zip(found.parts, found.gets, strict=True)
        )
        return None if replaced else found

    def _compose(self, site: Site, layout: Layout, parts: list[Part], fill: int) -> Reading:
        recorder, (batch, tokens, flat) = self._recorder, layout
        gets = [recorder.add(GET, (replace(site, invoke=part.invoke),)) for part in parts]
        padded: list[Ref] = []
        for part, get in zip(parts, gets, strict=True):
            node = get
            if flat:
                node = recorder.add("tensor.view", (Ref(node), (part.rows, part.tokens, *self._rest(get))))
            if part.missing and tokens:
                ndim = self._spec(node).ndim
                pads = [part.missing * (axis in tokens) for axis in range(min(tokens), ndim)]
                amounts = tuple(n for pad in reversed(pads) for n in (pad, 0))
                named = {"value": fill} if fill else {}
                node = recorder.add("torch.nn.functional.pad", (Ref(node), amounts), named)
            padded.append(Ref(node))
        root = node = recorder.add("torch.cat", (padded, batch) if batch else (padded,))
        if flat:
            node = recorder.add("tensor.view", (Ref(root), (-1, *self._rest(gets[0]))))
        found = self._readings[root] = Reading(site, layout, parts, node, gets)
        self._latest[recorder.region, site, self.count] = found
        return found

    # --- writing -------------------------------------------------------------------------------------------

    def taken_apart(self, site: Site, leaf: TensorLeaf, value: Any) -> Iterator[tuple[Site, Any]]:
        """Each invoke's site and what is to be written there.

        Raises:
            ShapeError: a tensor that has not the shape of the whole batch.
        """
        recorder, found = self._recorder, self._current(site)
        if found is not None and isinstance(value, Value) and value.ref(recorder).node == found.node:
            return  # it was edited in place, and is there
        layout = self._layout(site, leaf)
        parts = self._parts(site, layout)
        given = graph_value(value, recorder)
        if isinstance(given, Ref | TensorRef):
            self._require_shape(site, leaf, parts, given)
        for part in parts:
            piece: Any = value
            if isinstance(given, Ref | TensorRef):
                piece = value_of(recorder, self._piece(given, layout, part))
            yield replace(site, invoke=part.invoke), piece

    def require_editable(self, target: Value) -> None:
        """Raise RecordingError where ``target`` is a composed value that an edit by another name overtook."""
        found = self._readings.get(self._root(target._node))
        if found is not None and found.overtaken is not None:
            raise RecordingError(
                f"{_named(found.site)} was read before one invoke's own value of it was edited, at "
                f"{found.overtaken}; read it again for the whole batch, and edit that",
                where=users_line(),
            )

    def edited(self, target: Value) -> None:
        """Carry an edit in place on to the invokes' own tensors."""
        recorder, root = self._recorder, self._root(target._node)
        found = self._readings.get(root)
        if found is None:
            for reading in self._readings.values():
                own = {recorder.nodes[get].site for get in reading.gets}
                made = recorder.nodes[root]
                if (
                    made.op == GET
                    and made.site in own
                    and recorder.ground_of(made.region)
                    == recorder.ground_of(recorder.nodes[reading.gets[0]].region)
                ):
                    reading.overtaken = users_line()
            return
        for part, get in zip(found.parts, found.gets, strict=True):
            piece = self._piece(Ref(found.node), found.layout, part)
            recorder.add("setitem", (Ref(get), Ellipsis, Ref(piece)))

    def _piece(self, value: Ref | TensorRef, layout: Layout, part: Part) -> int:
        """One invoke's rows and tokens of a whole value."""
        recorder, (batch, tokens, flat) = self._recorder, layout
        source: Ref | TensorRef = value
        rest: tuple[int, ...] = ()
        if flat:
            rest = self._spec(value).shape[1:]
            source = Ref(recorder.add("torch.reshape", (value, (-1, part.missing + part.tokens, *rest))))
        index: list[Any] = [slice(None)] * (1 + max((batch, *tokens)))
        index[batch] = slice(part.start, part.stop)
        for axis in tokens:
            index[axis] = slice(part.missing or None, None)
        node = recorder.add("getitem", (source, tuple(index)))
        return recorder.add("torch.reshape", (Ref(node), (-1, *rest))) if flat else node

    def _require_shape(self, site: Site, leaf: TensorLeaf, parts: list[Part], given: Any) -> None:
        wanted = leaf.spec(parts[-1].stop, parts[0].missing + parts[0].tokens)
        assert wanted is not None
        spec = self._spec(given)
        if spec.ndim != wanted.ndim or not all(map(same_size, spec.shape, wanted.shape)):
            raise ShapeError(
                f"{_named(site)} of the whole batch has shape {list(wanted.shape)} and was given a value of "
                f"shape {list(spec.shape)}; a replacement must have the site's shape (edit a part with "
                "[...] = value)",
                where=users_line(),
            )

    def site_of(self, node: int) -> str | None:
        """The site that a node composes, or None."""
        return next((_named(r.site) for r in self._readings.values() if r.node == node), None)

    # --- tokens --------------------------------------------------------------------------------------------

    def prompt_of(self, nodes: list[int]) -> Prompt | None:
        """The batch as one prompt, if these nodes make up a value of it; its rows' ids are known."""
        found = next((self._readings[n] for n in nodes if n in self._readings), None)
        if found is None:
            return None
        recorder = self._recorder
        prompts = [recorder.prompt_of(get) for get in found.gets]
        if any(prompt.ids is None for prompt in prompts):
            recorder.resolve()
        longest = max(prompt.tokens or 0 for prompt in prompts)
        ids: list[list[int]] = []
        mask: list[list[int]] = []
        for prompt in prompts:
            for (start, stop), row in zip(prompt.windows(), prompt.ids or [], strict=True):
                missing = longest - (prompt.tokens or 0)
                bits = [0] * (missing + start) + [1] * (stop - start)
                mask.append(bits + [0] * (longest - len(bits)))
                ids.append([0] * (longest - len(row)) + row)
        return Prompt(replace(prompts[0].invoke, input=ids, mask=mask), len(ids), longest, ids)

    # --- what a body is about ------------------------------------------------------------------------------

    @property
    def _trace(self) -> OpenTrace:
        return self._recorder.current_trace()

    @property
    def _pad_id(self) -> int:
        return int(self._recorder.card.config.get("pad_token_id") or 0)

    def _fill(self, leaf: TensorLeaf) -> int:
        """What stands where there is no token: the pad token among ids, zeros elsewhere."""
        root = self._recorder.card.call_index.get(("", 0))
        ids = root and next(
            (p for _, p in leaves(root.structure("input")) if isinstance(p, TensorLeaf)), None
        )
        same = ids and leaf.dtype == ids.dtype and leaf.object is not None and leaf.object == ids.object
        return self._pad_id if same else 0

    def _layout(self, site: Site, leaf: TensorLeaf) -> Layout:
        shape: tuple[Any, ...] = leaf.shape or ()
        if shape[:1] == ("rows",) and all(isinstance(size, int) for size in shape[1:]):
            return 0, (1,), True
        if shape.count("batch") == 1 and "rows" not in shape:
            return shape.index("batch"), tuple(i for i, s in enumerate(shape) if s == "tokens"), False
        raise SiteError(
            f"{_named(site)} is {leaf} and has no batch axis, so the invokes' values of it are not one; "
            "use it in the body of an invoke",
            where=users_line(),
        )

    def _parts(self, site: Site, layout: Layout) -> list[Part]:
        _, tokens, flat = layout
        prompts = self._trace.prompts[: self.count]
        if tokens and any(prompt.tokens is None for prompt in prompts):
            self._recorder.resolve()
        longest = max(prompt.tokens or 0 for prompt in prompts)
        parts: list[Part] = []
        for invoke, prompt in enumerate(prompts):
            start, own = parts[-1].stop if parts else 0, prompt.tokens or 0
            parts.append(Part(invoke, start, start + prompt.rows, longest - own, own))
        here = self._recorder.here
        uneven = flat or any(part.missing for part in parts)
        if isinstance(here, Each) and tokens and uneven and site.kind != RESULT:
            generation = self._trace.generation
            assert generation is not None
            if len(here.of(generation.max_new_tokens)) > 1:
                raise RecordingError(
                    f"{_named(site)} has every token in step 0 and one in the others, and these prompts are "
                    "not of one length: write `with tracer.iter[0]:` and `with tracer.iter[1:]:`",
                    where=users_line(),
                )
        return parts

    def _spec(self, value: int | Ref | TensorRef) -> TensorSpec:
        spec = self._recorder.spec_at(value.node if isinstance(value, Ref) else value)
        assert isinstance(spec, TensorSpec)
        return spec

    def _rest(self, get: int) -> tuple[int, ...]:
        return self._spec(get).shape[1:]

    def _root(self, node: int) -> int:
        """The node whose storage a value lies in, or may lie in."""
        while (source := self._recorder.source_of(node)) is not None:
            node = source
        return node


def open_whole(recorder: Recorder) -> int:
    """Begin a body over the invokes that are there; the invoke its sites name.

    Raises:
        RecordingError: there is none.
    """
    count = len(recorder.current_trace().prompts)
    if not count:
        raise RecordingError(
            "tracer.invoke() without an input is a body over the inputs before it, and there is none: give "
            "one, tracer.invoke(prompt)",
            where=users_line(),
        )
    recorder.step, recorder.steps_ahead = 0, {}
    if count == 1:
        return 0
    if recorder.whole is None:
        recorder.whole = WholeBatch(recorder)
    recorder.whole.count = count
    return WHOLE


def _named(site: Site) -> str:
    return str(replace(site, invoke=0))
