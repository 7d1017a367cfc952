"""``LanguageModel``: a model here or on a server, its module tree, and the traces over it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pellucid_shared.card import ModelCard
from pellucid_shared.errors import ConnectionFailedError, InputError, did_you_mean
from pellucid_shared.graph import Graph

from ._config import config
from ._files import Experiment
from ._http import Connection
from ._later import MODEL_OPTIONS, TRACE_OPTIONS, refuse
from ._lines import at_users_line, users_line
from ._local import LoadOptions, LocalModel
from ._remote import RemoteModel
from ._replay import replay
from ._target import Target
from ._tracer import Tracer, one_input
from ._tree import Module, show_tree

_TRACE_OPTIONS = ("remote", "progress", "blocking")
_MODEL_OPTIONS = ("remote", "model", "tokenizer", "device_map", "dtype", "dispatch")


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

    Raises:
        ModelNotFoundError: the server does not serve it; lists what it does.
        ConnectionFailedError: no server answers, or none is configured.
        InputError: no name, an unknown option, or a URL that is none.
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
        **unknown: Any,
    ) -> None:
        super().__init__(self, "")
        _refuse_options("LanguageModel", unknown, MODEL_OPTIONS, _MODEL_OPTIONS)
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
        self._lock = threading.Lock()
        self._here: LocalModel | None = None
        self._there: dict[str, RemoteModel] = {}
        if remote is None:
            remote = not here and config.host is not None
        self._remote: bool | str = remote
        if remote is not False or dispatch:
            with at_users_line():
                _ = self.card

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
        """The model's config, by attribute."""
        return SimpleNamespace(**self.card.config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: transformers' own in this process; on a server, one that answers
        ``tokenizer(text)["input_ids"]``."""
        target = self._target(None)
        return target.engine.tokenizer if isinstance(target, LocalModel) else RemoteTokenizer(target)

    def trace(self, *inputs: Any, **options: Any) -> Tracer:
        """``with model.trace(prompt):`` one forward pass; read, change and save what it computes.

        Args:
            inputs: one input: a str, a list of str (a batch), token ids (a list, a list of lists, a tensor),
                or a dict with input_ids and attention_mask. Left out: ``with tracer.invoke(prompt):`` gives
                each of several.
            remote: as for the model; left out, where the model is.
            progress: False shows no status line.
            blocking: False ends the block once the job is sent; ``tracer.job`` follows it. Remote only.

        Raises:
            EmptyPromptError: no text and no ids.
            InputError: not one of the forms taken, an unknown option, or ``blocking=False`` of a local run.
        """
        unknown = {name: value for name, value in options.items() if name not in _TRACE_OPTIONS}
        _refuse_options("model.trace", unknown, TRACE_OPTIONS, _TRACE_OPTIONS)
        given = one_input(inputs, "model.trace") if inputs else None
        progress = bool(options.get("progress", True))
        with at_users_line():
            target = self._target(options.get("remote"))
        blocking = bool(options.get("blocking", True))
        if not blocking and isinstance(target, LocalModel):
            raise InputError(
                "blocking=False leaves a run to a server's job, and this one runs in this process, which has "
                "none: leave it out, or name a server with PELLUCID_HOST or remote=",
                where=users_line(),
            )
        return Tracer(self, target, given, progress=progress, blocking=blocking)

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

    def __repr__(self) -> str:
        return f"{self._name}: {show_tree(self.card)}"

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


class RemoteTokenizer:
    """The tokenizer of a served model, asked over HTTP."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self, text: str | list[str]) -> dict[str, Any]:
        """``{"input_ids": ids}`` of a text, or of each of a list of texts."""
        return {"input_ids": self.encode(text) if isinstance(text, str) else self._target.tokenize(text)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._target.tokenize([text])[0]
