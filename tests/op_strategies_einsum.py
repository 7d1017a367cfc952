"""Generated equations and patterns for einsum and einops; see ``op_strategies`` for the terms."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from op_values import SIZES, Call, call, shapes, specs
from pellucid_shared.specs import TensorSpec

STRATEGIES: dict[str, SearchStrategy[Call]] = {}
STRICTER: dict[str, str] = {}
META_ONLY: set[str] = set()
REAL_ONLY: set[str] = set()
INTEGER_FILL: dict[str, int] = {}

_DTYPES = st.sampled_from(["float32", "float64", "int64", "int32", "bool", "complex64", "bfloat16"])


@st.composite
def _einsum(draw: st.DrawFn) -> Call:
    size = {letter: draw(st.sampled_from([1, 2, 3])) for letter in "ijkA"}
    dtype = draw(_DTYPES)
    terms, operands = [], []
    for _ in range(draw(st.integers(1, 3))):
        letters = draw(st.text("ijkA", max_size=3))
        shape = [size[letter] for letter in letters]
        if draw(st.integers(0, 3)) == 0:
            at = draw(st.integers(0, len(letters)))
            letters = f"{letters[:at]}...{letters[at:]}"
            shape[at:at] = draw(shapes(0, 2, st.sampled_from([1, 2])))
        if shape and draw(st.integers(0, 5)) == 0:
            shape[0] = draw(st.sampled_from([1, 4]))
        terms.append(letters)
        operands.append(TensorSpec(tuple(shape), dtype))
    equation = draw(st.sampled_from([",", " , "])).join(terms)
    if draw(st.booleans()):
        equation += " -> " + draw(st.sampled_from(["", "...", "", ""])) + draw(st.text("ijkA", max_size=2))
    return ((equation, operands) if draw(st.booleans()) else (equation, *operands)), {}


STRATEGIES["torch.einsum"] = st.one_of(
    _einsum(),
    call(st.sampled_from(["i1", ".i", "i->j", "ij->", "ii", "i,j"]), specs(0, 2)),
)
STRICTER["torch.einsum"] = "small integers, whose result's dtype hangs on the order of summation"


@st.composite
def _pattern(draw: st.DrawFn, kind: str) -> Call:
    names = draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4))
    size = {name: draw(st.sampled_from([1, 2, 3])) for name in names}
    shape: list[int] = []
    left: list[str] = []
    lengths: dict[str, int] = {}
    rest = list(names)
    while rest:
        group = [rest.pop() for _ in range(draw(st.integers(1, min(2, len(rest)))))]
        total = 1
        for name in group:
            total *= size[name]
        for name in group[draw(st.sampled_from([0, 1, 1, 1])) :]:
            lengths[name] = size[name]
        if draw(st.integers(0, 9)) == 0:
            total += 1
        shape.append(total)
        left.append(f"({' '.join(group)})" if len(group) > 1 or draw(st.integers(0, 5)) == 0 else group[0])
    extra = draw(st.sampled_from(["", "", "...", "1", "2"]))
    if extra:
        at = draw(st.integers(0, len(left)))
        left.insert(at, extra)
        shape[at:at] = draw(shapes(0, 2)) if extra == "..." else [int(extra)]
    kept = list(draw(st.permutations(names)))
    if extra == "..." and draw(st.integers(0, 5)):
        kept.insert(draw(st.integers(0, len(kept))), "...")
    if kind == "reduce" and kept and draw(st.booleans()):
        kept.pop()
    if kind == "repeat" or draw(st.integers(0, 11)) == 0:
        kept.insert(0, draw(st.sampled_from(["n", "1", "2"])))
        if kept[0] == "n":
            lengths["n"] = draw(st.sampled_from([1, 2]))
    if len(kept) > 1 and draw(st.booleans()):
        kept = [f"({kept[0]} {kept[1]})", *kept[2:]]
    if draw(st.integers(0, 9)) == 0:
        lengths["q"] = 2
    text = f"{' '.join(left)} -> {' '.join(kept)}"
    args = [TensorSpec(tuple(shape), draw(_DTYPES)), text]
    if kind == "reduce":
        args.append(draw(st.sampled_from(["mean", "sum", "max", "min", "prod", "any", "all"])))
    return tuple(args), dict(lengths)


_BROKEN = st.sampled_from(
    [
        "a b",
        "a (b -> a b",
        "a b) -> a b",
        "a -> a",
        "a a -> a",
        "((a) b) -> a b",
        "_a b -> _a b",
        "a 0 -> a",
        "a b -> a . b",
        "(...) -> ...",
    ]
)
for _kind in ("rearrange", "repeat", "reduce"):
    _more = (st.just("sum"),) if _kind == "reduce" else ()
    STRATEGIES[f"einops.{_kind}"] = st.one_of(
        _pattern(_kind), _pattern(_kind), call(specs(1, 2, sizes=SIZES), _BROKEN, *_more)
    )
