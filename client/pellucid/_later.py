"""Names of the language that this version does not have yet. Each says so when asked for."""

from __future__ import annotations

from collections.abc import Mapping

from pellucid_shared import __version__
from pellucid_shared.errors import NotYetError

from ._lines import users_line

_NO_FLOW = "control flow on values in Python's own words; write tracer.cond(flag) and tracer.loop(n)"
_LANGUAGE_MODELS = (
    "this version has LanguageModel, for causal language models, and Model, for any torch module"
)

#: Name -> what it is, and what to do instead.
PACKAGE = {
    "EncoderModel": f"encoders; {_LANGUAGE_MODELS}",
    "VisionLanguageModel": f"models of images and text; {_LANGUAGE_MODELS}",
    "DiffusionModel": f"diffusion pipelines; {_LANGUAGE_MODELS}",
    "explain": "plans of graphs; tracer.graph is the graph",
    "experiment": _NO_FLOW,
    "collect": "activations over a data set; trace each prompt, or a batch of them",
}
MODEL = {
    "sweep": "one experiment over many settings; loop over traces, or give trace several invokes",
    "std": "standard names of modules; print(model) shows the model's",
}
VALUE = {
    "register_hook": "functions over gradients; read .grad, and assign to it",
}
TRACER = {
    "output": "the output kept without save; write model.output.save()",
}
SESSION = {
    "parameter": "training on the server; gradients of values can be read and written: h.grad",
}
TRACE_OPTIONS = {
    "exclusive": "a run of one's own; the pass is shared only with the trace's own invokes",
}


def refuse(names: Mapping[str, str], name: str, spelling: str) -> None:
    """Raise NotYetError, calling it ``spelling``, if ``name`` is one of the names that are to come."""
    if name in names:
        raise NotYetError(
            f"{spelling} is not in pellucid {__version__} yet: {names[name]}", where=users_line()
        )
