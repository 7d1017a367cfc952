"""The card of any torch module, made by running it on an input of the user's.

It runs at the input's own size and with one row more; an axis that follows is ``batch``. Then it runs with
one more on axis 1, where it can; an axis that follows is ``tokens``. At last it runs on the rows of the first
two together: if every site with a batch has the rows it has alone, invokes may share a pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from pellucid_shared.card import Call, Fields, ModelCard, OpaqueLeaf, PlainLeaf, Structure, TensorLeaf, leaves
from pellucid_shared.card import Sequence as Items
from pellucid_shared.errors import InputError

from .probe import Seen, modules_of, record, versions
from .sites import member
from .tensors import dtype_name

#: Largest difference between together and alone, relative to the largest value, by dtype; else none.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class Feed:
    """What a module is called with, and how large.

    Attributes:
        batch: size of axis 0 of the first tensor that has one; other tensors of that size follow it.
        tokens: size of its axis 1, 1 where it has none; the same in every run of a card.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: int
    tokens: int

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Feed:
        """A feed of tensors, and of tuples, lists and dicts of them."""
        first = next((t for t in tree_flatten((args, kwargs))[0] if t.ndim), None)
        if first is None:
            return Feed(tuple(args), kwargs, 1, 1)
        return Feed(tuple(args), kwargs, first.shape[0], first.shape[1] if first.ndim > 1 else 1)

    def follows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of it has a row for each of the batch."""
        return tensor.ndim > 0 and tensor.shape[0] == self.batch

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Feed:
        """The same with each tensor that follows the batch replaced."""
        args, kwargs = tree_map(lambda t: function(t) if self.follows(t) else t, (self.args, self.kwargs))
        return Feed.of(args, kwargs)

    def __add__(self, other: Feed) -> Feed:
        """The rows of both, one feed after the other."""

        def joined(mine: torch.Tensor, its: torch.Tensor) -> torch.Tensor:
            return torch.cat([mine, its]) if self.follows(mine) and other.follows(its) else mine

        args, kwargs = tree_map(joined, (self.args, self.kwargs), (other.args, other.kwargs))
        return Feed.of(args, kwargs)

    def call(self, module: torch.nn.Module) -> Any:
        """Run the module on it."""
        return module(*self.args, **self.kwargs)


def tree_card(module: torch.nn.Module, *, id: str) -> ModelCard:
    """What is known of a module that has not been run: its tree."""
    parameter = next(module.parameters(), None)
    return ModelCard(
        id=id,
        source="",
        class_name=type(module).__name__,
        fingerprint="module",
        dtype=dtype_name(torch.get_default_dtype() if parameter is None else parameter.dtype),
        parameters=sum(p.numel() for p in module.parameters()),
        vocab_size=0,
        modules=tuple(modules_of(module)),
        prefill=(),
        versions=versions(),
        takes="tensors",
    )


def module_card(module: torch.nn.Module, feed: Feed, *, id: str) -> tuple[ModelCard, bool]:
    """The card of a module in evaluation mode, and whether it holds for other sizes of the batch.

    The module's buffers and torch's random numbers are left as they were.

    Raises:
        InputError: the module fails on this input; says how.
    """
    with torch.no_grad(), _as_it_was(module):
        try:
            small = _seen(module, feed)
        except Exception as error:  # whatever a module's code raises
            reason = str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
            raise InputError(f"{id} cannot be run on this input: {reason}") from error
        more = feed.mapped(_one_row_more)
        large = longer = None
        if more.batch > feed.batch:
            with contextlib.suppress(Exception):  # then it is a module of one size
                large = _seen(module, more)
        if feed.tokens > 1:
            with contextlib.suppress(Exception):
                longer = _seen(module, feed.mapped(_one_token_more))
        calls = _calls(small, small if large is None else large, small if longer is None else longer, feed)
        packs = False
        if large is not None:
            with contextlib.suppress(Exception):
                packs = _agree(calls, small, large, _seen(module, feed + more), feed.batch)
    found = tree_card(module, id=id).model_copy(update={"prefill": calls, "packs": packs})
    return found, large is not None


def _seen(module: torch.nn.Module, feed: Feed) -> list[Seen]:
    """The calls of a run on copies: a module may write to what it is given."""
    args, kwargs = tree_map(torch.clone, (feed.args, feed.kwargs))
    return record(module, kwargs, args)[0]


@contextlib.contextmanager
def _as_it_was(module: torch.nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng():
        yield
    for buffer, kept in buffers:
        buffer.copy_(kept)


def _one_row_more(tensor: torch.Tensor) -> torch.Tensor:
    """Other rows of the same kind, one more: the tensor's own numbers, mixed and (if fractions) scaled."""
    mixed = tensor.reshape(-1).flip(0).reshape(tensor.shape)
    found = torch.cat([mixed, tensor[:1]])
    if found.dtype.is_floating_point:
        found = found * torch.linspace(0.5, 1.5, found.numel(), device=found.device).reshape(found.shape)
    return found.to(tensor.dtype)


