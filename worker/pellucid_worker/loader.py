"""Loading a model from a folder or a hub id, with transformers and accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pellucid_shared.errors import InputError, NotFoundError

from .engine import Engine
from .probe import probe

Progress = Callable[[float], None]


def load(
    source: str | Path,
    *,
    id: str | None = None,
    dtype: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Engine:
    """A resident model, probed and ready.

    Args:
        source: a folder, or a hub id.
        id: the name it is served under; by default the source.
        dtype: ``float32``, ``bfloat16``, ...; by default the checkpoint's own.
        device_map: as in ``from_pretrained``; by default the first GPU where there is one, else the CPU.
        revision: of a hub model.
        progress: told the part that is done, 0 to 1.

    Raises:
        NotFoundError: no such folder, or the hub has no such model or cannot be reached.
        InputError: what is there is not a causal language model, or the dtype is unknown.
    """
    report = progress or (lambda _: None)
    name = _found(source)
    report(0.05)
    model = _model(name, dtype, device_map, revision)
    report(0.8)
    tokenizer = load_tokenizer(name, revision=revision)
    report(0.85)
    card = probe(model, id=id or str(source), source=str(source), has_tokenizer=tokenizer is not None)
    report(1.0)
    return Engine(model, tokenizer, card)


def without_weights(
    source: str | Path, *, dtype: str | None = None, revision: str | None = None
) -> torch.nn.Module:
    """The model that ``load`` would load, on the meta device: its config is read, and no weights.

    Raises:
        NotFoundError, InputError: as for ``load``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = _found(source)
    _require_dtype(dtype)
    with _loading(name), torch.device("meta"):
        config: Any = AutoConfig.from_pretrained(name, revision=revision)
        given = {} if dtype is None else {"dtype": dtype}
        untyped: Any = AutoModelForCausalLM
        model: torch.nn.Module = untyped.from_config(config, **given)
    return model.eval().requires_grad_(False)


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub id, or None where there is none."""
    from transformers import AutoTokenizer

    with _quiet(), contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found: Any = AutoTokenizer.from_pretrained(str(source), revision=revision)
        # Where its files are missing, transformers makes up one that knows special tokens only.
        if set(found.get_vocab()) - set(found.all_special_tokens):
            return found
    return None


def _found(source: str | Path) -> str:
    """The name that transformers finds a model by."""
    folder = Path(source).expanduser()
    if not folder.is_dir() and _looks_like_a_path(str(source)):
        raise NotFoundError(f"there is no folder {source}; give a folder with a config.json, or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{source} holds no config.json, so it is not a transformers model")
    return str(folder if folder.is_dir() else source)


def _looks_like_a_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def _model(name: str, dtype: str | None, device_map: Any, revision: str | None) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    _require_dtype(dtype)
    if device_map is None and torch.cuda.is_available():
        device_map = {"": 0}
    with _loading(name):
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", device_map=device_map, revision=revision
        )
    return model.eval().requires_grad_(False)


def _require_dtype(dtype: str | None) -> None:
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"there is no dtype {dtype!r}; try float32, bfloat16 or float16")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """What transformers raises, as errors of ours."""
    with _quiet():
        try:
            yield
        except OSError as error:
            raise NotFoundError(f"{name} cannot be loaded: {_first_line(error)}") from None
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{name} is not a causal language model: {_first_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars: loading is reported by us."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n", 1)[0] or type(error).__name__)[:300]
