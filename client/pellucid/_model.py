"""``LanguageModel``: a model here or on a server, its module tree, and the traces over it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, overload

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import ConnectionFailedError, InputError, UnknownModuleError, did_you_mean

from ._config import config
from ._http import Connection
from ._later import TRACE_OPTIONS, refuse
from ._lines import at_users_line, users_line
from ._local import LoadOptions, LocalModel
from ._names import Names
from ._remote import RemoteModel
from ._scan import Scan
from ._target import Target
from ._tracer import Tracer, one_input
from ._tree import Module, show_tree
from .compat import Runner

_TRACE_OPTIONS = ("remote", "progress", "trace", "tuple_outputs", "scan", "validate")
_RUNNER_OPTIONS = ("remote", "progress", "scan", "validate")
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
        dispatch: load it now, not on first use.
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
            trace: False runs the model at once and gives its output:
                ``model.trace(prompt, trace=False).logits``.
            tuple_outputs: as for the model; left out, as the model was made.
            scan, validate: accepted; shapes are always checked while the trace is written.

        Raises:
            EmptyPromptError: no text and no ids.
            InputError: not one of the forms taken, or an unknown option.
        """
        tracer = self._opened(Tracer, "model.trace", inputs, options)
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
        are known inside the block, and saved names have no value after it. Arguments as for :meth:`trace`."""
        return self._opened(Scan, "model.scan", inputs, options)

    def forward(self, **options: Any) -> Runner:
        """``with model.forward() as runner:``, the founding spelling: see :class:`pellucid.compat.Runner`.

        Args:
            options: ``remote`` and ``progress``, as for :meth:`trace`.
        """
        _refuse_options("model.forward", _unknown(options, _RUNNER_OPTIONS), TRACE_OPTIONS, _RUNNER_OPTIONS)
        with at_users_line():
            target = self._target(options.get("remote"))
        return Runner(self, target, progress=bool(options.get("progress", True)))

    def _opened(
        self, kind: type[Tracer], what: str, inputs: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Tracer:
        _refuse_options(what, _unknown(options, _TRACE_OPTIONS), TRACE_OPTIONS, _TRACE_OPTIONS)
        given = one_input(inputs, what) if inputs else None
        with at_users_line():
            target = self._target(options.get("remote"))
        tracer = kind(self, target, given, progress=bool(options.get("progress", True)))
        tracer._recorder.tuple_outputs = bool(options.get("tuple_outputs", self._tuple_outputs))
        return tracer

    def __repr__(self) -> str:
        return f"{self._name}: {show_tree(self.card, self._names())}"

    def _names(self) -> Names:
        """The aliases; those the model was made with are read with its card."""
        if self._aliases is None:
            names = Names()
            try:
                names.add(self._rename, self.card, set(dir(type(self))))
            except (InputError, UnknownModuleError) as error:
                error.where = self._renamed_at
                raise
            self._aliases = names
        return self._aliases

    def _target(self, remote: bool | str | None) -> Target:
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
