"""Choosing the next tokens of one invoke as ``transformers.generate`` does, by its own processors."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pellucid_shared.errors import InputError
from pellucid_shared.regions import Generation

from .inputs import Rows

#: What transformers takes where neither the request nor the model's generation config says.
_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}

#: Options of a generation config that decide tokens and are not supported, with the value that does nothing.
_UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1,
    "min_length": 0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "stop_strings": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "watermarking_config": None,
}


class Sampler:
    """Draws the tokens of one invoke.

    Args:
        config: the model's generation config, which decides what ``options`` leave open.
        own: the prompt, padding included.

    Raises:
        InputError: the generation config asks for what is not supported; names it.

    Attributes:
        eos: ids that end a row.
        pad: what a row that has ended is filled with.
    """

    def __init__(self, options: Generation, config: Any, own: Rows, generator: torch.Generator) -> None:
        def option(name: str) -> Any:
            for found in (getattr(options, name), getattr(config, name, None), _DEFAULTS.get(name)):
                if found is not None:
                    return found
            return None

        self._generator = generator
        eos = option("eos_token_id")
        self.eos: list[int] = [eos] if isinstance(eos, int) else list(eos or ())
        pad = option("pad_token_id")
        self.pad: int = pad if pad is not None else next(iter(self.eos), 0)
        self._samples: bool = option("do_sample")
        _require_supported(config)
        self._processors: Any = LogitsProcessorList()
        if option("repetition_penalty") != 1.0:
            penalty = float(option("repetition_penalty"))
            padding = None if own.mask is None else (own.mask != 0).int().argmax(dim=1)
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding))
        if option("min_new_tokens") and self.eos:
            self._processors.append(
                MinNewTokensLengthLogitsProcessor(
                    own.ids.shape[1], option("min_new_tokens"), self.eos, device=str(own.ids.device)
                )
            )
        if self._samples:
            self._add_warpers(float(option("temperature")), option("top_k"), option("top_p"))

    def _add_warpers(self, temperature: float, top_k: int, top_p: float) -> None:
        if temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self._processors.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self._processors.append(TopPLogitsWarper(top_p))

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row [batch], given the ids so far [batch, n] and logits [batch, vocab]."""
        scores: torch.Tensor = self._processors(ids, logits.to(torch.float32))
        if not self._samples:
            return scores.argmax(dim=-1)
        return _draw(scores.softmax(dim=-1), scores, self._generator)


def _require_supported(config: Any) -> None:
    """Raise InputError for the first option of a generation config that would be left out silently."""
    for name, neutral in _UNSUPPORTED.items():
        found = getattr(config, name, None)
        if found is not None and found != neutral:
            raise InputError(
                f"this model's generation config asks for {name}={found!r:.60}, which is not supported here; "
                "its administrator can take it out of generation_config.json"
            )


def _draw(probabilities: torch.Tensor, scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw a row. A row that is no distribution (a graph wrote NaN into it) takes its largest score:
    drawing from it would fail, on a GPU for every tenant."""
    sound = torch.isfinite(probabilities).all(-1, keepdim=True) & (probabilities.sum(-1, keepdim=True) > 0)
    even = torch.full_like(probabilities, 1 / probabilities.shape[-1])
    drawn = torch.multinomial(torch.where(sound, probabilities, even), 1, generator=generator).squeeze(1)
    return torch.where(sound.squeeze(1), drawn, scores.nan_to_num(nan=-torch.inf).argmax(dim=-1))
