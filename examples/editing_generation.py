"""Editing a generation: one step is changed, and everything after it follows."""

from __future__ import annotations

from typing import Any

from gallery import run, token_of

PROMPT = "My favourite colour is"
NEW = 8


def editing_generation(model: Any) -> dict[str, str]:
    """The same generation, plain and with its first word forced; and how sure each step was."""
    forced = token_of(model, " green")
    written, sure = {}, {}
    with model.session() as session:
        with session.generate(PROMPT, max_new_tokens=NEW) as tracer:
            with tracer.iter[:]:
                sure["plain"] = model.lm_head.output[0, -1].softmax(dim=-1).max().save()
            written["plain"] = tracer.result.save()
        with session.generate(PROMPT, max_new_tokens=NEW) as tracer:
            model.lm_head.output[:, -1, forced] = 1e4
            with tracer.iter[1:]:
                sure["forced"] = model.lm_head.output[0, -1].softmax(dim=-1).max().save()
            written["forced"] = tracer.result.save()
    texts = {name: model.tokenizer.decode(ids[0].tolist()) for name, ids in written.items()}
    for name, text in texts.items():
        print(f"{name:7} {text!r}")
        print("        sure of each step: " + " ".join(f"{float(p):.2f}" for p in sure[name]))
    return texts


if __name__ == "__main__":
    run(editing_generation)
