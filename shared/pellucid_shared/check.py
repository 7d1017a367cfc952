"""Does this graph fit this model? Shapes, dtypes, sites, order and cost, from card and registry alone.

The client asks before it sends, the gateway before it queues, the engine before it compiles: one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .apply import infer_apply
from .backward import check_gradient, pass_cost
from .card import ModelCard, OpaqueLeaf, PlainLeaf, TensorLeaf, leaves
from .errors import (
    GraphError,
    InputError,
    PellucidError,
    ShapeError,
    SiteError,
    UnknownModuleError,
    did_you_mean,
)
from .flat import Flat, flatten, split
from .flow import FLAT_OPS, FLOW_OPS, infer
from .graph import (
    APPEND,
    APPLY,
    BACKWARD,
    GET,
    GRADIENT_OPS,
    LIST,
    LOG,
    ORIGINAL,
    PARAM,
    SAVE,
    SET,
    SKIP,
    STOP,
    Graph,
    Node,
)
from .ops import Cost, lookup
from .passing import parameter_spec, require_pass, skipped_parts
from .regions import Trace
from .specs import DTYPES, Dim, Spec, TensorSpec, is_floating, same_size
from .storage import Timeline, timeline
from .values import INSIDE, RESULT, ModuleRef, Ref, Site, TensorRef, Value, substitute

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """What sites of one trace are seen in: the trace, and (batch, tokens) of each of its invokes."""

    trace: Trace
    sizes: Sequence[Size]


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a graph before it runs; positions are those of ``flat``.

    Attributes:
        flat: the graph with its bodies written out.
        specs: per node, the spec of its value; None where it yields none.
        bound: per registry node, its arguments by parameter name, specs for tensors; else None.
        timeline: when each node can run, and on which storage.
        cost: of all nodes together, the model's own pass not counted.
    """

    flat: Flat
    specs: tuple[Spec, ...]
    bound: tuple[dict[str, Any] | None, ...]
    timeline: Timeline
    cost: Cost


def check(graph: Graph, card: ModelCard, sizes: Sequence[Size], tensors: Mapping[str, TensorSpec]) -> Checked:
    """Check a linted graph against a model.

    Args:
        sizes: (batch, tokens) of each invoke of each trace, as its body sees them.
        tensors: specs of the literals in the safetensors part, by digest.

    Raises:
        GraphError: or one of its subclasses, with ``node`` set.
    """
    flat = flatten(graph)
    scenes = [Scene(t, s) for t, s in zip(flat.traces, split(flat, list(sizes)), strict=True)]
    return check_flat(flat, card, scenes, tensors)


def check_flat(
    flat: Flat, card: ModelCard, scenes: Sequence[Scene], tensors: Mapping[str, TensorSpec]
) -> Checked:
    """The same of a graph that is flat already; one scene a trace."""
    specs: list[Spec] = []
    bounds: list[dict[str, Any] | None] = []
    flops = size = 0
    by_trace: dict[int, Cost] = {}  # of the ops alone
    for position, node in enumerate(flat.nodes):
        try:
            spec, bound, cost = check_node(node, specs, card, scenes[node.region], tensors)
        except PellucidError as error:
            if error.node is None:
                error.node = flat.origin[position]
            raise
        specs.append(spec)
        bounds.append(bound)
        if node.op == BACKWARD:
            cost = pass_cost(by_trace, node.region)
        else:
            own = by_trace.get(node.region, Cost(0, 0))
            by_trace[node.region] = Cost(own.flops + cost.flops, own.bytes + cost.bytes)
        flops, size = flops + cost.flops, size + cost.bytes
    return Checked(flat, tuple(specs), tuple(bounds), timeline(flat, card, bounds), Cost(flops, size))


def check_node(
    node: Node,
    specs: Sequence[Spec],
    card: ModelCard,
    scene: Scene,
    tensors: Mapping[str, TensorSpec],
) -> tuple[Spec, dict[str, Any] | None, Cost]:
    """Spec, bound arguments and cost of one node, given the specs of those before it."""

    def resolve(value: Value) -> Any:
        if isinstance(value, Ref):
            return specs[value.node]
        if isinstance(value, TensorRef):
            if value.digest not in tensors:
                raise GraphError(f"the tensor {value.digest} is named but was not sent with the request")
            return tensors[value.digest]
        return value

    if node.op in (GET, ORIGINAL):
        return site_spec(node.site, card, scene), None, Cost(0, 0)
    if node.op == SET:
        target = site_spec(node.site, card, scene)
        _check_write(node.site, target, resolve(node.args[1]))
        return None, None, Cost(0, target.nbytes)
    args = [substitute(v, resolve) for v in node.args]
    kwargs = {k: substitute(v, resolve) for k, v in node.kwargs.items()}
    if node.op == SAVE:
        return None, None, Cost(0, _nbytes(args[0]))
    if node.op == SKIP:
        known_module(node.site.module, card)
        for site, value in skipped_parts(node.site, args[1], card):
            _check_write(site, site_spec(site, card, scene), value)
        return None, None, Cost(0, _nbytes(args[1]))
    if node.op in (LOG, STOP):
        require_pass(node, card)
        return None, None, Cost(0, 0)
    if node.op == PARAM:
        known_module(args[0].path, card)
        weight = parameter_spec(args[0].path, args[1], card)
        return weight, None, Cost(0, weight.nbytes)
    if node.op in GRADIENT_OPS:
        spec, cost = check_gradient(node, args, scene.trace)
        return spec, None, cost
    if node.op in FLOW_OPS or node.op in FLAT_OPS:
        return infer(node.op, args), None, Cost(0, 0)
    if node.op in (LIST, APPEND):  # a flat graph has none; while one is written its length is nobody's
        return [], None, Cost(0, 0)
    if node.op == APPLY:
        module = args[0]
        assert isinstance(module, ModuleRef)
        known_module(module.path, card)
        applied, cost = infer_apply(module.path, args[1:], kwargs, card)
        return applied, None, cost
    op = lookup(node.op)
    bound = op.bind(args, kwargs)
    result = op.rule(bound)
    return result, bound, op.cost(bound, result)


