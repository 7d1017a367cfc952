"""Random programs of nested branches, loops, edits and carried values, against the same in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import pellucid
from pellucid_shared.errors import LimitError
from references import capture, first, forward, with_first

IDS = [[5, 9, 31, 7]]
SITES = ("model.layers.0", "model.layers.1", "lm_head")
VARIABLES = ("a", "b", "c")


@pytest.fixture(scope="module")
def plain(tiny_models: Any) -> Any:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def model(plain: Any) -> Any:
    return pellucid.LanguageModel("llama", model=plain)


# A program is a list of statements over three vectors of three numbers, which exist at different times of the
# pass: a and b once layers 0 and 1 have run, c at the end.

_variables = st.sampled_from(VARIABLES)
_numbers = st.sampled_from([-1.5, -1.0, 0.5, 2.0])
_simple = st.one_of(
    st.tuples(st.just("scale"), _variables, _numbers),  # x *= n
    st.tuples(st.just("add"), _variables, _variables),  # x += y
    st.tuples(st.just("fill"), _variables, st.integers(0, 2), _variables),  # x[i] = y.mean()
    st.tuples(st.just("name"), _variables, _variables),  # x = y + 0
    st.tuples(st.just("alias"), _variables, _variables),  # carried: x = y, by name
    st.tuples(st.just("keep"), _variables),  # kept.append(x + 0)
)


def _nested(body: Any) -> Any:
    bodies = st.lists(body, min_size=1, max_size=4)
    flag = st.tuples(_variables, st.floats(-2, 2, allow_nan=False, width=16))
    return st.one_of(
        st.tuples(st.just("if"), flag, bodies, st.one_of(st.none(), bodies)),
        st.tuples(st.just("elif"), flag, flag, bodies, bodies, bodies),
        st.tuples(st.just("for"), st.integers(0, 3), bodies),
        st.tuples(st.just("until"), st.integers(1, 3), flag, bodies, bodies),
        st.tuples(st.just("while"), flag, bodies),
    )


PROGRAMS = st.lists(st.recursive(_simple, _nested, max_leaves=8), min_size=1, max_size=5)
BOUND = 3


class BoundError(Exception):
    """A loop would go on past its bound."""


class Reference:
    """Runs a program in Python."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.now = {k: v.clone() for k, v in values.items()}
        self.kept: list[torch.Tensor] = []

    def holds(self, flag: tuple[str, float]) -> bool:
        return bool(self.now[flag[0]].tanh().sum() > flag[1])

    def run(self, body: list[Any]) -> None:
        for statement in body:
            self.one(*statement)

    def one(self, kind: str, *args: Any) -> None:
        now = self.now
        if kind == "scale":
            now[args[0]] *= args[1]
        elif kind == "add":
            now[args[0]] += now[args[1]]
        elif kind == "fill":
            now[args[0]][args[1]] = now[args[2]].mean()
        elif kind == "name":
            now[args[0]] = now[args[1]] + 0
        elif kind == "alias":
            now[args[0]] = now[args[1]]
        elif kind == "keep":
            self.kept.append(now[args[0]] + 0)
        elif kind == "if":
            flag, yes, no = args
            self.run(yes if self.holds(flag) else no or [])
        elif kind == "elif":
            one, two, first_, second, third = args
            other = self.holds(two)  # what the client writes is computed before the branches
            self.run(first_ if self.holds(one) else second if other else third)
        elif kind == "for":
            for _ in range(args[0]):
                self.run(args[1])
        elif kind == "until":
            count, flag, before, after = args
            for _ in range(count):
                self.run(before)
                if self.holds(flag):
                    break
                self.run(after)
        elif kind == "while":
            flag, inner = args
            turns = 0
            while self.holds(flag):
                if turns == BOUND:
                    raise BoundError
                self.run(inner)
                turns += 1


