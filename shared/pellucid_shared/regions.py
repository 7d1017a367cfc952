"""The regions of a graph: what its nodes stand in, and how each is spelled in JSON.

A trace is one forward pass, or one generation, over its invokes; a session has several. An ``Each`` is a
body written once for several steps of a generation, a ``Loop`` one written once for several turns, a ``Cond``
one branch. A ``Session`` stands for what lies outside all traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypeAlias

from .errors import GraphError
from .tensor_input import TensorInput
from .values import decode, encode

MAX_NEW_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class Invoke:
    """One input of a trace: text, texts, or token ids; or, of a torch module, tensors.

    Attributes:
        input: a str, a list of str (a batch), a list of ids, or a list of lists of ids (a batch).
        mask: optional attention mask, a list of lists of 0 and 1 beside a batch of ids of one length.
        tensors: what a torch module is called with; ``input`` is then empty.
    """

    input: str | list[str] | list[int] | list[list[int]]
    mask: list[list[int]] | None = None
    tensors: TensorInput | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """How a trace generates. What is None is as the model's own generation config says.

    Attributes:
        max_new_tokens: steps at most; step 0 is the prefill, each step gives one token.
        min_new_tokens: no end-of-sequence token before so many.
        do_sample: draw from the distribution; False takes the most probable token.
        temperature, top_k, top_p, repetition_penalty: as in transformers.
        eos_token_id: ids that end a row; empty: none does.
        pad_token_id: what a row that has ended is filled with.
    """

    max_new_tokens: int
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: tuple[int, ...] | None = None
    pad_token_id: int | None = None


#: Options a user may give to ``generate``.
GENERATION_OPTIONS = tuple(f.name for f in fields(Generation))


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward pass over its invokes, or a generation; ``seed`` is that of its random numbers.

    ``parent`` is the loop of a session that it stands in: each turn has the trace anew.
    """

    invokes: tuple[Invoke, ...]
    generation: Generation | None = None
    seed: int = 0
    parent: int | None = None

    @property
    def steps(self) -> int:
        """How many forward passes it has at most."""
        return self.generation.max_new_tokens if self.generation else 1


@dataclass(frozen=True, slots=True)
class Each:
    """A body for some steps of the generation ``parent``; the step of a site inside counts from each.

    Attributes:
        parent: index of the trace it stands in.
        steps: one step; several; or a slice of them. What is saved under one step is a plain value, under
            several a list with an entry for each step that ran.
        optional: one step that need not run: where the generation ends earlier, nothing is wrong.
    """

    parent: int
    steps: int | list[int] | slice
    optional: bool = False

    @property
    def single(self) -> bool:
        return isinstance(self.steps, int)

    def of(self, count: int) -> Sequence[int]:
        """The steps, of a generation of ``count`` steps, in the order of what they save."""
        if isinstance(self.steps, int):
            return (self.steps,)
        return range(count)[self.steps] if isinstance(self.steps, slice) else self.steps


@dataclass(frozen=True, slots=True)
class Cond:
    """One branch: it runs where its flag holds and none of the branches that it continues did.

    Attributes:
        parent: index of the region it stands in.
        flag: position of a ``cond.flag`` node; None: it runs where no other branch did (``else``).
        after: index of the branch that it continues; None: it is the first.
    """

    parent: int
    flag: int | None
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Loop:
    """A body that runs ``count`` times, or until it ends itself; what it saves comes back as a list by turn.

    Attributes:
        parent: index of the region it stands in; a loop with traces inside stands in a session.
        count: turns, 0 or more.
        bounded: it must end itself; not to have done so after ``count`` turns is an error.
    """

    parent: int
    count: int
    bounded: bool = False


@dataclass(frozen=True, slots=True)
class Outside:
    """What lies outside all traces: their loops, and nodes between them."""


Region: TypeAlias = "Trace | Each | Cond | Loop | Outside"


def above(regions: Sequence[Any], index: int) -> Iterator[int]:
    """The index itself, then those of the regions it stands in, from inside to outside."""
    yield index
    parent = getattr(regions[index], "parent", None)
    while parent is not None and parent < index:  # of a graph that is not linted, parents may be anything
        yield (index := parent)
        parent = getattr(regions[index], "parent", None)


