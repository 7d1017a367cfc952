"""What an op is, and the table of all ops.

An op is data and pure Python: an argument schema with bounds, a shape and dtype rule, an alias rule and a
cost rule. The client knows shapes from it without torch, the gateway refuses from it what is wrong or too
dear before it is queued, and the compiler learns from it what an op overwrites. ``worker/`` binds each id
to a callable. Families of ops live one to a file beside this one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OpArgumentError, UnknownOpError, did_you_mean
from ..specs import DTYPES, TensorSpec
from ..values import INT_LIMIT, Device, DType

REQUIRED: Any = object()

#: Bounds that hold unless a parameter states its own.
MAX_RANK = 16
MAX_NUMEL = 2**40
MAX_LIST = 4096


class Kind(enum.Enum):
    """What a parameter takes. Tensors arrive as :class:`TensorSpec` when an op is bound."""

    TENSOR = "a tensor"
    OPERAND = "a tensor or a number"
    TENSORS = "a list of tensors"
    NUMBER = "a number"
    INT = "a whole number"
    BOOL = "True or False"
    STR = "a string"
    INTS = "a whole number or a tuple of them"
    DTYPE = "a dtype"
    DEVICE = "a device"
    INDEX = "an index"
    ANY = "a value"


class Alias(enum.Enum):
    """How an op's result relates to the storage of the parameter named ``Op.aliases``."""

    FRESH = "fresh"  # new storage
    VIEW = "view"  # shares storage
    MAYBE_VIEW = "maybe-view"  # may share storage (reshape, contiguous, to): the compiler assumes the worse
    INPLACE = "in-place"  # overwrites it, and yields it


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter: its kind, default and bounds.

    Attributes:
        optional: None is taken as well.
        variadic: trailing positional arguments are gathered into a tuple (``x.view(2, 3)``); one tuple or
            list in their place is taken too.
        keywords: the last parameter gathers all further keyword arguments into a dict (einops' axis lengths).
        low, high: inclusive bounds for numbers, whole numbers, and each member of INTS.
        choices: the strings a STR takes.
    """

    name: str
    kind: Kind
    default: Any = REQUIRED
    optional: bool = False
    variadic: bool = False
    keyword_only: bool = False
    keywords: bool = False
    low: float = -INT_LIMIT
    high: float = INT_LIMIT
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call costs: floating point operations, and bytes newly allocated."""

    flops: int
    bytes: int


Bound = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        id: stable name in graphs, e.g. ``torch.softmax``, ``tensor.view``, ``getitem``.
        params: the argument schema, in order.
        rule: bound arguments -> spec of the result (a TensorSpec, or a tuple or list of them).
        cost: bound arguments and result spec -> cost.
        alias, aliases: storage relation (the worst one, where it depends on the arguments), and the
            parameter it speaks of.
        spellings: the names users write, e.g. ``torch.softmax``, ``torch.Tensor.softmax``.
        fields: names of a tuple result's members (``values``, ``indices``), or empty.
        kernel: dotted name of the callable in torch or einops, where it is not the id's own.
        random: draws from the trace's generator.
        alias_rule: bound arguments -> storage relation, where it depends on them (``getitem``, ``to``).
    """

    id: str
    params: tuple[Param, ...]
    rule: Callable[[Bound], Any]
    cost: Callable[[Bound, Any], Cost]
    alias: Alias = Alias.FRESH
    aliases: str = "input"
    spellings: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    kernel: str = ""
    random: bool = False
    alias_rule: Callable[[Bound], Alias] | None = None

    def alias_of(self, bound: Bound) -> Alias:
        """How the result of a call with these arguments relates to the storage of ``bound[aliases]``."""
        return self.alias_rule(bound) if self.alias_rule else self.alias

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, defaults filled in, every one checked against the schema.

        Tensors are given as specs. INTS come out as tuples, DTYPE as its name.

        Raises:
            OpArgumentError: too many, missing, unknown, of the wrong kind, or out of bounds.
        """
        given = dict(kwargs)
        rest = list(args)
        bound: dict[str, Any] = {}
        for param in self.params:
            if param.keywords:
                bound[param.name] = {k: check_argument(self.id, param, v) for k, v in given.items()}
                given = {}
                continue
            if param.variadic and rest:
                whole = len(rest) == 1 and isinstance(rest[0], list | tuple)
                value = tuple(rest[0]) if whole else tuple(rest)
                rest = []
            elif rest and not param.keyword_only:
                value = rest.pop(0)
            elif param.name in given:
                value = given.pop(param.name)
            elif param.default is REQUIRED:
                raise OpArgumentError(f"{self.id} lacks its argument {param.name!r} ({param.kind.value})")
            else:
                bound[param.name] = param.default
                continue
            if param.name in given:
                raise OpArgumentError(f"{self.id} is given {param.name!r} twice")
            bound[param.name] = check_argument(self.id, param, value)
        if rest:
            raise OpArgumentError(f"{self.id} takes at most {len(self.params)} arguments, found {len(args)}")
        if given:
            names = [p.name for p in self.params]
            wrong = next(iter(given))
            raise OpArgumentError(f"{self.id} has no argument {wrong!r}.{did_you_mean(wrong, names)}")
        return bound

    def infer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Cost]:
        """Spec and cost of the result.

        Raises:
            OpArgumentError: as :meth:`bind`.
            ShapeError, IndexOutOfRangeError: the operands do not fit.
        """
        bound = self.bind(args, kwargs)
        result = self.rule(bound)
        return result, self.cost(bound, result)