def _one_token_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:, :1]], dim=1) if tensor.ndim > 1 else tensor


def _calls(small: list[Seen], large: list[Seen], longer: list[Seen], feed: Feed) -> tuple[Call, ...]:
    others = {(c.module, c.call): c for c in large}
    lengthened = {(c.module, c.call): c for c in longer}
    shown = _Structures(feed)
    return tuple(
        Call(
            module=c.module,
            call=c.call,
            enter=c.enter,
            exit=c.exit,
            args=tuple(map(shown.of, c.args, other.args, long.args)),
            kwargs={k: shown.of(v, other.kwargs[k], long.kwargs[k]) for k, v in c.kwargs.items()},
            output=shown.of(c.output, other.output, long.output),
        )
        for c in small
        if (other := others.get((c.module, c.call))) is not None
        if (long := lengthened.get((c.module, c.call))) is not None
    )


class _Structures:
    """What three runs show of the values in them: one has one row more, one is longer by one on axis 1."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._objects: dict[int, int] = {}
        self._storages: dict[int, int] = {}

    def of(self, small: Any, large: Any, longer: Any) -> Structure:
        if isinstance(small, torch.Tensor):
            memory = small.untyped_storage()._cdata
            return TensorLeaf(
                shape=self._axes(small, large, longer),
                dtype=dtype_name(small.dtype),
                object=self._objects.setdefault(id(small), len(self._objects)),
                storage=self._storages.setdefault(memory, len(self._storages)),
            )
        if isinstance(small, list | tuple):
            members = tuple(map(self.of, small, large, longer))
            return Items(leaf="list" if isinstance(small, list) else "tuple", items=members)
        if isinstance(small, Mapping):
            names = {str(k): self.of(v, large[k], longer[k]) for k, v in small.items()}
            return Fields(class_name=type(small).__name__, items=names)
        if dataclasses.is_dataclass(small):
            fields = [f.name for f in dataclasses.fields(small)]
            names = {f: self.of(*(getattr(value, f) for value in (small, large, longer))) for f in fields}
            return Fields(class_name=type(small).__name__, items=names)
        if small is None or isinstance(small, bool | int | float | str):
            return PlainLeaf(value=repr(small))
        return OpaqueLeaf(class_name=type(small).__name__)

    def _axes(self, small: torch.Tensor, large: Any, longer: Any) -> tuple[Any, ...] | None:
        if not all(isinstance(other, torch.Tensor) and other.ndim == small.ndim for other in (large, longer)):
            return None
        axes = list(map(self._axis, small.shape, large.shape, longer.shape))
        return None if None in axes else tuple(axes)

    def _axis(self, small: int, large: int, longer: int) -> Any:
        n, tokens = self._feed.batch, self._feed.tokens
        if small == large:  # sizes of other kinds are those of this form
            return "tokens" if (small, longer) == (tokens, tokens + 1) else small
        if (small, large) == (n, n + 1):
            return "batch"
        return "rows" if (small, large) == (n * tokens, (n + 1) * tokens) else None


def _agree(calls: Sequence[Call], small: list[Seen], large: list[Seen], both: list[Seen], rows: int) -> bool:
    """Whether every site that follows the batch has, in a run on both, what it has alone."""
    alone = [{(c.module, c.call): c for c in run} for run in (small, large, both)]
    for call in calls:
        a, b, c = (run[call.module, call.call] for run in alone)
        for kind in ("input", "output"):
            for path, leaf in leaves(call.structure(kind)):
                if isinstance(leaf, TensorLeaf) and leaf.shape is not None and leaf.shape[:1] == ("batch",):
                    values = ((x.args, x.kwargs) if kind == "input" else x.output for x in (a, b, c))
                    first, second, found = (member(value, path) for value in values)
                    if not (_close(found[:rows], first) and _close(found[rows:], second)):
                        return False
    return True


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not wanted.numel() or torch.equal(found, wanted):
        return True
    most = _TOLERANCE.get(found.dtype, 0.0) * max(1.0, float(wanted.abs().max()))
    return float((found - wanted).abs().max()) <= most  # NaN is not