def closing(regions: Sequence[Any], index: int) -> Iterator[int]:
    """Of these, the ones whose values stay inside: branches, loops, and bodies for several steps."""
    for found in above(regions, index):
        region = regions[found]
        if isinstance(region, Cond | Loop) or (isinstance(region, Each) and not region.single):
            yield found


def encode_region(region: Region) -> dict[str, Any]:
    """A region as JSON; what has its default value is left out."""
    if isinstance(region, Outside):
        return {"kind": "session"}
    if isinstance(region, Cond):
        own = {"parent": region.parent, "flag": region.flag, "after": region.after}
        return {"kind": "cond", **{k: v for k, v in own.items() if v is not None}}
    if isinstance(region, Loop):
        kind, count = ("while", "bound") if region.bounded else ("loop", "count")
        return {"kind": kind, "parent": region.parent, count: region.count}
    if isinstance(region, Each):
        data: dict[str, Any] = {"kind": "iter", "parent": region.parent, "steps": encode(region.steps)}
        return {**data, "optional": True} if region.optional else data
    invokes = []
    for invoke in region.invokes:
        data = {"input": invoke.input} if invoke.tensors is None else {"tensors": invoke.tensors.encode()}
        if invoke.mask is not None:
            data["mask"] = invoke.mask
        invokes.append(data)
    data = {"kind": "trace", "invokes": invokes}
    if region.generation is not None:
        given = ((f.name, getattr(region.generation, f.name)) for f in fields(Generation))
        options = {name: value for name, value in given if value is not None}
        data["generate"] = {k: list(v) if isinstance(v, tuple) else encode(v) for k, v in options.items()}
    if region.seed:
        data["seed"] = region.seed
    return data if region.parent is None else {**data, "parent": region.parent}


def decode_region(data: Any) -> Region:
    """The region that :func:`encode_region` spells so.

    Raises:
        GraphError: it is none.
    """
    kind = data.get("kind") if isinstance(data, dict) else data
    if kind == "iter":
        return _decode_each(data)
    if kind == "cond":
        top = json_object(data, "a cond region", {"kind", "parent"}, {"flag", "after"})
        positions = {name: _position(top[name], name) for name in ("parent", "flag", "after") if name in top}
        return Cond(positions["parent"], positions.get("flag"), positions.get("after"))
    if kind in ("loop", "while"):
        count = "count" if kind == "loop" else "bound"
        top = json_object(data, f"a {kind} region", {"kind", "parent", count}, set())
        return Loop(_position(top["parent"], "parent"), _position(top[count], count), kind == "while")
    if kind == "session":
        json_object(data, "a session region", {"kind"}, set())
        return Outside()
    if kind != "trace":
        bad(f"region kind {kind!r:.60} is not known here; known: trace, iter, cond, loop, while, session")
    top = json_object(data, "a region", {"kind", "invokes"}, {"generate", "seed", "parent"})
    if not isinstance(top["invokes"], list):
        bad("a trace's invokes are a list")
    invokes = tuple(_decode_invoke(i, v) for i, v in enumerate(top["invokes"]))
    generation = _decode_generation(top["generate"]) if "generate" in top else None
    seed = top.get("seed", 0)
    if not _is_int(seed) or not 0 <= seed < 2**63 or ("seed" in top and not seed):
        bad(f"a trace's seed is a whole number from 1 (0 is left out), found {seed!r:.60}")
    parent = _position(top["parent"], "parent") if "parent" in top else None
    return Trace(invokes, generation, seed, parent)


def traces(regions: tuple[Region, ...]) -> Iterator[tuple[int, Trace]]:
    """(index, trace) of each trace, in order."""
    return ((i, region) for i, region in enumerate(regions) if isinstance(region, Trace))


