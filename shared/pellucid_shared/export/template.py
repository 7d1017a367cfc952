"""What every script has around the lines of its own experiment."""

from __future__ import annotations

from collections.abc import Sequence

from .expressions import quoted

_HEAD = '''"""An experiment on {model}, as plain PyTorch hooks over transformers.

Written by `pellucid export --hooks`; the graph it was made of has the SHA-256
{sha256}.
Variables are named as `pellucid show` prints them. Each prompt has a forward pass of its own. Run it as

    python SCRIPT.py [--model FOLDER_OR_HUB_ID] [--out RESULTS.safetensors]

It needs torch, transformers and safetensors{more}, and nothing of Pellucid.
"""

import argparse
import inspect
import json
from contextlib import contextmanager
from itertools import count
from pathlib import Path

{einops}import torch
from safetensors.torch import {loaders}
from transformers import {classes}

MODEL = {source}
{files}

'''

_INPUTS = '''def inputs(model, rows, masks=None):
    """Arguments of a forward pass over rows of token ids; shorter rows are padded on the left."""
    masks = masks or [[1] * len(row) for row in rows]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[{pad}] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + list(row) for row in masks], device=model.device)
    given = {{"input_ids": ids, "use_cache": False}}
    if not mask.all():
        given |= {{"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}}
    known = inspect.signature(model.forward).parameters
    return {{name: value for name, value in given.items() if name in known}}


'''

_HOOKS = '''@contextmanager
def hooks(model, *wanted):
    """Run functions at the inputs or outputs of modules, each at one call of its module (from 0).

    What a function returns takes the place of what it was given; None changes nothing.
    """
    handles = []
    for path, kind, call, function in wanted:

        def before(_, args, kwargs, calls=count(), call=call, function=function):
            {guard}return function(args, kwargs) if next(calls) == call else None

        def after(_, args, output, calls=count(), call=call, function=function):
            {guard}return function(output) if next(calls) == call else None

        module = model.get_submodule(path)
        if kind == "input":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


'''

_GUARD = """if HOOKS_OFF[0]:
                return None
            """

_APPLY = '''HOOKS_OFF = [False]


def apply(model, path, *args, **kwargs):
    """Call a module of the model out of order, with every hook off."""
    HOOKS_OFF[0] = True
    try:
        return model.get_submodule(path)(*args, **kwargs)
    finally:
        HOOKS_OFF[0] = False


'''

_MAIN = '''def leaves(value, name):
    """(name, leaf) of a structure; members are named by their place, joined with dots."""
    if not isinstance(value, (list, tuple, dict)):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(part, f"{{name}}.{{key}}")


def main():
    """Load the model, run the experiment, print what was saved and write its tensors to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL, help="a folder, or an id of the Hugging Face hub")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".results.safetensors"))
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
    {tokenizer}
    {literals}
    saved = experiment(model, tokenizer, literals)
    found = dict(leaf for name, value in saved.items() for leaf in leaves(value, name))
    tensors = {{k: v.detach().cpu().clone().contiguous() for k, v in found.items() if torch.is_tensor(v)}}
    plain = {{k: json.dumps(v, default=str) for k, v in found.items() if not torch.is_tensor(v)}}
    save_file(tensors, given.out, plain or None)
    for name, value in found.items():
        print(name, f"{{list(value.shape)}} {{value.dtype}}" if torch.is_tensor(value) else value)


if __name__ == "__main__":
    main()
'''


def script(
    *,
    model: str,
    sha256: str,
    source: str,
    literals: str,
    body: Sequence[str],
    pad: int,
    texts: bool,
    applies: bool,
    einops: bool,
) -> str:
    """The whole script.

    Args:
        literals: the name of the file they lie in, or "".
        body: the lines of the experiment's function, not indented.
        texts: some prompt is text.
        applies: some module is called out of order.
        einops: some op is einops'.
    """
    head = _HEAD.format(
        model=model,
        sha256=sha256,
        more=", einops" if einops else "",
        einops="import einops\n" if einops else "",
        loaders="load_file, save_file" if literals else "save_file",
        classes="AutoModelForCausalLM, AutoTokenizer" if texts else "AutoModelForCausalLM",
        source=quoted(source),
        files=f"LITERALS = Path(__file__).with_name({quoted(literals)})\n" if literals else "",
    )
    lines = [
        "@torch.no_grad()",
        "def experiment(model, tokenizer, literals):",
        '    """The saved values by name. `literals` are the tensors of the user\'s own, by digest."""',
        "",
    ]
    own = list(body)
    if any("device" in line for line in own):
        own.insert(0, "device = model.device")
    lines += [f"    {line}" if line else "" for line in own]
    main = _MAIN.format(
        tokenizer=f"tokenizer = {'AutoTokenizer.from_pretrained(given.model)' if texts else 'None'}",
        literals=f"literals = {'load_file(LITERALS)' if literals else '{}'}",
    )
    parts = [
        head,
        _APPLY if applies else "",
        _INPUTS.format(pad=pad),
        _HOOKS.format(guard=_GUARD if applies else ""),
        "\n".join(lines),
        "\n\n\n",
        main,
    ]
    return "".join(parts)
