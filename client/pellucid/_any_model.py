"""``Model``: any torch module of the user's, run in this process on tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import InputError, MissingExtraError, PellucidError, RecordingError, did_you_mean
from pellucid_shared.graph import Graph, Invoke
from pellucid_shared.packing import WireTensor, digest
from pellucid_shared.tensor_input import TensorInput
from pellucid_shared.values import TensorRef

from ._inputs import Prompt
from ._lines import at_users_line, users_line
from ._names import Names
from ._recorder import Recorder, paused, session_of
from ._run import Run
from ._scan import ScanRun
from ._tracer import Invocation, Session, TraceOptions, Tracer
from ._tree import Module, show_tree
from ._value import Value
from ._values import from_torch

_OPTIONS = ("remote", "progress", "blocking", "seed", "trace", "scan", "validate")


class Model(Module):
    """Any torch module whose hidden states can be read and changed, in this process.

        model = Model(net)
        with model.trace(x):
            model.layer1.output[:, 0] = 0
            y = model.output.save()

    What is given to ``trace`` or ``invoke`` is what the module's forward is called with, copied to the
    module's device (the CPU, where it has no parameters). The first input of each form runs the module up to
    four times: as it is given, with one row more, with one more on axis 1, and with the rows of the first
    two. So the shapes of its sites are known, which of them follow axis 0 of the input, and whether several
    invokes may share a pass, one behind the other on axis 0.

    Args:
        module: it is put into evaluation mode (dropout off, batch norm with its running statistics), and
            stays on its device; its weights and buffers are not changed by a trace's edits. Random numbers
            of its own forward come from torch's generator.
        name: the name graphs give it; by default its class.
        rename: names of your own for modules; see ``LanguageModel.rename``.

    Raises:
        MissingExtraError: transformers or accelerate is not installed, which the engine needs.
        InputError: not a torch module, or an alias that clashes.
    """

    def __init__(
        self, module: Any, *, name: str | None = None, rename: Mapping[str, str] | None = None
    ) -> None:
        itself: Any = self
        super().__init__(itself, "")
        if not hasattr(module, "named_modules") or not hasattr(module, "forward"):
            raise InputError(
                f"Model wraps a torch module, found {type(module).__name__}; LanguageModel takes a name",
                where=users_line(),
            )
        self._name = name or type(module).__name__
        self._engine = _engine(module, self._name)
        self._aliases = Names()
        if rename:
            self.rename(rename)

    @property
    def name(self) -> str:
        """The name graphs give the module."""
        return self._name

    @property
    def card(self) -> ModelCard:
        """What is known of the module: its tree, and once it was traced, its sites as of the last input."""
        card: ModelCard = self._engine.card
        return card

    def rename(self, names: Mapping[str, str]) -> None:
        """Give modules names of your own, as ``LanguageModel.rename`` does."""
        with at_users_line():
            self._aliases.add(names, self.card, set(dir(type(self))))

    def trace(self, *inputs: Any, **options: Any) -> Any:
        """``with model.trace(x):`` one forward pass; read, change and save what it computes.

        Args:
            inputs: tensors, and tuples, lists and dicts of tensors: what the forward is called with. Left
                out: ``with tracer.invoke(x):`` gives each of several.
            options: ``remote``, ``progress``, ``seed``, ``trace``, ``scan`` and ``validate`` as for
                ``LanguageModel.trace``; any other is a keyword argument of the forward.

        Raises:
            InputError: an input that is not of tensors, or that the module cannot be run on; an option that
                the forward does not have; ``remote=`` or ``blocking=False``.
        """
        tracer = self._begin("model.trace", inputs, options, Run)
        if options.get("trace", True):
            return tracer
        with tracer:
            output = self.output.save()
        return output  # noqa: RET504 (the end of the block fills it)

    def scan(self, *inputs: Any, **options: Any) -> Tracer:
        """``with model.scan(x):`` a trace that is written and checked, and never run; the module itself runs
        on the input if its shapes are not known yet. Arguments as for :meth:`trace`."""
        return self._begin("model.scan", inputs, options, ScanRun)

    def session(self, *, remote: Any = False, progress: bool = True, blocking: bool = True) -> Session:
        """``with model.session() as s:`` several traces as one job; values flow between them."""
        _refuse_servers(remote, blocking)
        itself: Any = self
        return Session(itself, self._run(Run))

    def __repr__(self) -> str:
        return f"{self._name}: {show_tree(self.card, self._aliases)}"

    def _begin(
        self, what: str, inputs: tuple[Any, ...], options: Mapping[str, Any], kind: type[Run]
    ) -> TensorTracer:
        own = {name: value for name, value in options.items() if name in _OPTIONS}
        given = {name: value for name, value in options.items() if name not in _OPTIONS}
        _refuse_servers(own.get("remote", False), own.get("blocking", True))
        seed = own.get("seed", 0)
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise InputError(f"seed is a whole number from 0, found {seed!r:.60}", where=users_line())
        prompt = self._prompt(what, inputs, given) if inputs or given else None
        if prompt is None and not own.get("trace", True):
            raise InputError(
                f"{what}(trace=False) runs the module at once: give it an input", where=users_line()
            )
        session = session_of(self)
        run = self._run(kind) if session is None else session.run
        return TensorTracer(self, run, prompt, TraceOptions(None, seed), alone=session is None)

    def _load(self) -> None:
        """A module is there already; what it calls inside is not listed."""

    def _is_of(self, other: object) -> bool:
        return other is self

    def _prompt(self, what: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TensorPrompt:
        known = inspect.signature(self._engine.module.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            for name in kwargs:
                if name not in known:
                    names = (*_OPTIONS, *known)
                    raise InputError(
                        f"{what} has no option {name!r}, and neither has the forward of {self._name}; they "
                        f"have {', '.join(names)}.{did_you_mean(name, names)}",
                        where=users_line(),
                    )
        return _tensor_prompt(what, args, kwargs)

    def _run(self, kind: type[Run]) -> Run:
        return kind(
            ModuleRecorder(self._name, _ModuleTarget(self._engine), self), progress=False, blocking=True
        )

    def _names(self) -> Names:
        return self._aliases


@dataclass(slots=True)
class TensorPrompt(Prompt):
    """An input of tensors; ``tensors`` has their bytes by digest."""

    tensors: dict[str, WireTensor] = field(default_factory=dict)


class ModuleRecorder(Recorder):
    """A recorder of traces over a torch module."""

    def add_prompt(self, prompt: Prompt) -> int:
        """Add an invoke to the trace; its index.

        Raises:
            InputError: the module cannot be run on it, or earlier inputs have another form.
        """
        trace = self.current_trace()
        assert isinstance(prompt, TensorPrompt)
        assert isinstance(self.target, _ModuleTarget)
        with paused():
            prompt.rows, prompt.tokens = self.target.take(prompt)
        for tensor in prompt.tensors.values():
            self.add_literal(tensor)
        trace.prompts.append(prompt)
        self.step, self.steps_ahead = 0, {}
        return len(trace.prompts) - 1


class TensorTracer(Tracer):
    """A trace over a torch module."""

    def __init__(
        self, model: Model, run: Run, given: Prompt | None, options: TraceOptions, *, alone: bool
    ) -> None:
        super().__init__(run, given, options, alone=alone)
        self._model = model

    def invoke(self, *inputs: Any, **named: Any) -> Invocation:
        """``with tracer.invoke(x):`` one input of the pass; the body sees only its rows.

        Args:
            inputs, named: what the forward is called with; all inputs of a trace have one form, and differ
                in axis 0 at most.
        """
        if self._given is not None:
            raise RecordingError(
                "this trace was given its input; leave it out of model.trace() to invoke several",
                where=users_line(),
            )
        if not inputs and not named:
            raise InputError("tracer.invoke() of a torch module takes its tensors", where=users_line())
        return Invocation(self._recorder, self._model._prompt("tracer.invoke", inputs, named))


class _ModuleTarget:
    """A module in this process. See :class:`pellucid._target.Target`. One for each job: its inputs have one
    form, and the card is that of this form."""

    distant = False
    tokenizer = None

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.card: ModelCard = engine.card
        self._form: Any = None
        self._common: Any = None

    def take(self, prompt: TensorPrompt) -> tuple[int, int]:
        """Make the card fit an input; the sizes of its batch and of its axis 1."""
        from pellucid_worker.module_engine import constants

        given = prompt.invoke.tensors
        assert given is not None
        card, form = self._engine.card_for(given, prompt.tensors)
        if self._form is None:
            self._form, self._common, self.card = form, constants(given, prompt.tensors), card
        elif form != self._form:
            raise InputError(
                f"this input is {_shown(form)}, and the first of this job {_shown(self._form)}; inputs that "
                "differ in more than the size of axis 0 take a trace each"
            )
        elif constants(given, prompt.tensors) != self._common:  # one pass has one of each of these
            self.card = self.card.model_copy(update={"packs": False})
        feed = self._engine.feed(given, prompt.tensors)
        return feed.batch, feed.tokens

    def tokenize(self, texts: Sequence[str]) -> NoReturn:
        raise InputError("a torch module takes tensors and has no tokenizer")

    def render(self, chats: Sequence[Any]) -> NoReturn:
        raise InputError("a torch module takes tensors and has no chat template")

    def run(
        self, graph: Graph, prompts: Sequence[Prompt], literals: Mapping[str, WireTensor], **_: Any
    ) -> dict[str, Any]:
        results: dict[str, Any] = self._engine.run(graph, self.card, literals)
        return results


def _tensor_prompt(what: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TensorPrompt:
    tensors: dict[str, WireTensor] = {}

    def taken(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(taken, value))
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: taken(member) for key, member in value.items()}
        if isinstance(value, Value):
            raise InputError(
                f"{what} takes tensors that are there, and {value} is a value of this trace: make inputs "
                "before the block; to use a value, apply the module to it, model(value), or save it for "
                "another trace",
                where=users_line(),
            )
        if not hasattr(value, "layout"):
            raise InputError(
                f"{what} of a torch module takes tensors, and tuples, lists and dicts of them; found "
                f"{type(value).__name__} {value!r:.60}. Of a number or an array make torch.tensor(...)",
                where=users_line(),
            )
        wire = from_torch(value)
        tensors[digest(wire)] = wire
        return TensorRef(digest(wire))

    try:
        given = TensorInput(tuple(map(taken, args)), {name: taken(value) for name, value in kwargs.items()})
    except PellucidError as error:
        error.where = error.where or users_line()
        raise
    if not tensors:
        raise InputError(f"{what} was given no tensor", where=users_line())
    return TensorPrompt(Invoke("", tensors=given), 1, tensors=tensors)


def _shown(form: Any) -> str:
    """A form for people: the shapes and dtypes of its tensors, in order."""
    tensors = [f"[{', '.join(map(str, shape))}] {dtype.removeprefix('torch.')}" for shape, dtype in form[1]]
    return ", ".join(tensors)


def _refuse_servers(remote: Any, blocking: Any) -> None:
    if remote not in (False, None) or not blocking:
        raise InputError(
            "a torch module of yours runs in this process only; a server runs the models it serves, by name: "
            "LanguageModel('name')",
            where=users_line(),
        )


def _engine(module: Any, name: str) -> Any:
    try:
        from pellucid_worker.module_engine import ModuleEngine
    except ImportError as error:
        raise MissingExtraError(
            f"running {name} in this process needs {error.name or 'torch'}, which is not installed: "
            "pip install 'pellucid[local]'"
        ) from error
    return ModuleEngine(module, id=name)