def _decode_each(data: Any) -> Each:
    top = json_object(data, "an iter region", {"kind", "parent", "steps"}, {"optional"})
    parent, steps = top["parent"], decode(top["steps"])
    if not _is_int(parent) or parent < 0:
        bad(f"a region's parent is the position of a region, found {parent!r:.60}")
    ints = isinstance(steps, list) and steps and all(_is_int(s) for s in steps)
    if not (_is_int(steps) or ints or isinstance(steps, slice)):
        bad(f"the steps of an iter region are a step, a list of them, or a slice, found {steps!r:.60}")
    if top.get("optional", True) is not True:
        bad("an iter region that is not optional leaves that out")
    return Each(parent, steps, "optional" in top)


def _decode_generation(data: Any) -> Generation:
    options = json_object(data, "generate", {"max_new_tokens"}, set(GENERATION_OPTIONS))
    return generation({k: decode(v) for k, v in options.items()})


def generation(options: Mapping[str, Any]) -> Generation:
    """The options of a generation, each checked.

    Raises:
        GraphError: unknown, of the wrong type, or out of bounds.
    """
    found = dict(options)
    for name, (low, high, whole) in _BOUNDS.items():
        value = found.get(name)
        if value is None and name in found:
            bad(f"{name} is left out where it is not given")
        if value is None:
            continue
        fits = _is_int(value) if whole else (_is_int(value) or isinstance(value, float))
        if not fits or not low <= value <= high:
            bad(f"{name} is a {'whole ' if whole else ''}number from {low} to {high}, found {value!r:.60}")
    if not isinstance(found.get("do_sample", False), bool):
        bad(f"do_sample is True or False, found {found['do_sample']!r:.60}")
    if "eos_token_id" in found:
        ids = found["eos_token_id"]
        if not isinstance(ids, list | tuple) or not all(_is_int(i) and i >= 0 for i in ids):
            bad(f"eos_token_id is a list of token ids, found {ids!r:.60}")
        found["eos_token_id"] = tuple(ids)
    return Generation(**found)


#: Number options: lowest, highest, and whether whole.
_BOUNDS: dict[str, tuple[float, float, bool]] = {
    "max_new_tokens": (1, MAX_NEW_TOKENS, True),
    "min_new_tokens": (0, MAX_NEW_TOKENS, True),
    "temperature": (1e-6, 1e6, False),
    "top_k": (0, 2**31, True),
    "top_p": (0, 1, False),
    "repetition_penalty": (1e-6, 1e6, False),
    "pad_token_id": (0, 2**31, True),
}


def _decode_invoke(index: int, data: Any) -> Invoke:
    if isinstance(data, dict) and "tensors" in data:
        given = json_object(data, f"invoke {index}", {"tensors"}, set())
        return Invoke("", tensors=TensorInput.decode(given["tensors"]))
    top = json_object(data, f"invoke {index}", {"input"}, {"mask"})
    value = top["input"]
    texts = isinstance(value, str) or (_list_of(value, str) and value)
    ids = _list_of(value, int)
    batch = isinstance(value, list) and bool(value) and all(_list_of(row, int) for row in value)
    if not (texts or ids or batch):
        bad(f"invoke {index}: an input is a str, a list of str, ids, or a list of lists of ids")
    mask = top.get("mask")
    if "mask" in top:
        rows_fit = (
            batch
            and isinstance(mask, list)
            and len(mask) == len(value)
            and all(_list_of(m, int) and len(m) == len(r) for m, r in zip(mask, value, strict=True))
            and all(bit in (0, 1) for row in mask for bit in row)
        )
        if not rows_fit:
            bad(f"invoke {index}: a mask is rows of 0 and 1, as long as the rows of ids beside it")
    return Invoke(decode(value), mask)


def json_object(data: Any, what: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    """``data`` as an object that has the keys it must and none but those it may have."""
    if not isinstance(data, dict):
        bad(f"{what} is a JSON object, found {type(data).__name__}")
    if missing := required - set(data):
        bad(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := set(data) - required - optional:
        bad(f"{what} has no {', '.join(sorted(unknown))[:80]}")
    return data


def bad(message: str) -> NoReturn:
    raise GraphError(message)


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _position(value: Any, name: str) -> int:
    if not _is_int(value) or not 0 <= value < 2**63:
        bad(f"a region's {name} is a whole number from 0, found {value!r:.60}")
    found: int = value
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
