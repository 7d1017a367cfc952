"""Making a model's card by running it: which modules are called, in which order, on what.

The model runs at two sizes. A dimension that is the same in both is a constant; one that follows the number
of rows is ``batch``, of tokens ``tokens``, of both ``rows``. Tensors that are one object in the model get
one number.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pellucid_shared import __version__
from pellucid_shared.card import (
    Call,
    Fields,
    ModelCard,
    ModuleInfo,
    OpaqueLeaf,
    PlainLeaf,
    Structure,
    TensorLeaf,
)
from pellucid_shared.card import Sequence as Items
from pellucid_shared.wire import TokenizedInvoke

from . import packed
from .inputs import alone, rows
from .inputs import packed as packed_inputs
from .inside_probe import Bodies, Run, record_inside
from .tensors import Memory, dtype_name, memory

_SIZES = ((3, 7), (5, 11))
_RAGGED = (5, 9)
#: Largest difference of logits between packed and alone, by dtype; fp32 is the promise of the docs.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}


def probe(
    model: torch.nn.Module,
    *,
    id: str,
    source: str = "",
    has_tokenizer: bool = False,
    weights: bool = True,
) -> ModelCard:
    """The card of a resident model in evaluation mode. Its weights and state are left as they were.

    ``weights=False``: its tensors have no numbers (``meta.py``), so whether it packs is not known.
    """
    config: Any = model.config
    with torch.no_grad():
        passes = [alone(model, _random_rows(model, *size)) for size in _SIZES]
        steps = [found for size in _SIZES if (found := _decode_step(model, size)) is not None]
        prefill, decode = _calls(model, passes, again=weights), _calls(model, steps, again=weights)
        packs = _certify_packing(model) if weights else None
        bodies = Bodies(model)
        if not weights:  # what a module calls may depend on numbers: it is listed once there are some
            passes, steps = [], []
        packed_run = _packed_run(model, prefill) if packs else None
        prefill = bodies.add(prefill, passes, lambda a, b: _names(a, b, 0), packed_run) if passes else prefill
        decode = bodies.add(decode, steps, lambda a, b: _names(a, b, 2), packed_run) if steps else decode
    text_config = config.get_text_config()
    return ModelCard(
        id=id,
        source=source,
        revision=getattr(config, "_commit_hash", None),
        class_name=type(model).__name__,
        base_model_prefix=_prefix(model),
        fingerprint=_fingerprint(model) if weights else "meta",
        dtype=dtype_name(next(model.parameters()).dtype),
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=text_config.vocab_size,
        max_tokens=getattr(text_config, "max_position_embeddings", None),
        packs=packs,
        modules=tuple(modules_of(model)),
        prefill=prefill,
        decode=decode,
        bodies=tuple(bodies.all),
        has_tokenizer=has_tokenizer,
        config=_config(config),
        versions=versions(),
    )


def _config(config: Any) -> dict[str, Any]:
    """The config as JSON, without the place it was loaded from (the same model may lie elsewhere), and also
    under the names that transformers has for every architecture (``attribute_map``: ``hidden_size`` of GPT-2
    is its ``n_embd``)."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    found.pop("_name_or_path", None)
    return {**found, **{name: found[own] for name, own in config.attribute_map.items() if own in found}}


def modules_of(model: torch.nn.Module) -> list[ModuleInfo]:
    return [
        ModuleInfo(
            path=path,
            class_name=type(module).__name__,
            parameters={
                name: TensorLeaf(shape=tuple(p.shape), dtype=dtype_name(p.dtype))
                for name, p in module.named_parameters(recurse=False)
            },
            buffers={
                name: TensorLeaf(shape=tuple(b.shape), dtype=dtype_name(b.dtype))
                for name, b in module.named_buffers(recurse=False)
            },
        )
        for path, module in model.named_modules()
    ]