def check_argument(op: str, param: Param, value: Any) -> Any:
    """``value`` normalised to the parameter's kind; raises OpArgumentError naming op and parameter."""
    if value is None and param.optional:
        return None
    kind = param.kind
    ok = True
    if kind is Kind.TENSOR:
        ok = isinstance(value, TensorSpec)
    elif kind is Kind.OPERAND:
        ok = isinstance(value, TensorSpec | bool | int | float | complex)
    elif kind is Kind.TENSORS:
        ok = isinstance(value, list | tuple) and all(isinstance(v, TensorSpec) for v in value)
        ok = ok and 0 < len(value) <= MAX_LIST
        value = tuple(value) if ok else value
    elif kind is Kind.NUMBER:
        ok = isinstance(value, bool | int | float | complex)
        if ok and not isinstance(value, complex):
            _bounds(op, param, value)
    elif kind is Kind.INT:
        ok = isinstance(value, int) and not isinstance(value, bool)
        if ok:
            _bounds(op, param, value)
    elif kind is Kind.BOOL:
        ok = isinstance(value, bool)
    elif kind is Kind.STR:
        ok = isinstance(value, str)
        if ok and param.choices and value not in param.choices:
            allowed = ", ".join(map(repr, param.choices))
            raise OpArgumentError(f"{op}: {param.name!r} is one of {allowed}, found {value!r}")
    elif kind is Kind.INTS:
        if isinstance(value, int) and not isinstance(value, bool):
            value = (value,)
        ok = isinstance(value, list | tuple) and all(
            isinstance(v, int) and not isinstance(v, bool) for v in value
        )
        ok = ok and len(value) <= MAX_RANK * 4
        if ok:
            value = tuple(value)
            for member in value:
                _bounds(op, param, member)
    elif kind is Kind.DTYPE:
        ok = isinstance(value, DType) and value.name in DTYPES
        value = value.name if ok else value
    elif kind is Kind.DEVICE:
        ok = isinstance(value, Device)
    if not ok:
        none = " or None" if param.optional else ""
        raise OpArgumentError(f"{op}: {param.name!r} is {kind.value}{none}, found {describe(value)}")
    return value


def describe(value: Any) -> str:
    """A short account of an argument, for error messages."""
    if isinstance(value, TensorSpec):
        return f"a tensor {value}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}"[:80]


def _bounds(op: str, param: Param, value: float) -> None:
    if not param.low <= value <= param.high and value == value:  # nan is nobody's bound
        raise OpArgumentError(f"{op}: {param.name!r} lies in [{param.low}, {param.high}], found {value}")


_OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add an op to the table. Called by the family modules while they are imported."""
    if op.id in _OPS:
        raise ValueError(f"op {op.id} is registered twice")
    _OPS[op.id] = op
    return op


def lookup(op_id: str) -> Op:
    """The op with this id.

    Raises:
        UnknownOpError: names the nearest ids.
    """
    try:
        return _OPS[op_id]
    except KeyError:
        raise UnknownOpError(f"there is no op {op_id!r}.{did_you_mean(op_id, _OPS)}") from None


def all_ops() -> Mapping[str, Op]:
    """Every op, by id, in order of registration."""
    return _OPS
