"""Bodies of traces over the hand-made card, written against ``torch`` as an argument: the real one, or
``pellucid.torch`` where there is none. Run as a script, it hides torch and prints the graphs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

Body = Callable[[Any, Any], None]


def operators(torch: Any, model: Any) -> None:
    h = model.h[0].output
    x = 1 + h * 2 - h / 3 + (2 - h) / (h**2 + 1) + 4 / h - h // 2 + h % 3 + 2**h
    y = -x + abs(x) + +x
    mask = (x > 0) & (y <= 1) | ~(x == y) ^ (x != 0)
    (y @ y.mT).save()
    mask.save("mask")
    y += 1
    y *= h
    y -= 2
    y /= 3
    y.save()


def indexing(torch: Any, model: Any) -> None:
    h = model.h[0].output
    h[:, -1].save()
    h[..., 2:6:2].save()
    h[0, None, [0, 1]].save()
    h[h > 0].save()
    h[:, -1] = 0
    h[..., :4] *= 2
    h[h > 1] = 1.5


def functions(torch: Any, model: Any) -> None:
    h = model.h[0].output
    torch.exp(h).sum(dim=-1, keepdim=True).save()
    torch.sum(h, -1).save()
    h.mean(-1).save()
    torch.cat([h, -h], dim=-1).save()
    torch.stack((h, h)).save()
    torch.where(h > 0, h, 0.0).save()
    h.view(-1, 8).save()
    h.reshape((1, -1)).save()
    h.permute(0, 2, 1).save()
    h.max(dim=-1).values.save()
    torch.matmul(h, h.transpose(1, 2)).save()
    torch.einsum("btd,bsd->bts", h, h).save()
    h.clamp(min=-1, max=1).save()
    torch.nn.functional.sigmoid(h).save()
    torch.linalg.norm(h, dim=-1).save()


def dtypes(torch: Any, model: Any) -> None:
    h = model.h[0].output
    h.to(torch.float64).save()
    h.to(torch.half).float().save()
    h.sum(dim=-1, dtype=torch.double).save()
    h.to("cuda:0", torch.bfloat16).save()
    assert h.dtype == torch.float32


def writes(torch: Any, model: Any) -> None:
    model.h[0].output = model.h[0].output * 0.5
    model.h[1].input = model.h[1].input + 1
    model.h[1].output = (model.h[1].output[0] * 2, *model.h[1].output[1:])
    model.lm_head(model.h[1].output[0]).save("lens")


def structures(torch: Any, model: Any) -> None:
    from pellucid import save

    h = model.h[0].output
    save([h, {"last": h[:, -1], "n": 3}], "nested")
    first, second = model.embed.output[:, :2].transpose(0, 1)
    save((first, second))
    model.output.save()


def sizes(torch: Any, model: Any) -> None:
    h = model.h[0].output
    h.view(h.shape[0], h.shape[1], 2, -1).save()
    (h / len(h)).save()
    h.reshape(h.numel()).save()


def patterns(torch: Any, model: Any) -> None:
    import einops

    h = model.h[0].output
    heads = einops.rearrange(h, "b t (n d) -> b n t d", n=2)
    means = einops.reduce(heads, "b n t d -> b t", "mean").save()
    einops.reduce(heads, "b n t d -> n", "prod").save()
    einops.repeat(means, "b t -> b t 3").save()
    einops.einsum(h, h, "b t d, b s d -> b t s").save()
    einops.rearrange([h, h], "n b t d -> b t n d").save()
    einops.pack([h, h], "b * d")[0].save()


def tokens(torch: Any, model: Any) -> None:
    h = model.h[0].output
    h.t[0].save()
    h.token[[0, -1]].save()
    h.mean(-1).t[1:3].save()
    h.t[0] = 1
    h.t[-1] *= 2
    torch.exp(h)[0, :].t().save()


BODIES: dict[str, Body] = {
    body.__name__: body
    for body in (operators, indexing, functions, dtypes, writes, structures, sizes, patterns, tokens)
}


def graphs(torch: Any) -> dict[str, str]:
    """The JSON of each body's graph."""
    import einops  # noqa: F401 (before the trace, as the file of a user has it)

    from client_fixtures import CardModel

    found = {}
    for name, body in BODIES.items():
        model = CardModel()
        with model.trace("hello") as tracer:
            body(torch, model)
            found[name] = tracer.graph.to_json().decode()
            tracer._recorder.saved.clear()  # written, not to be run
    return found


def hide_torch() -> None:
    """Make this process one that has no torch."""

    class Blocker:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] in ("torch", "transformers", "accelerate", "ml_dtypes"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]


if __name__ == "__main__":
    hide_torch()
    from pellucid import torch as ours

    sys.stdout.write(json.dumps(graphs(ours)))
