"""A tensor the run will make: what every value can be asked while the experiment is being written.

With torch it is mixed into a ``torch.Tensor`` subclass (``_tensor.py``), without it into a class of its own
(``_plain.py``); both add the operators (``_operators.py``).
"""

from __future__ import annotations

from typing import Any, NoReturn

from pellucid_shared.errors import RecordingError, ShapeError
from pellucid_shared.specs import DTYPES, Dim, TensorSpec, is_complex, is_floating
from pellucid_shared.values import Ref

from ._backend import backend
from ._later import VALUE, refuse
from ._lines import users_line
from ._recorder import Recorder


class Value:
    """One node's tensor."""

    __slots__ = ()  # an instance may become a torch.Tensor: no storage of its own

    _recorder: Recorder
    _node: int

    # --- the graph -----------------------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        return self._recorder

    def ref(self, recorder: Recorder) -> Ref:
        """This value as an argument in the graph of ``recorder``."""
        self._recorder.require_open(self)
        if self._recorder is not recorder:
            raise RecordingError(
                f"{self} belongs to another trace that is still open; save it and use it after that block",
                where=users_line(),
            )
        return Ref(self._node)

    @property
    def value(self) -> Any:
        """The plain value, once it was saved and the run completed.

        Raises:
            ValueNotReadyError: before the block ends, where the value was not saved, or the job failed.
        """
        raise self._recorder.not_ready(self)

    @property
    def original(self) -> Any:
        """What was at the value's site before this graph's edits there, wherever they are written.

        Raises:
            RecordingError: the value is not that of a site, or of another body.
        """
        from ._passing import original

        return original(self._recorder, self._node)

    # --- what is known before the run ----------------------------------------------------------------------

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype; asks the tokenizer for the token count where the shape depends on it."""
        self._recorder.require_open(self)
        spec = self._recorder.exact_spec(self._node)
        assert isinstance(spec, TensorSpec)
        return spec

    @property
    def _known(self) -> TensorSpec:
        """The spec, where sizes do not matter."""
        self._recorder.require_open(self)
        spec = self._recorder.spec(self._node)
        assert isinstance(spec, TensorSpec)
        return spec

    @property
    def shape(self) -> Any:
        """Sizes of the axes, as concrete numbers."""
        return backend().shape(tuple(map(self._exact, self.spec.shape)))

    @property
    def dtype(self) -> Any:
        return backend().dtype(self._known.dtype)

    @property
    def device(self) -> Any:
        """Where values seem to live: devices are the engine's business, and ignored where given."""
        return backend().device()

    @property
    def ndim(self) -> int:
        return self._known.ndim

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def is_cuda(self) -> bool:
        return False

    def dim(self) -> int:
        return self._known.ndim

    ndimension = dim

    def size(self, dim: int | None = None) -> Any:
        """All sizes, or that of one axis."""
        if dim is None:
            return self.shape
        ndim = self._known.ndim
        if not -ndim <= dim < ndim:
            raise ShapeError(f"{self} has {ndim} axes; axis {dim} was asked", where=users_line())
        return self._exact(self._recorder.exact_size(self._node, dim % ndim))

    def numel(self) -> int:
        return int(self._exact(self.spec.numel))

    nelement = numel

    def element_size(self) -> int:
        return DTYPES[self._known.dtype].itemsize

    def is_floating_point(self) -> bool:
        return is_floating(self._known.dtype)

    def is_complex(self) -> bool:
        return is_complex(self._known.dtype)

    def _exact(self, size: int) -> int:
        if isinstance(size, Dim):
            raise RecordingError(
                f"a size of {self} depends on data (at most {int(size)}), so only the run knows it; use "
                "the value itself, e.g. .sum() of a mask instead of the length of what it selects",
                where=users_line(),
            )
        return size

    def cpu(self) -> Any:
        """The value itself: devices are the engine's business."""
        self._recorder.require_open(self)
        return self

    def cuda(self, *device: Any, **options: Any) -> Any:
        """The value itself: devices are the engine's business."""
        self._recorder.require_open(self)
        return self

    def __len__(self) -> int:
        if not self._known.shape:
            raise RecordingError(
                f"{self} is a single number: it has no length and cannot be iterated", where=users_line()
            )
        return int(self.size(0))

    __hash__ = object.__hash__

    # --- what only the run can answer ----------------------------------------------------------------------

    def __bool__(self) -> bool:
        if self._known.numel != 1:
            self._refuse("it has several elements and is neither true nor false; use .any() or .all()")
        self._refuse(
            "whether it is true is known only to the run, so Python cannot branch on it here; write "
            "`with tracer.cond(flag):` and `with tracer.cond.else_():`, tracer.select(flag, a, b), or "
            "tracer.while_(lambda: flag, max_turns=n); or save it and branch after the block"
        )

    def __float__(self) -> float:
        self._refuse_number("float()")

    def __int__(self) -> int:
        self._refuse_number("int()")

    def __complex__(self) -> complex:
        self._refuse_number("complex()")

    def __index__(self) -> int:
        self._refuse(
            "it cannot be a Python index or count, which the run alone knows; index a value of the trace "
            "with it, loop by tracer.while_(lambda: flag, max_turns=n), or save it and use it after the block"
        )

    def __contains__(self, item: Any) -> bool:
        self._refuse("`in` is known only to the run; use (x == item).any()")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("it is no array yet; .save() it and use it after the block")

    def item(self) -> NoReturn:
        self._refuse_number(".item()")

    def tolist(self) -> NoReturn:
        self._refuse_number(".tolist()")

    def numpy(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("it is no array yet; .save() it and use it after the block")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse(
            "it cannot be copied or stored yet; use .clone(), or .save() it and store it after the block"
        )

    def __copy__(self) -> NoReturn:
        self.__reduce_ex__(2)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce_ex__(2)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        self._recorder.require_open(self)
        refuse(VALUE, name, f"assigning to .{name} of a value")
        raise RecordingError(
            f"{self}: .{name} of a value cannot be assigned; edit the value in place, x[...] = v, or assign "
            "to .output or .input of a module",
            where=users_line(),
        )

    def _refuse_number(self, spelling: str) -> NoReturn:
        self._refuse(
            f"{spelling} is known only to the run; compute with the value itself, or .save() it and call "
            f"{spelling} after the block"
        )

    def _refuse(self, reason: str) -> NoReturn:
        self._recorder.require_open(self)
        raise RecordingError(f"{self}: {reason}", where=users_line())

    # --- showing: never records ----------------------------------------------------------------------------

    def _describe(self) -> str:
        line = self._recorder.lines[self._node]
        return f"<{self._recorder.describe(self._node)} {self._recorder.show_spec(self._node)}, {line}>"

    def __repr__(self, **_: Any) -> str:
        return self._describe()

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return self._describe()  # a format for numbers (`{loss:.3f}`) has no number to format yet
