"""``LanguageModel``: a model here or on a server, its module tree, and the traces over it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self, TypeVar, overload

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import (
    ConnectionFailedError,
    InputError,
    PellucidError,
    UnknownModuleError,
    did_you_mean,
)
from pellucid_shared.graph import Graph
from pellucid_shared.regions import GENERATION_OPTIONS, Generation, generation

from ._config import config
from ._edit import Edit, Editing
from ._files import Experiment
from ._http import Connection
from ._later import TRACE_OPTIONS, refuse
from ._lines import at_users_line, users_line
from ._local import LoadOptions, LocalModel
from ._names import Names
from ._recorder import Recorder, session_of
from ._remote import RemoteModel
from ._replay import replay
from ._run import Run
from ._scan import ScanRun
from ._sites import read_result
from ._target import Target
from ._tracer import Session, TraceOptions, Tracer, one_input
from ._tree import Module, show_tree
from .compat import Runner

T = TypeVar("T", bound=Tracer)

_TRACE_OPTIONS = ("remote", "progress", "blocking", "seed", "trace", "tuple_outputs", "scan", "validate")
_RUNNER_OPTIONS = ("remote", "progress", "seed", "scan", "validate")
_MODEL_OPTIONS = (
    "remote",
    "model",
    "tokenizer",
    "device_map",
    "dtype",
    "dispatch",
    "rename",
    "tuple_outputs",
)


class LanguageModel(Module):
    """A causal language model whose hidden states can be read and changed.

        model = LanguageModel("smollm2")
        with model.trace("The Eiffel Tower is in the city of") as tracer:
            model.model.layers[3].mlp.output[:] = 0
            logits = model.lm_head.output[:, -1].save()

    Args:
        name: the name it is served under, a hub id, or a folder.
        remote: a server's URL; True for the configured one (``PELLUCID_HOST``); False for this process. Left
            out: the configured server if there is one, else this process. A folder (one with a config.json,
            or written as a path), or a model that is given, runs in this process.
        model, tokenizer: a transformers model that is loaded already, and its tokenizer.
        device_map, dtype: how transformers loads it in this process; the checkpoint's dtype if left out.
        dispatch: load it now. Left out, it is loaded by the first run; until then its tree, its shapes and
            ``scan`` come from its config alone.
        rename: names of your own for modules; see :meth:`rename`.
        tuple_outputs: decoder blocks that return a tensor are seen as returning a tuple of one, and
            ``.input`` is the tuple of arguments, as they were in earlier years.

    Raises:
        ModelNotFoundError: the server does not serve it; lists what it does.
        ConnectionFailedError: no server answers, or none is configured.
        InputError: no name, an unknown option, a URL that is none, or an alias that clashes.
        UnknownModuleError: a module to be renamed does not exist.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        remote: bool | str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        device_map: Any = None,
        dtype: Any = None,
        dispatch: bool = False,
        rename: Mapping[str, str] | None = None,
        tuple_outputs: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__(self, "")
        _refuse_options("LanguageModel", unknown, {}, _MODEL_OPTIONS)
        source = str(name)
        if not source:
            raise InputError(
                "a model has a name: of one served, of one on the hub, or a folder", where=users_line()
            )
        folder = Path(source).expanduser()
        is_folder = (folder / "config.json").is_file() or source.startswith(("/", ".", "~"))
        here = model is not None or is_folder
        self._name = folder.resolve().name if is_folder and model is None else source
        self._options = LoadOptions(
            source=str(folder) if is_folder else source,
            device_map=device_map,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            model=model,
            tokenizer=tokenizer,
        )
        self._tuple_outputs = tuple_outputs
        self._edits: tuple[Edit, ...] = ()
        self._origin: LanguageModel | None = None
        self._aliases: Names | None = None
        self._rename, self._renamed_at = rename or {}, users_line()
        self._lock = threading.Lock()
        self._here: LocalModel | None = None
        self._there: dict[str, RemoteModel] = {}
        if remote is None:
            remote = not here and config.host is not None
        self._remote: bool | str = remote
        if remote is not False or dispatch:
            with at_users_line():
                target = self._target(None)
                if dispatch and isinstance(target, LocalModel):
                    _ = target.engine
                _ = self._names()

    @property
    def name(self) -> str:
        """The name graphs give the model."""
        return self._name

    @property
    def card(self) -> ModelCard:
        """What is known of the model: tree, sites, order of calls."""
        return self._target(None).card

    @property
    def config(self) -> SimpleNamespace:
        """The model's config, by attribute; configs inside it likewise."""
        return _by_attribute(self.card.config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: transformers' own in this process (None where the model has none); on a server, one
        with its most used methods (``model.tokenizer(text)``, ``.decode``, ``.apply_chat_template``, ...)."""
        return self._target(None).tokenizer

    def rename(self, names: Mapping[str, str]) -> None:
        """Give modules names of your own; both work from then on, also for what is below them.

            model.rename({"transformer.h": "layers", "attn": "attention"})

        Args:
            names: the path of a module -> its alias, which stands beside it and at the root; or a name that
                many modules have -> the alias of each of them.

        Raises:
            UnknownModuleError: there is no such module; names the nearest.
            InputError: the alias is no name, or something else is called so.
        """
        with at_users_line():
            self._names().add(names, self.card, set(dir(type(self))))

    @overload
    def trace(self, *inputs: Any, trace: Literal[False], **options: Any) -> Any: ...

    @overload
    def trace(self, *inputs: Any, **options: Any) -> Tracer: ...

    def trace(self, *inputs: Any, **options: Any) -> Any:
        """``with model.trace(prompt):`` one forward pass; read, change and save what it computes.

        Args:
            inputs: one input: a str, a list of str (a batch), token ids (a list, a list of lists, a tensor),
                or a dict with input_ids and attention_mask. Left out: ``with tracer.invoke(prompt):`` gives
                each of several.
            remote: as for the model; left out, where the model is.
            progress: False shows no status line.
            seed: of the random numbers that the trace's own ops draw.
            blocking: False ends the block once the job is sent; ``tracer.job`` follows it. Remote only.
            trace: False runs the model at once and gives its output:
                ``model.trace(prompt, trace=False).logits``.
            tuple_outputs: as for the model; left out, as the model was made.
            scan, validate: accepted; shapes are always checked while the trace is written.

        Raises:
            EmptyPromptError: no text and no ids.
            InputError: not one of the forms taken, an unknown option, or ``blocking=False`` of a local run.
        """
        tracer = self._begin(Tracer, "model.trace", inputs, options, None)
        if options.get("trace", True):
            return tracer
        if not inputs:
            raise InputError(
                "model.trace(trace=False) runs the model at once: give it an input", where=users_line()
            )
        with tracer:
            output = self.output.save()
        return output  # noqa: RET504 (the end of the block fills it)

    def scan(self, *inputs: Any, **options: Any) -> Tracer:
        """``with model.scan(prompt):`` a trace that is written and checked, and never run: shapes and errors
        are known inside the block, and saved names have no value after it. Nothing is loaded for it: a model
        in this process, of any size, is known by its config. Arguments as for :meth:`trace`."""
        return self._begin(Tracer, "model.scan", inputs, options, None, ScanRun)

    def forward(self, **options: Any) -> Runner:
        """``with model.forward() as runner:``, the founding spelling: see :class:`pellucid.compat.Runner`.

        Args:
            options: ``remote``, ``progress`` and ``seed``, as for :meth:`trace`.
        """
        _refuse_options("model.forward", _unknown(options, _RUNNER_OPTIONS), TRACE_OPTIONS, _RUNNER_OPTIONS)
        opened = {**options, "tuple_outputs": True}
        return self._begin(Runner, "model.forward", (), opened, None)

    def generate(self, *inputs: Any, **options: Any) -> Tracer:
        """``with model.generate(prompt, max_new_tokens=5) as tracer:`` a generation, step by step.

        Step 0 is the pass over the prompt; each step leads to one token. ``tracer.iter`` and ``next()`` name
        steps, and ``tracer.result`` is the ids of prompt and new tokens, [batch, prompt + new].

        Args:
            inputs: as for ``trace``.
            remote, progress, seed: as for ``trace``; sampling draws from a generator of the seed.
            max_new_tokens: steps at most, 20 where it is left out.
            options: min_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id
                and pad_token_id, as in transformers; the model's generation config decides what is left out.

        Raises:
            EmptyPromptError: no text and no ids.
            InputError: not one of the forms taken, or an option that is unknown or out of bounds.
        """
        own = {k: v for k, v in options.items() if k in GENERATION_OPTIONS and v is not None}
        eos = own.get("eos_token_id")
        if isinstance(eos, int):
            own["eos_token_id"] = [eos]
        try:
            wanted = generation({"max_new_tokens": 20, **own})
        except PellucidError as error:
            raise InputError(error.message, where=users_line()) from None
        rest = {k: v for k, v in options.items() if k not in GENERATION_OPTIONS}
        return self._begin(Tracer, "model.generate", inputs, rest, wanted)

    def session(
        self, *, remote: bool | str | None = None, progress: bool = True, blocking: bool = True
    ) -> Session:
        """``with model.session() as s:`` several traces and generations as one job; values flow between them.

        Args:
            remote, progress, blocking: as for ``trace``, for all of its traces.
        """
        return Session(self, self._run(remote, progress, blocking))

    def edit(self, *, inplace: bool = False) -> Editing:
        """``with model.edit() as edited:`` interventions that stay: they hold in every trace of ``edited``.

            with model.edit() as edited:
                model.layers[3].mlp.output[:, -1] = 0
            with edited.trace(prompt):
                logits = model.lm_head.output.save()

        The block runs nothing. Its lines are written again at the head of every later body: in each invoke,
        in ``trace``, ``generate`` (where they hold in every step) and sessions, here and on a server; edits
        hold one after another, in the order they were made. ``model`` itself stays as it is, and its modules
        and those of ``edited`` are the same in a trace of either.

        In the block, sizes that depend on the prompt are not known: they can stand in shapes and indices and
        be computed with by ``+ - * // %``; whatever else asks for one is an error that names it.

        Args:
            inplace: make the edit in this model, not in a second handle on it.

        Raises:
            RecordingError: something is saved, steps are named, or a size is asked for.
            GraphError: a line that does not fit every prompt, or that cannot reach the model.
        """
        return Editing(self, self if inplace else self._handle())

    def clear_edits(self) -> None:
        """Forget the edits that this handle holds; other handles keep theirs."""
        self._edits = ()

    @property
    def generator(self) -> Generator:
        """What a generation ends with: ``model.generator.output`` is ``tracer.result``."""
        return Generator(self)

    def run(
        self, experiment: Graph | Experiment, *, remote: bool | str | None = None, progress: bool = True
    ) -> dict[str, Any]:
        """Run an experiment that is written already, on this model.

            results = model.run(pellucid.load_experiment("patch.json"))

        Args:
            experiment: what ``pellucid.load_experiment`` gave, or a Graph that names no tensors. The model it
                was written for may be another, of the same modules.
            remote, progress: as for :meth:`trace`.

        Returns:
            The saved values by name: torch tensors (numpy arrays where torch is absent), and structures.

        Raises:
            GraphError: it does not fit this model; ``node`` names the node.
            InputError: neither a graph nor an experiment, or its tensors are not with it.
        """
        with at_users_line():
            target = self._target(remote)
        return replay(self._name, target, experiment, progress=progress)

    def _begin(
        self,
        tracer: type[T],
        what: str,
        inputs: tuple[Any, ...],
        options: Mapping[str, Any],
        wanted: Generation | None,
        kind: type[Run] = Run,
    ) -> T:
        """A trace of any kind, with the options that all have."""
        known = _TRACE_OPTIONS if wanted is None else (*_TRACE_OPTIONS, *GENERATION_OPTIONS)
        _refuse_options(what, _unknown(options, _TRACE_OPTIONS), TRACE_OPTIONS, known)
        seed = options.get("seed", 0)
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise InputError(f"seed is a whole number from 0, found {seed!r:.60}", where=users_line())
        given = one_input(inputs, what) if inputs else None
        tuples = bool(options.get("tuple_outputs", self._tuple_outputs))
        own = TraceOptions(wanted, seed, tuples, self._edits)
        session = session_of(self)
        blocking = bool(options.get("blocking", True))
        if session is not None and blocking:
            return tracer(session.run, given, own, alone=False)
        if session is not None:
            raise InputError(
                "a trace of a session has no job of its own; give blocking=False to model.session()",
                where=users_line(),
            )
        run = self._run(options.get("remote"), bool(options.get("progress", True)), blocking, kind)
        return tracer(run, given, own)

    def _run(self, remote: Any, progress: bool, blocking: bool, kind: type[Run] = Run) -> Run:
        """What carries out a job that is about to be written."""
        with at_users_line():
            target = self._target(remote)
        if not blocking and isinstance(target, LocalModel):
            raise InputError(
                "blocking=False leaves a run to a server's job, and this one runs in this process, which has "
                "none: leave it out, or name a server with PELLUCID_HOST or remote=",
                where=users_line(),
            )
        return kind(Recorder(self.name, target, self), progress=progress, blocking=blocking)

    def __repr__(self) -> str:
        return f"{self._name}: {show_tree(self.card, self._names())}"

    def _names(self) -> Names:
        """The aliases; those the model was made with are read with its card."""
        if self._origin is not None:
            return self._origin._names()
        if self._aliases is None:
            names = Names()
            try:
                names.add(self._rename, self.card, set(dir(type(self))))
            except (InputError, UnknownModuleError) as error:
                error.where = self._renamed_at
                raise
            self._aliases = names
        return self._aliases

    def _load(self) -> None:
        """Load a model in this process, whose card then knows what only a run shows."""
        target = self._target(None)
        if isinstance(target, LocalModel):
            _ = target.engine

    def _handle(self) -> Self:
        """A second handle on this model, with edits of its own from here on."""
        handle = object.__new__(type(self))
        handle.__dict__.update(self.__dict__, _model=handle, _origin=self._origin or self)
        return handle

    def _is_of(self, other: object) -> bool:
        """Whether both are handles on one model."""
        return isinstance(other, LanguageModel) and (other._origin or other) is (self._origin or self)

    def _target(self, remote: bool | str | None) -> Target:
        if self._origin is not None:
            return self._origin._target(self._remote if remote is None else remote)
        remote = self._remote if remote is None else remote
        if not isinstance(remote, bool | str):
            raise InputError(f"remote= is True, False, or the URL of a server; found {remote!r:.60}")
        with self._lock:
            if remote is False:
                if self._here is None:
                    self._here = LocalModel(self._name, self._options)
                return self._here
            url = remote if isinstance(remote, str) else config.host
            if url is None:
                raise ConnectionFailedError(
                    "no server is configured: set PELLUCID_HOST to its URL, give remote='http://host:8470', "
                    "or start one with `pellucid up NAME=PATH`"
                )
            if url not in self._there:
                self._there[url] = RemoteModel(Connection(url), self._name)
            return self._there[url]


class Generator:
    """``model.generator``: its output is what a generation ends with."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @property
    def output(self) -> Any:
        """The ids of prompt and new tokens, [batch, prompt + new] int64."""
        return read_result(self._model._recorder())


def _unknown(options: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in known}


def _by_attribute(config: Mapping[str, Any]) -> SimpleNamespace:
    """A config by attribute. What is inside it is a config too where it names its model; else a dict."""

    def inside(value: Any) -> Any:
        return _by_attribute(value) if isinstance(value, dict) and "model_type" in value else value

    return SimpleNamespace(**{name: inside(value) for name, value in config.items()})


def _refuse_options(
    what: str, given: Mapping[str, Any], to_come: Mapping[str, str], known: Sequence[str]
) -> None:
    """Raise the error for the first option that ``what`` does not have."""
    for name in given:
        refuse(to_come, name, f"{what}({name}=)")
        raise InputError(
            f"{what} has no option {name!r}; it has {', '.join(known)}.{did_you_mean(name, known)}",
            where=users_line(),
        )
