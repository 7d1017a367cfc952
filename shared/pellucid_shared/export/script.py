"""The script: each node a line in the hook of the event at which it runs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..card import Call, Fields, ModelCard, leaf_at
from ..check import Checked
from ..clock import Place
from ..errors import ExportError
from ..graph import APPEND, APPLY, GET, LIST, SAVE, SET, Graph, Invoke, Node
from ..ops import Alias, all_ops, lookup
from ..regions import Each, Trace
from ..specs import TensorSpec
from ..storage import keeps_literals
from ..values import Ref, Site, TensorRef, Value, contains
from . import template
from .expressions import Names, assignment, expression, quoted, text
from .turns import in_turns
from .versions import Versions

_KNOWN = (GET, SET, APPLY, SAVE, LIST, APPEND)


def hooks_script(
    graph: Graph,
    card: ModelCard,
    sizes: Sequence[tuple[int, int]],
    tensors: Mapping[str, TensorSpec],
    *,
    source: str,
    literals: str = "",
) -> str:
    """A script that computes what a graph saves with hooks of its own, and imports no Pellucid.

    It runs each invoke alone, one after another, and gives what the engine gives, up to rounding.

    Args:
        graph: linted.
        card: of the model the script is for: where values are made follows its call order.
        sizes: (batch, tokens) of each invoke of each trace.
        tensors: specs of the literals the graph names, by digest.
        source: the folder or hub id that the script loads the model from.
        literals: name of the safetensors file, beside the script, that holds them.

    Returns:
        Python source. ``experiment(model, tokenizer, literals)`` in it returns the saved values by name; run
        as a program, it writes them to a safetensors file.

    Raises:
        GraphError: the graph does not fit the model.
        ExportError: the graph has a part that plain hooks are not written for; says which.
    """
    _require_exportable(graph)
    turns = in_turns(graph, card, sizes, tensors)
    return _Script(graph, turns.checked, turns.orders, card).source(source, literals)


def _require_exportable(graph: Graph) -> None:
    for region in graph.regions:
        if isinstance(region, Each) or (isinstance(region, Trace) and region.generation is not None):
            raise ExportError(
                "this experiment generates, which is not exported: a script of plain hooks has one forward "
                "pass for each invoke. Export a trace of the prompt with its continuation instead"
            )
        if not isinstance(region, Trace):
            raise ExportError(f"this experiment has a {type(region).__name__.lower()}, which is not exported")
    for position, node in enumerate(graph.nodes):
        if node.op not in _KNOWN and node.op not in all_ops():
            raise ExportError(f"this experiment has a {node.op}, which is not exported", node=position)
        if node.op in (GET, SET) and node.site.kind not in ("input", "output"):
            raise ExportError(f"this experiment touches {node.site}, which is not exported", node=position)


class _Script:
    def __init__(
        self, graph: Graph, checked: Checked, orders: Sequence[Sequence[int]], card: ModelCard
    ) -> None:
        self.graph, self.checked, self.orders, self.card = graph, checked, orders, card
        self.flat, self.timeline = checked.flat, checked.timeline
        self.versions = Versions(checked)
        self.kept = self._kept()
        self.literals: dict[str, str] = {}  # digest -> variable
        self.older: dict[tuple[int, int], str] = {}  # (reader, node it reads) -> variable of an older version
        self.copies: dict[int, dict[int, str]] = defaultdict(dict)  # edit -> node it edits -> variable
        self.copied: dict[int, str] = {}  # what is a view or a copy -> variable that it is a copy of
        self.views: dict[int, list[str]] = defaultdict(list)  # reader -> lines that make views of copies
        for reader in self.kept:
            for ref in dict.fromkeys(self.flat.nodes[reader].refs()):
                self._plan_version(reader, ref)
            self._plan_copy(reader)
        self.where = {p: self.timeline.ready[p] for p in self.kept}
        self.assigned: dict[str, int] = {}  # variable -> the event that assigns it
        self.shared: set[str] = set()  # variables that several events name

    # --- what there is -------------------------------------------------------------------------------------

    def _kept(self) -> list[int]:
        """Nodes that save, write, edit, or make what such a node takes."""
        wanted: set[int] = set()
        nodes = self.flat.nodes
        for position in reversed(range(len(nodes))):
            if position in wanted or nodes[position].op in (SAVE, SET) or self.timeline.effects[position]:
                wanted |= {position, *nodes[position].refs()}
        return sorted(wanted)

    def _name(self, position: int) -> str:
        """The variable of a node's value; an edit in place yields what it edits."""
        base = self.versions.base[position]
        if base is not None and self.timeline.effects[position]:
            return self._name(base)
        return f"v{self.flat.origin[position]}"

    def _literal(self, digest: str) -> str:
        if digest not in self.literals:
            self.literals[digest] = f"literal_{len(self.literals)}"
        return self.literals[digest]

    def _plan_version(self, reader: int, ref: int, *, copied: bool = False) -> str:
        """The variable in which a node finds a value, as of the node's place in the program."""
        edit = self.versions.edit_between(reader, ref, copied=copied)
        if edit is None:
            return self._name(ref)
        if (reader, ref) in self.older:
            return self.older[reader, ref]
        if self.versions.moment(ref) < self.versions.moment(edit):
            name = f"{self._name(ref)}_before_{self.flat.origin[edit]}"
            self.copies[edit][ref] = name
        else:  # a view that does not exist yet when its base is edited
            name = f"{self._name(ref)}_for_{self.flat.origin[reader]}"
            base = self.versions.base[ref]
            assert base is not None
            taken = {
                r: self._plan_version(reader if r == base else ref, r) for r in self.flat.nodes[ref].refs()
            }

            def names(value: Ref | TensorRef, taken: dict[int, str] = taken) -> str:
                return taken[value.node] if isinstance(value, Ref) else self._literal(value.digest)

            line = self._expression(ref, names)
            if f"{name} = {line}" not in self.views[reader]:
                self.views[reader].append(f"{name} = {line}")
        if not copied:
            self.older[reader, ref] = name
        return name

    def _plan_copy(self, reader: int) -> None:
        """For what torch makes a view or a copy: what it copies, if it does."""
        base, bound = self.versions.base[reader], self.checked.bound[reader]
        if base is None or bound is None:
            return
        if lookup(self.flat.nodes[reader].op).alias_of(bound) is Alias.MAYBE_VIEW:
            name = self._plan_version(reader, base, copied=True)
            if name != self._name(base):
                self.copied[reader] = name

    def _names(self, reader: int) -> Names:
        kept = keeps_literals(self.flat.nodes[reader], self.checked.bound[reader])

        def name(value: Ref | TensorRef) -> str:
            if isinstance(value, TensorRef):
                return self._literal(value.digest) + (".clone()" if kept else "")
            return self.older.get((reader, value.node)) or self._name(value.node)

        return name

    def _expression(self, position: int, names: Names) -> str:
        node = self.flat.nodes[position]
        return expression(node, names, f"random_{node.region}")

    # --- lines ---------------------------------------------------------------------------------------------

    def source(self, source: str, literals: str) -> str:
        by_time: dict[int, list[int]] = defaultdict(list)
        for position in self.kept:
            if self.flat.nodes[position].op != SAVE:
                by_time[self.timeline.ready[position]].append(position)
        bodies = {when: self._lines(own) for when, own in sorted(by_time.items())}
        saved = self._saved()
        self._find_shared(bodies, saved)
        lines = self._opening()
        lines += bodies.pop(-1, [])
        passes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for when in bodies:
            place = self.timeline.clock.place(when)
            passes[place.trace, place.turn].append(when)
        for (trace, turn), events in sorted(passes.items()):
            lines += ["", *self._pass(trace, turn, [(when, bodies[when]) for when in events])]
        lines += ["", *saved]
        return template.script(
            model=self.graph.model,
            sha256=self.graph.sha256,
            source=source,
            literals=literals if self.literals else "",
            body=lines,
            pad=self._pad,
            texts=any(_is_text(i) for trace in self.flat.traces for i in trace.invokes),
            applies=any(self.flat.nodes[p].op == APPLY for p in self.kept),
            einops=any(self.flat.nodes[p].op.startswith("einops.") for p in self.kept),
        )

    @property
    def _pad(self) -> int:
        pad = self.card.config.get("pad_token_id")
        return pad if isinstance(pad, int) else 0

    def _opening(self) -> list[str]:
        """What comes before the first pass: literals, generators, and variables that hooks share."""
        lines = [f"{name} = literals[{quoted(digest)}].to(device)" for digest, name in self.literals.items()]
        for trace, region in enumerate(self.flat.traces):
            drawn = [p for p in self.kept if self.flat.nodes[p].region == trace and self._is_random(p)]
            if drawn:
                lines.append(f"random_{trace} = torch.Generator(device).manual_seed({region.seed})")
        late = sorted((n for n in self.shared if self.assigned.get(n, -1) >= 0), key=_number)
        if late:
            lines += [f"{' = '.join(late[i : i + 12])} = None" for i in range(0, len(late), 12)]
        return lines

    def _is_random(self, position: int) -> bool:
        op = self.flat.nodes[position].op
        return op in all_ops() and lookup(op).random

    def _find_shared(self, bodies: Mapping[int, list[str]], saved: Sequence[str]) -> None:
        used: dict[str, set[int]] = defaultdict(set)
        for when, lines in [*bodies.items(), (2**63, list(saved))]:
            for line in lines:
                for name in _NAME.findall(line):
                    used[name].add(when)
                if made := _ASSIGNED.match(line):
                    self.assigned[made[1]] = when
        self.shared = {name for name, events in used.items() if len(events) > 1}

    def _saved(self) -> list[str]:
        lines = ["return {"]
        for position, to in self.flat.saves.items():
            value = text(self.flat.nodes[position].args[0], self._names(position))
            lines.append(f"    {quoted(to.name)}: {value},")
        names = [to.name for to in self.flat.saves.values()]
        order = {name: i for i, name in enumerate(self.graph.save_names().values())}
        body = sorted(zip(names, lines[1:], strict=True), key=lambda pair: order[pair[0]])
        return [lines[0], *(line for _, line in body), "}"]

    def _pass(self, trace: int, turn: int, events: Sequence[tuple[int, list[str]]]) -> list[str]:
        invoke = self.flat.traces[trace].invokes[turn]
        title = f"invoke {self.orders[trace][turn]}"
        if len(self.flat.traces) > 1:
            title = f"trace {trace}, {title}"
        lines, hooks, functions = [f"# {title}"], [], set[str]()
        for when, body in events:
            place = self.timeline.clock.place(when)
            call, kind = self._call_at(place)
            function = _function_name(call, kind, functions)
            functions.add(function)
            given = "output" if kind == "output" else "args, kwargs"
            lines += ["", f"def {function}({given}):"]
            assigned = {m[1] for line in body if (m := _ASSIGNED.match(line))}
            if outer := sorted(assigned & self.shared, key=_number):
                lines.append(f"    nonlocal {', '.join(outer)}")
            lines += [f"    {line}" for line in body]
            if self._writes(when):
                lines.append(f"    return {given}")
            hooks.append(f"({quoted(call.module)}, {quoted(kind)}, {call.call}, {function})")
        lines += ["", f"with hooks(model, {', '.join(hooks)}):"]
        if len(lines[-1]) > 100:
            lines[-1:] = ["with hooks(", "    model,", *(f"    {hook}," for hook in hooks), "):"]
        return [*lines, f"    model(**{_arguments(invoke)})"]

    def _call_at(self, place: Place) -> tuple[Call, str]:
        within = place.within // self.card.insides.scale
        for call in self.card.prefill:
            if within in (call.enter, call.exit):
                return call, "input" if within == call.enter else "output"
        raise AssertionError(place)

    def _writes(self, when: int) -> bool:
        return any(self.flat.nodes[p].op == SET for p in self.kept if self.timeline.ready[p] == when)

    def _lines(self, positions: Sequence[int]) -> list[str]:
        """The statements of one event, in program order."""
        lines: list[str] = []
        parted: dict[tuple[Any, ...], list[str]] = {}  # path -> what parts the model's tensor from a name's
        for position in positions:
            node = self.flat.nodes[position]
            names = self._names(position)
            lines += [
                f"{name} = {self._name(ref)}.clone()  # a later line reads it as it is here"
                for ref, name in self.copies[position].items()
            ]
            lines += self.views[position]
            if node.op == GET:
                lines.append(f"{self._name(position)} = {_read(node.site)}")
            elif node.op == SET:
                value, same = self._fitted(node, names)
                lines += self._write(node.site, value)
                parted[node.site.path] = []
                if same and self.versions.edited_apart(position):
                    parted[node.site.path] = self._write(node.site, f"{_read(node.site)}.clone()")
            elif node.op == "setitem":
                lines.append(assignment(node, names))
            elif self.timeline.effects[position]:
                lines.append(self._expression(position, names))
            else:
                own = self._name(position)
                lines.append(f"{own} = {self._expression(position, names)}")
                if position in self.copied:
                    lines += self._unless_view(position, own, names)
        for copies in filter(None, parted.values()):
            lines += ["# the model keeps this version; the name's is edited later", *copies]
        return lines

    def _unless_view(self, position: int, own: str, names: Names) -> list[str]:
        base = self.versions.base[position]
        assert base is not None

        def copied(value: Ref | TensorRef) -> str:
            return self.copied[position] if value == Ref(base) else names(value)

        same = f"{own}.untyped_storage().data_ptr() == {self._name(base)}.untyped_storage().data_ptr()"
        return [f"{own} = {own} if {same} else {self._expression(position, copied)}"]

    def _fitted(self, node: Node, names: Names) -> tuple[str, bool]:
        """A replacement as the site takes it, and whether it is the very tensor given."""
        value: Value = node.args[1]
        present = _read(node.site)
        if not contains(value, (Ref, TensorRef)):
            return f"torch.full_like({present}, {text(value, names)})", False
        if isinstance(value, TensorRef):
            return f"{names(value)}.to({present}.dtype)", False
        given, wanted = self.checked.specs[value.node], self._site_dtype(node.site)
        if isinstance(given, TensorSpec) and given.dtype == wanted:
            return names(value), True
        return f"{names(value)}.to({present}.dtype)", False

    def _site_dtype(self, site: Site) -> str | None:
        call = self.card.call_at(site)
        leaf = call and leaf_at(call.structure(site.kind), site.path)
        return getattr(leaf, "dtype", None)

    def _write(self, site: Site, value: str) -> list[str]:
        call = self.card.call_at(site)
        assert call is not None
        if site.kind == "output":
            if len(site.path) == 1 and isinstance(call.output, Fields) and call.output.class_name != "dict":
                return [f"output[{text(site.path[0], _no_names)}] = {value}"]
            return [f"output = {_replaced('output', site.path, value)}"]
        name, path = ("kwargs", site.path[1:]) if site.path[0] == 1 else ("args", site.path[1:])
        return [f"{name} = {_replaced(name, path, value)}"]


