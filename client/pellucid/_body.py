"""What a body may ask of its tracer or its invoke, beside the sites of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from pellucid_shared.errors import InputError

from ._cache import Cache, called, outputs
from ._lines import users_line
from ._recorder import Recorder

if TYPE_CHECKING:
    from ._tree import Module

T = TypeVar("T")


class Body:
    """What ``model.trace(prompt)`` and ``tracer.invoke(prompt)`` share."""

    _recorder: Recorder

    def cache(
        self, modules: Iterable[Module | str] | Module | str | None = None, include_inputs: bool = False
    ) -> Cache:
        """Save what modules returned, as the model went on with it: edits of the body show.

        Args:
            modules: modules, or their paths; all that are called, left out.
            include_inputs: save their arguments too.

        Returns:
            After the block ``cache["model.layers.0"].output``, or ``cache.model.layers[0].output``; with
            ``include_inputs`` also ``.input`` (the first argument) and ``.inputs`` (all of them).

        Raises:
            SiteError: a module that is never called.
            RecordingError: between two bodies.
        """
        self._recorder.current_invoke()
        cache = Cache(self._recorder, called(self._recorder, modules), include_inputs)
        self._recorder.endings.append(cache.read)
        return cache

    def save_all(self) -> Any:
        """Save the output of every module that is called: path -> value, after the block as before it.

        A module that was called several times is there with its first call.
        """
        self._recorder.current_invoke()
        return outputs(self._recorder)

    def apply(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """``function(*args, **kwargs)``, called here and now: what it does to values is recorded."""
        if not callable(function):
            raise InputError(
                f"tracer.apply takes a function and its arguments, found {function!r:.60}", where=users_line()
            )
        return function(*args, **kwargs)

    def barrier(self, count: int = 0) -> Callable[[], None]:
        """Accepted, and does nothing: values cross from one invoke to the next by their names."""
        return _nothing


def _nothing() -> None:
    """What a barrier is called for."""
