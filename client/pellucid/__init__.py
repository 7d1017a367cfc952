"""Read and change any hidden state of a transformer, here or on a server.

    from pellucid import LanguageModel

    model = LanguageModel("smollm2")
    with model.trace("The Eiffel Tower is in the city of"):
        hidden = model.layers[10].output.save()
    print(hidden.shape)

Importing this package imports no numpy, httpx, rich, torch or transformers: each comes with its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pellucid_shared import __version__

if TYPE_CHECKING:
    from pellucid_shared import errors as errors
    from pellucid_shared.graph import Graph as Graph

    from . import torch as torch
    from ._any_model import Model as Model
    from ._config import config as config
    from ._files import load_experiment as load_experiment
    from ._files import save_experiment as save_experiment
    from ._job import Job as Job
    from ._model import LanguageModel as LanguageModel
    from ._save import save as save

#: Public name -> (module, attribute); an empty attribute is the module itself.
_PUBLIC = {
    "Graph": ("pellucid_shared.graph", "Graph"),
    "Job": ("pellucid._job", "Job"),
    "LanguageModel": ("pellucid._model", "LanguageModel"),
    "Model": ("pellucid._any_model", "Model"),
    "config": ("pellucid._config", "config"),
    "errors": ("pellucid_shared.errors", ""),
    "load_experiment": ("pellucid._files", "load_experiment"),
    "save": ("pellucid._save", "save"),
    "save_experiment": ("pellucid._files", "save_experiment"),
    "torch": ("pellucid.torch", ""),
}

__all__ = [
    "Graph",
    "Job",
    "LanguageModel",
    "Model",
    "__version__",
    "config",
    "errors",
    "load_experiment",
    "save",
    "save_experiment",
    "torch",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        _refuse_what_is_to_come(name)
        raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def _refuse_what_is_to_come(name: str) -> None:
    if not name.startswith("_"):
        later = importlib.import_module("pellucid._later")
        later.refuse(later.PACKAGE, name, f"pellucid.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