_NAME = re.compile(r"\bv\d+(?:_(?:before|for)_\d+)*\b")
_ASSIGNED = re.compile(r"(v\d+(?:_(?:before|for)_\d+)*) = ")


def _number(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _read(site: Site) -> str:
    path = site.path
    if site.kind == "input":
        name, path = ("kwargs" if path[0] == 1 else "args"), path[1:]
    else:
        name = "output"
    return name + "".join(f"[{text(step, _no_names)}]" for step in path)


def _replaced(name: str, path: Sequence[int | str], value: str) -> str:
    """A structure with one leaf replaced."""
    if not path:
        return value
    step, inner = path[0], _replaced(f"{name}[{text(path[0], _no_names)}]", path[1:], value)
    if isinstance(step, str):
        return f"{{**{name}, {quoted(step)}: {inner}}}"
    before = f"*{name}[:{step}], " if step else ""
    return f"({before}{inner}, *{name}[{step + 1}:])"


def _function_name(call: Call, kind: str, taken: Collection[str]) -> str:
    name = re.sub(r"\W", "_", f"{call.module or 'whole'}_{kind}")
    name = f"{name}_call_{call.call}" if call.call else name
    while name in taken:
        name += "_"
    return name


def _no_names(value: Ref | TensorRef) -> str:
    raise AssertionError(value)


def _is_text(invoke: Invoke) -> bool:
    value = invoke.input
    return isinstance(value, str) or isinstance(value[0], str)


def _arguments(invoke: Invoke) -> str:
    value = invoke.input
    if _is_text(invoke):
        texts = [value] if isinstance(value, str) else value
        return f'inputs(model, tokenizer({text(list(texts), _no_names)})["input_ids"])'
    rows = value if isinstance(value[0], list) else [value]
    return f"inputs(model, {rows!r}, {invoke.mask!r})" if invoke.mask else f"inputs(model, {rows!r})"
