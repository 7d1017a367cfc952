"""Names of the language that this version does not have yet. Each says so when asked for."""

from __future__ import annotations

from collections.abc import Mapping

from pellucid_shared import __version__
from pellucid_shared.errors import NotYetError

from ._lines import users_line

_NO_GRADIENTS = "gradients; this version reads and writes values only"
_NO_FLOW = "control flow on values in Python's own words; write tracer.cond(flag) and tracer.loop(n)"
_LANGUAGE_MODELS = "this version has LanguageModel, for causal language models"

#: Name -> what it is, and what to do instead.
PACKAGE = {
    "Model": f"any torch module as a model; {_LANGUAGE_MODELS}",
    "EncoderModel": f"encoders; {_LANGUAGE_MODELS}",
    "VisionLanguageModel": f"models of images and text; {_LANGUAGE_MODELS}",
    "DiffusionModel": f"diffusion pipelines; {_LANGUAGE_MODELS}",
    "Job": "jobs of other processes; a trace waits for its own job, and tracer.job names it",
    "explain": "plans of graphs; tracer.graph is the graph",
    "experiment": _NO_FLOW,
    "collect": "activations over a data set; trace each prompt, or a batch of them",
}
MODEL = {
    "forward": "the founding spelling of model.trace(); write `with model.trace() as tracer:`",
    "edit": "interventions that stay; write them in each trace",
    "clear_edits": "interventions that stay; write them in each trace",
    "scan": "a run on shapes only; .shape and .dtype of values are known inside the block of a trace",
    "sweep": "one experiment over many settings; loop over traces, or give trace several invokes",
    "rename": "names of your own for modules; print(model) shows the model's",
    "get": "sites by their path; write model.layers[3].output",
    "std": "standard names of modules; print(model) shows the model's",
}
MODULE = {
    "source": "values inside a module; .input and .output of modules can be read and written",
    "skip": "leaving a module out; assign to its .output",
    "backward_output": _NO_GRADIENTS,
    "backward_input": _NO_GRADIENTS,
}
VALUE = {
    "grad": _NO_GRADIENTS,
    "backward": _NO_GRADIENTS,
    "requires_grad_": _NO_GRADIENTS,
    "retain_grad": _NO_GRADIENTS,
    "register_hook": _NO_GRADIENTS,
    "token": "the token axis counted from the prompt; index that axis itself: x[:, i]",
    "t[...]": "the token axis counted from the prompt; index that axis itself: x[:, i]",
    "original": "the value before every edit; take .clone() of it before the edit",
}
TRACER = {
    "stop": "ending the pass early by hand; it ends by itself after the last value that is needed",
    "output": "the output kept without save; write model.output.save()",
    "cache": "every module's output at once; save those that are wanted",
    "save_all": "every module's output at once; save those that are wanted",
    "log": "values shown while the model runs; save them and print them after the block",
    "print": "values shown while the model runs; save them and print them after the block",
    "apply": "functions over values; call the function itself, it is recorded as it runs",
    "barrier": "it is not needed: values cross from one invoke to the next by their names",
    "invoke()": "a body over the whole batch; give it an input",
}
SESSION = {
    "parameter": _NO_GRADIENTS,
    "log": TRACER["log"],
}
JOB = dict.fromkeys(
    ("status", "wait", "result", "events"), "following a job by hand; job.record() shows how it stands"
)
TRACE_OPTIONS = {
    "scan": MODEL["scan"],
    "validate": MODEL["scan"],
    "blocking": PACKAGE["Job"],
    "exclusive": "a run of one's own; the pass is shared only with the trace's own invokes",
    "tuple_outputs": "the old meaning of .output[0]; print(model) shows what each module returns",
    "trace": "a run without a block; save model.output inside one",
}
MODEL_OPTIONS = {"rename": MODEL["rename"], "tuple_outputs": TRACE_OPTIONS["tuple_outputs"]}


def refuse(names: Mapping[str, str], name: str, spelling: str) -> None:
    """Raise NotYetError, calling it ``spelling``, if ``name`` is one of the names that are to come."""
    if name in names:
        raise NotYetError(
            f"{spelling} is not in pellucid {__version__} yet: {names[name]}", where=users_line()
        )