class Written:
    """Writes a program down; each variable is carried by a loop of one turn around all of it."""

    def __init__(self, tracer: Any, carried: dict[str, Any], kept: Any) -> None:
        self.tracer, self.carried, self.kept = tracer, carried, kept

    def holds(self, flag: tuple[str, float]) -> Any:
        return self.carried[flag[0]].value.tanh().sum() > flag[1]

    def run(self, body: list[Any]) -> None:
        for statement in body:
            self.one(*statement)

    def one(self, kind: str, *args: Any) -> None:
        carried, tracer = self.carried, self.tracer
        if kind == "scale":
            value = carried[args[0]].value
            value *= args[1]
        elif kind == "add":
            value = carried[args[0]].value
            value += carried[args[1]].value
        elif kind == "fill":
            carried[args[0]][args[1]] = carried[args[2]].value.mean()
        elif kind == "name":
            carried[args[0]].set(carried[args[1]] + 0)
        elif kind == "alias":
            carried[args[0]].set(carried[args[1]])
        elif kind == "keep":
            self.kept.append(carried[args[0]] + 0)
        elif kind == "if":
            flag, yes, no = args
            with tracer.cond(self.holds(flag)):
                self.run(yes)
            if no:
                with tracer.cond.else_():
                    self.run(no)
        elif kind == "elif":
            one, two, first_, second, third = args
            other = self.holds(two)
            with tracer.cond(self.holds(one)):
                self.run(first_)
            with tracer.cond.elif_(other):
                self.run(second)
            with tracer.cond.else_():
                self.run(third)
        elif kind == "for":
            with tracer.loop(args[0]):
                self.run(args[1])
        elif kind == "until":
            count, flag, before, after = args
            loop = tracer.loop(count)
            with loop:
                self.run(before)
                loop.until(self.holds(flag))
                self.run(after)
        elif kind == "while":
            flag, inner = args
            with tracer.while_(lambda: self.holds(flag), max_turns=BOUND):
                self.run(inner)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PROGRAMS)
def test_a_program_over_values_of_different_times(model: Any, plain: Any, program: list[Any]) -> None:
    values = {
        x: capture(plain, torch.tensor(IDS), site)[0, -1, :3]
        for x, site in zip(VARIABLES, SITES, strict=True)
    }
    reference, ended = Reference(values), True
    try:
        reference.run(program)
    except BoundError:
        ended = False
    note(str(program))

    def write() -> tuple[dict[str, Any], Any]:
        with model.trace(IDS) as tracer:
            outer = tracer.loop(1)
            sites = (model.layers[0], model.layers[1], model.lm_head)
            carried = {
                x: outer.carry(m.output[0, -1, :3].clone()) for x, m in zip(VARIABLES, sites, strict=True)
            }
            kept = tracer.list().save()
            with outer:
                Written(tracer, carried, kept).run(program)
            results = {x: (c.value + 0).save() for x, c in carried.items()}
        return results, kept

    if not ended:
        with pytest.raises(LimitError, match="has not ended in 3 turns"):
            write()
        return
    results, kept = write()
    for x in VARIABLES:
        torch.testing.assert_close(results[x], reference.now[x], atol=1e-4, rtol=1e-3, equal_nan=True)
    assert len(kept) == len(reference.kept)
    for one, other in zip(kept, reference.kept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, equal_nan=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PROGRAMS)
def test_a_program_over_the_tensors_of_a_site(model: Any, plain: Any, program: list[Any]) -> None:
    """The variables are views of one site's tensor, so that every edit reaches the model."""
    note(str(program))
    references: list[Reference] = []
    ended = True

    def edit(output: Any) -> Any:
        h = first(output)
        reference = Reference({})
        reference.now = {x: h[0, i, :3] for i, x in enumerate(VARIABLES)}
        reference.run(program)
        references.append(reference)
        return with_first(output, h)

    try:
        logits = forward(plain, torch.tensor(IDS), after={SITES[0]: edit}).logits
    except BoundError:
        ended = False

    def write() -> tuple[Any, Any]:
        with model.trace(IDS) as tracer:
            outer = tracer.loop(1)
            h = model.layers[0].output
            carried = {x: outer.carry(h[0, i, :3]) for i, x in enumerate(VARIABLES)}
            kept = tracer.list().save()
            with outer:
                Written(tracer, carried, kept).run(program)
            return model.lm_head.output.save(), kept

    if not ended:
        with pytest.raises(LimitError, match="has not ended in 3 turns"):
            write()
        return
    found, kept = write()
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-3, equal_nan=True)
    assert len(kept) == len(references[0].kept)
    for one, other in zip(kept, references[0].kept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, equal_nan=True)
