"""The world values live in: torch where it is installed, numpy elsewhere. Decided at the first trace."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ._recorder import Recorder


class Backend(Protocol):
    """What differs between the two."""

    def tensor(self, recorder: Recorder, node: int) -> Any:
        """A new value for a node that yields a tensor."""
        ...

    def received(self, result: Any) -> Any:
        """A WireTensor of a result as users get it, or what is so already."""
        ...

    def fill(self, value: Any, result: Any) -> None:
        """Turn a saved value into its result, as it was received or as users get it."""
        ...

    def adopt(self, recorder: Recorder, target: Any) -> Any:
        """Make the user's own tensor, about to be written with a value, a value of the trace."""
        ...

    def release(self, recorder: Recorder) -> None:
        """Give adopted tensors back unchanged, after a run that failed."""
        ...

    def recording(self, recorder: Recorder) -> AbstractContextManager[Any]:
        """Entered while a trace is written."""
        ...

    def tracks(self) -> bool:
        """Whether gradients pass what is written now: not under ``torch.no_grad()``."""
        ...

    def shape(self, sizes: tuple[int, ...]) -> Any: ...

    def dtype(self, name: str) -> Any: ...

    def device(self) -> Any: ...


@functools.cache
def backend() -> Backend:
    """The backend of this process."""
    try:
        import torch  # noqa: F401
    except ImportError:
        from ._plain import PlainBackend

        return PlainBackend()
    from ._tensor import TorchBackend

    return TorchBackend()