def _prefix(model: torch.nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and hasattr(model, prefix) else ""


# --- events ------------------------------------------------------------------------------------------------


class Seen:
    """One call as it happened; the tensors are kept, so that no two share an id."""

    def __init__(self, module: str, call: int, enter: int, args: Any, kwargs: Any) -> None:
        self.module, self.call, self.enter, self.exit = module, call, enter, -1
        self.args, self.kwargs, self.output = args, kwargs, None


def record(
    model: torch.nn.Module, arguments: Mapping[str, Any], args: Sequence[Any] = ()
) -> tuple[list[Seen], Any]:
    """Run the model with a hook on every module; its calls in order of entry, and its output."""
    seen: list[Seen] = []
    open_calls: list[Seen] = []
    counts: Counter[str] = Counter()
    clock = iter(range(10**9))
    handles = []
    for path, module in model.named_modules():

        def before(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
            call = Seen(path, counts[path], next(clock), args, kwargs)
            counts[path] += 1
            seen.append(call)
            open_calls.append(call)

        def after(_: Any, args: Any, output: Any) -> None:
            call = open_calls.pop()
            call.exit, call.output = next(clock), output

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        output = model(*args, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen, output


def _calls(
    model: torch.nn.Module, arguments: Sequence[Mapping[str, Any]], *, again: bool
) -> tuple[Call, ...]:
    """The calls of a pass, from its arguments at both sizes (empty where there are none); ``again``: they are
    to be used once more, so a cache among them is left as it is."""
    if not arguments:
        return ()
    given = [copy.deepcopy(dict(a)) for a in arguments] if again else arguments
    small, large = (record(model, each)[0] for each in given)
    others = {(c.module, c.call): c for c in large}
    objects: dict[Memory, int] = {}
    return tuple(
        Call(
            module=c.module,
            call=c.call,
            enter=c.enter,
            exit=c.exit,
            args=tuple(_structure(a, b, objects) for a, b in zip(c.args, other.args, strict=True)),
            kwargs={k: _structure(v, other.kwargs[k], objects) for k, v in c.kwargs.items()},
            output=_structure(c.output, other.output, objects),
        )
        for c in small
        if (other := others.get((c.module, c.call))) is not None
    )


def _decode_step(model: torch.nn.Module, size: tuple[int, int]) -> dict[str, Any] | None:
    """The arguments of the second decode step behind a prefill; None where the model has no cache."""
    own = _random_rows(model, *size)
    first = model(**{**alone(model, own), "use_cache": True})
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        return None
    step = {"input_ids": own.ids[:, :1], "past_key_values": cache, "use_cache": True}
    second = model(**step)
    return {**step, "past_key_values": second.past_key_values}


def _packed_run(model: torch.nn.Module, calls: tuple[Call, ...]) -> Run:
    """What modules call inside in a pass that prompts share."""
    arguments, segments = packed_inputs(model, [_random_rows(model, 1, tokens) for tokens in _RAGGED])
    with packed.attention_by_segment(model, segments):
        return record_inside(model, arguments, calls)


def _structure(small: Any, large: Any, objects: dict[Memory, int]) -> Structure:
    """What two runs of different sizes show of one value."""
    if isinstance(small, torch.Tensor):
        number = objects.setdefault(memory(small), len(objects))
        return TensorLeaf(shape=_axes(small, large), dtype=dtype_name(small.dtype), object=number)
    if isinstance(small, list | tuple):
        members = tuple(_structure(a, b, objects) for a, b in zip(small, large, strict=False))
        return Items(leaf="list" if isinstance(small, list) else "tuple", items=members)
    if isinstance(small, Mapping):
        names = {str(k): _structure(v, large[k], objects) for k, v in small.items()}
        return Fields(class_name=type(small).__name__, items=names)
    if small is None or isinstance(small, bool | int | float | str):
        return PlainLeaf(value=repr(small))
    return OpaqueLeaf(class_name=type(small).__name__)


def _axes(small: torch.Tensor, large: Any) -> tuple[Any, ...] | None:
    return _names(tuple(small.shape), tuple(large.shape), 0) if isinstance(large, torch.Tensor) else None


def _names(small: tuple[int, ...], large: tuple[int, ...], steps: int) -> tuple[Any, ...] | None:
    """The axes of shapes seen so many steps of generation after the prefill."""
    if len(small) != len(large):
        return None
    names = {
        (_SIZES[0][0], _SIZES[1][0]): "batch",
        (_SIZES[0][1], _SIZES[1][1]): "tokens",
        (_SIZES[0][0] * _SIZES[0][1], _SIZES[1][0] * _SIZES[1][1]): "rows",
    }
    if steps:
        names[_SIZES[0][1] + steps, _SIZES[1][1] + steps] = "cache"
    axes: list[Any] = []
    for a, b in zip(small, large, strict=True):
        if a == b:
            axes.append(a)
        elif (a, b) in names:
            axes.append(names[a, b])
        else:
            return None
    return tuple(axes)


def _random_rows(model: torch.nn.Module, batch: int, tokens: int) -> Any:
    config: Any = model.config
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    ids = torch.randint(0, config.get_text_config().vocab_size, (batch, tokens), generator=generator)
    return rows(TokenizedInvoke(ids=ids.tolist()), 0, next(model.parameters()).device)


# --- certification -----------------------------------------------------------------------------------------


def _certify_packing(model: torch.nn.Module) -> bool:
    """Whether prompts of different lengths give the same logits in one packed pass as alone."""
    own = [_random_rows(model, 1, tokens) for tokens in _RAGGED] + [_random_rows(model, 2, 3)]
    try:
        arguments, segments = packed_inputs(model, own)
        if "position_ids" not in arguments:
            return False
        with packed.attention_by_segment(model, segments):
            together = _logits(model(**arguments))
        agree = True
        for segment, rows_alone in zip(segments, own, strict=True):
            wanted = _logits(model(**alone(model, rows_alone)))
            found = together[0, segment.start : segment.stop].view_as(wanted)
            agree &= float((found - wanted).abs().max()) <= _TOLERANCE.get(found.dtype, 1e-4)  # NaN is not
    except Exception:  # a model file may fail in any way on a packed row; then it does not pack
        return False
    return agree


def _logits(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if not hasattr(output, "logits") else output.logits
    return found


# --- identity ----------------------------------------------------------------------------------------------


def _fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over config, attention function, versions, device kind, and of every tensor its name, shape and
    a sample of 1024 elements: enough to tell deployments apart, in milliseconds for a model of any size."""
    attention = getattr(model.config, "_attn_implementation", None)
    decisive = [_config(model.config), attention, versions()]
    state = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].cpu().contiguous()
            state.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return state.hexdigest()


def versions() -> dict[str, str]:
    import accelerate
    import transformers

    return {
        "accelerate": accelerate.__version__,
        "pellucid": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
