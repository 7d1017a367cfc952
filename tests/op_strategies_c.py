"""Generated arguments for activations, creation and complex numbers. See ``op_strategies.py``."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from op_values import DIMS, DTYPE_VALUES, Call, call, fitting, shapes, specs
from pellucid_shared.values import Device

STRATEGIES: dict[str, SearchStrategy[Call]] = {}
STRICTER: dict[str, str] = {}
META_ONLY: set[str] = set()
REAL_ONLY: set[str] = set()
INTEGER_FILL: dict[str, int] = {}

_NUMBER = st.sampled_from([0, 1, 2, -1, 0.5, 2.0, True])
_REAL = st.sampled_from([0, 1, 2, -1, 0.5, 2.0])
_DEVICE = st.just(Device("cpu"))
_MADE = {"dtype": DTYPE_VALUES, "device": _DEVICE}
_SHAPES = shapes(0, 3)

# --- activations -------------------------------------------------------------------------------------------

for _name in ("softmax", "log_softmax"):
    STRATEGIES[f"torch.{_name}"] = call(specs(), DIMS, dtype=DTYPE_VALUES)
STRATEGIES["torch.relu"] = STRATEGIES["tensor.relu_"] = call(specs())
_MORE: dict[str, dict[str, SearchStrategy[Any]]] = {
    "relu": {},
    "relu6": {},
    "hardtanh": {"min_val": st.just(-0.5), "max_val": st.just(2.0)},
    "leaky_relu": {"negative_slope": _REAL},
    "elu": {"alpha": _REAL},
    "selu": {},
    "celu": {"alpha": st.sampled_from([1, 0.5, 2.0])},
    "silu": {},
    "mish": {},
    "hardswish": {},
    "hardsigmoid": {},
    "softplus": {"beta": st.sampled_from([1, 0.5]), "threshold": _REAL},
    "softsign": {},
    "logsigmoid": {},
    "gelu": {"approximate": st.sampled_from(["none", "tanh", "fast"])},
}
for _name, _kwargs in _MORE.items():
    STRATEGIES[f"torch.nn.functional.{_name}"] = call(specs(), **_kwargs)
for _name in ("silu", "mish", "softsign", "hardtanh", "relu6", "hardswish", "hardsigmoid"):
    STRICTER[f"torch.nn.functional.{_name}"] = "dtypes that only some backends take"
STRATEGIES["torch.nn.functional.glu"] = call(specs(), DIMS)

# --- creation ----------------------------------------------------------------------------------------------


def _sizes(*more: SearchStrategy[Any]) -> SearchStrategy[Call]:
    """A shape as one tuple; creation by separate numbers is the same parameter."""
    return call(shapes(0, 3, st.sampled_from([0, 1, 2, 3, -1])), *more, **_MADE)


for _name in ("zeros", "ones", "rand", "randn"):
    STRATEGIES[f"torch.{_name}"] = _sizes()
STRATEGIES["torch.full"] = _sizes(_NUMBER)
STRATEGIES["torch.arange"] = st.one_of(
    call(_REAL, **_MADE), call(_REAL, _REAL, **_MADE), call(_REAL, _REAL, _REAL, **_MADE)
)
STRATEGIES["torch.linspace"] = call(_REAL, _REAL, st.integers(-1, 5), **_MADE)
STRATEGIES["torch.eye"] = st.one_of(
    call(st.integers(-1, 3), **_MADE), call(*[st.integers(-1, 3)] * 2, **_MADE)
)
STRATEGIES["torch.randint"] = call(st.integers(-2, 3), st.integers(-2, 4), _SHAPES, **_MADE)
STRATEGIES["torch.randperm"] = call(st.integers(-1, 5), **_MADE)
for _name in ("zeros_like", "ones_like", "rand_like", "randn_like"):
    STRATEGIES[f"torch.{_name}"] = call(specs(), **_MADE)
STRATEGIES["torch.full_like"] = call(specs(), _NUMBER, **_MADE)
for _name in ("new_zeros", "new_ones"):
    STRATEGIES[f"tensor.{_name}"] = call(specs(), _SHAPES, **_MADE)
STRATEGIES["tensor.new_full"] = call(specs(), _SHAPES, _NUMBER, **_MADE)
STRATEGIES["torch.bernoulli"] = call(specs())
STRATEGIES["tensor.normal_"] = call(specs(), _REAL, _REAL)
STRATEGIES["tensor.uniform_"] = call(specs(), _REAL, _REAL)
STRICTER["tensor.normal_"] = "complex tensors"
STRICTER["tensor.uniform_"] = "an empty tensor, whose bounds torch does not look at"
STRICTER["torch.randint"] = "bool"
STRICTER["torch.randperm"] = "bool"
STRICTER["torch.linspace"] = "bool"
STRICTER["torch.arange"] = "bool"

# --- complex -----------------------------------------------------------------------------------------------

for _name in ("real", "imag", "conj", "resolve_conj", "conj_physical", "angle", "view_as_real"):
    STRATEGIES[f"torch.{_name}"] = call(specs())
STRATEGIES["torch.view_as_complex"] = call(specs(sizes=st.sampled_from([2, 2, 2, 3])))
_REAL_PAIRS = st.sampled_from(["float32", "float32", "float64", "bfloat16"])
for _name in ("complex", "polar"):
    STRATEGIES[f"torch.{_name}"] = fitting(2, _REAL_PAIRS).map(lambda pair: (pair, {}))
STRICTER["torch.complex"] = STRICTER["torch.polar"] = "half precision, whose complex kind graphs do not carry"