def require_room(index: int, tokens: int, trace: Trace, card: ModelCard) -> None:
    """Raise InputError unless a prompt of so many tokens, and what the trace generates, fit the model."""
    new = trace.generation.max_new_tokens if trace.generation else 0
    if new > 1 and not card.decode:
        raise InputError(
            f"{card.id} keeps nothing from step to step that this version knows of, so it generates one "
            f"token at most, and {new} were asked; trace its forward pass instead"
        )
    if card.max_tokens is not None and tokens + max(0, new - 1) > card.max_tokens:
        more = f" and is to get {new} more" if new else ""
        raise InputError(
            f"invoke {index} has {tokens} tokens{more}; {card.id} takes at most {card.max_tokens}"
        )


def known_module(path: str, card: ModelCard) -> None:
    """Raise UnknownModuleError, with the nearest paths, unless the model has this module."""
    if path not in card.module_index:
        raise UnknownModuleError(f"{card.id} has no module {path!r}.{did_you_mean(path, card.module_index)}")


def site_spec(site: Site, card: ModelCard, scene: Scene) -> TensorSpec:
    """The spec of the tensor at a site.

    Raises:
        UnknownModuleError: no such module.
        SiteError: the module is not called, or not so often, or has no tensor there.
    """
    known_module(site.module, card)
    if site.kind == RESULT:
        return _result_spec(site, scene)
    if site.step and not card.decode:
        raise SiteError(f"{card.id} does not generate step by step, so it has no {site}")
    call = card.call_at(site)
    name = site.module or "the model"
    if call is None:
        count = sum(c.module == site.module for c in (card.decode if site.step else card.prefill))
        if not count:
            what = "step of generation after the first" if site.step else "forward pass"
            raise SiteError(f"{name} is never called in a {what} of {card.id}, so it has no {site.kind}")
        raise SiteError(f"{name} is called {count} times in a pass; call {site.call} was asked (from 0)")
    card.insides.require(call, site)
    structure = card.insides.part(call, replace(site, path=site.path[:1] if site.kind in INSIDE else ()))
    found = card.insides.part(call, site)
    assert structure is not None
    if isinstance(found, TensorLeaf):
        spec = found.spec(*scene.sizes[site.invoke], site.step)
        if spec is None:
            raise SiteError(f"{site} has a shape that follows neither batch nor tokens; it cannot be used")
        return spec
    if isinstance(found, OpaqueLeaf):
        raise SiteError(f"{site} is a {found.class_name}, which is never read or written")
    if isinstance(found, PlainLeaf):
        raise SiteError(f"{site} is the plain value {found.value}, not a tensor")
    options = [
        "".join(f"[{p!r}]" for p in path) or "itself"
        for path, leaf in leaves(structure)
        if isinstance(leaf, TensorLeaf)
    ]
    has = f"it has tensors at {', '.join(options)}" if options else "it has no tensors"
    raise SiteError(f"{site} is not a tensor of {name}'s {site.kind}; {has}")


def _result_spec(site: Site, scene: Scene) -> TensorSpec:
    """The ids of prompt and generated tokens; how many is known beforehand where nothing ends a row."""
    batch, tokens = scene.sizes[site.invoke]
    generation = scene.trace.generation
    assert generation is not None
    length = tokens + generation.max_new_tokens
    ends = generation.eos_token_id != ()
    return TensorSpec((batch, Dim(length) if ends else length), "int64")


def _check_write(site: Site, spec: TensorSpec, value: Any) -> None:
    if isinstance(value, TensorSpec):
        if value.ndim != spec.ndim or not all(map(same_size, value.shape, spec.shape)):
            raise ShapeError(
                f"{site} has shape {list(spec.shape)} and was given a value of shape {list(value.shape)}; "
                "a replacement must have the site's shape (edit a part with [...] = value)"
            )
        if value.dtype != spec.dtype and not (is_floating(value.dtype) and is_floating(spec.dtype)):
            raise ShapeError(
                f"{site} is {spec.dtype} and was given {value.dtype}; only floating types are cast: use .to()"
            )
        return
    if not isinstance(value, bool | int | float | complex):
        raise ShapeError(f"{site} takes a tensor or a number, found a {type(value).__name__}; index it first")
    category = 0 if isinstance(value, bool) else 1 if isinstance(value, int) else 2
    category = 3 if isinstance(value, complex) else category
    if category > DTYPES[spec.dtype].category:
        raise ShapeError(f"{site} is {spec.dtype} and cannot be filled with {value!r}")


def _nbytes(value: Any) -> int:
    if isinstance(value, TensorSpec):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value))
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return 0
