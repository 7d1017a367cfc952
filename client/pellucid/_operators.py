"""Operators, indexing and saving of values: Python's syntax, recorded as ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pellucid_shared.errors import ShapeError
from pellucid_shared.ops import lookup

from ._call import call, graph_value, method, plain_index, spelled
from ._grad import Differentiable
from ._later import VALUE, refuse
from ._lines import users_line
from ._save import save
from ._tokens import TokenAxis
from ._value import Value
from ._warnings import warn_of_first_row

#: Operator -> the op it records. Each has a reflected twin, and an in-place twin where ``INPLACE`` says.
BINARY = {
    "add": "torch.add",
    "sub": "torch.sub",
    "mul": "torch.mul",
    "truediv": "torch.div",
    "floordiv": "torch.floor_divide",
    "mod": "torch.remainder",
    "pow": "torch.pow",
    "matmul": "torch.matmul",
    "and": "torch.bitwise_and",
    "or": "torch.bitwise_or",
    "xor": "torch.bitwise_xor",
    "lshift": "torch.bitwise_left_shift",
    "rshift": "torch.bitwise_right_shift",
}
COMPARISONS = {name: f"torch.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge")}
UNARY = {"neg": "torch.neg", "abs": "torch.abs", "invert": "torch.bitwise_not", "pos": "torch.positive"}
INPLACE = {
    "iadd": "torch.Tensor.add_",
    "isub": "torch.Tensor.sub_",
    "imul": "torch.Tensor.mul_",
    "itruediv": "torch.Tensor.div_",
    "ifloordiv": "torch.Tensor.floor_divide_",
    "imod": "torch.Tensor.remainder_",
    "ipow": "torch.Tensor.pow_",
    "iand": "torch.Tensor.bitwise_and_",
    "ior": "torch.Tensor.bitwise_or_",
    "ixor": "torch.Tensor.bitwise_xor_",
}


class Operators(Differentiable):
    """A value with Python's syntax on it."""

    __slots__ = ()

    def save(self, name: str | None = None) -> Any:
        """Send this value back when the run completes; after the block it is the tensor itself.

        Args:
            name: the name it comes back under; left out, ``saved_0``, ``saved_1``, ... in program order.
        """
        return save(self, name)

    def __iter__(self) -> Iterator[Any]:
        len(self)
        return iter(self._function("torch.unbind", self))

    def __getattr__(self, name: str) -> Any:
        """torch's methods by name, where the class itself does not have them."""
        if name.startswith("_"):
            raise AttributeError(name)
        self._recorder.require_open(self)
        refuse(VALUE, name, f".{name} of a value")
        op = method(name)
        return lambda *args, **kwargs: call(op, (self, *args), kwargs)

    def _function(self, spelling: str, *args: Any, **kwargs: Any) -> Any:
        return call(spelled(spelling), args, kwargs)

    def _binary(self, name: str, other: Any) -> Any:
        if name == "add" and isinstance(other, tuple | list):
            raise self._no_tuple(other)
        return self._function({**BINARY, **COMPARISONS}[name], self, other)

    def _reflected(self, name: str, other: Any) -> Any:
        if name == "add" and isinstance(other, tuple | list):
            raise self._no_tuple(other)
        return self._function(BINARY[name], other, self)

    def _no_tuple(self, other: Any) -> ShapeError:
        return ShapeError(
            f"{self} is one tensor, and a {type(other).__name__} cannot be joined to it; where a module "
            "returns one tensor, assign the tensor itself to .output",
            where=users_line(),
        )

    def _inplace(self, name: str, other: Any) -> Any:
        return self._function(INPLACE[name], self, other)

    def _unary(self, name: str) -> Any:
        return self._function(UNARY[name], self)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and index == 0:
            warn_of_first_row(self._recorder, self._node, users_line())
        return call(lookup("getitem"), (self, plain_index(index)), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        index = plain_index(index)
        if not self._already_there(index, value):
            call(lookup("setitem"), (self, index, value), {})

    def _already_there(self, index: Any, value: Any) -> bool:
        """Whether ``value`` is the view ``self[index]``: Python stores it back after ``x[index] += v``."""
        if not isinstance(value, Value) or value.recorder is not self._recorder:
            return False
        recorder, node = self._recorder, value.ref(self._recorder).node
        made = recorder.nodes[node]
        same = made.op == "getitem" and made.args == (self.ref(recorder), graph_value(index, recorder))
        return same and recorder.is_view(node)

    @property
    def token(self) -> TokenAxis:
        """The value along its tokens: ``x.token[0]`` is the prompt's first, ``x.token[-1]`` its last,
        whatever the padding; ``x.token[i] = v`` writes there."""
        return TokenAxis(self)

    @property
    def t(self) -> TokenAxis:
        """``x.t[i]`` is ``x.token[i]``; ``x.t()`` is torch's: the two axes of a matrix exchanged."""
        return TokenAxis(self)

    @property
    def T(self) -> Any:
        """The axes in reverse order."""
        return self._function("torch.Tensor.permute", self, tuple(reversed(range(self.ndim))))

    @property
    def mT(self) -> Any:
        """The last two axes exchanged."""
        return self._function("torch.transpose", self, -2, -1)

    @property
    def H(self) -> Any:
        """The conjugate transpose of a matrix."""
        return self._function("torch.conj", self.mT) if self.is_complex() else self.mT

    mH = H

    @property
    def real(self) -> Any:
        return self._function("torch.real", self) if self.is_complex() else self

    @property
    def imag(self) -> Any:
        return self._function("torch.imag", self)


def _binary_operator(name: str) -> Callable[[Operators, Any], Any]:
    return lambda self, other: self._binary(name, other)


def _reflected_operator(name: str) -> Callable[[Operators, Any], Any]:
    return lambda self, other: self._reflected(name, other)


def _inplace_operator(name: str) -> Callable[[Operators, Any], Any]:
    return lambda self, other: self._inplace(name, other)


def _unary_operator(name: str) -> Callable[[Operators], Any]:
    return lambda self: self._unary(name)


for _name in (*BINARY, *COMPARISONS):
    setattr(Operators, f"__{_name}__", _binary_operator(_name))
for _name in BINARY:
    setattr(Operators, f"__r{_name}__", _reflected_operator(_name))
for _name in INPLACE:
    setattr(Operators, f"__{_name}__", _inplace_operator(_name))
for _name in UNARY:
    setattr(Operators, f"__{_name}__", _unary_operator(_name))
