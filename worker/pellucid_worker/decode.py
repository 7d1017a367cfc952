"""The state of one generation: each invoke's ids, its keys and values, and whether it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from pellucid_shared.regions import Generation

from . import inputs, packed
from .inputs import Rows, Segment
from .sampling import Sampler


@dataclass(slots=True)
class Growing:
    """One invoke as it grows.

    Attributes:
        ids: prompt and generated tokens, [batch, n] int64.
        mask: its padding, [batch, n], or None where it has none.
        positions: of the tokens of the next pass, [batch, t].
        fed: how many columns of ``ids`` the model has seen.
        running: rows that have not ended, [batch] bool.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor
    fed: int
    running: torch.Tensor
    cache: Any
    sampler: Sampler

    def next_rows(self) -> Rows:
        """What the next pass is fed."""
        return Rows(self.ids[:, self.fed :], self.mask, self.positions)

    def append(self, tokens: torch.Tensor) -> None:
        """Take the tokens that a pass led to; rows that have ended are filled up."""
        tokens = torch.where(self.running, tokens, self.sampler.pad)
        self.fed = self.ids.shape[1]
        self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        for eos in self.sampler.eos:
            self.running = self.running & (tokens != eos)

    @property
    def ended(self) -> bool:
        return not bool(self.running.any())


class Decoding:
    """A generation over the invokes of one group, step by step.

    Args:
        rows: one per invoke.
        generators: one per invoke; what it samples does not depend on its neighbours.

    Attributes:
        live: invokes (positions in ``rows``) that have not ended.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Sequence[Rows],
        options: Generation,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._model, self._shared = model, len(rows) > 1
        config: Any = model.config
        defaults = getattr(model, "generation_config", None)
        self._sequences = [
            Growing(
                ids=own.ids,
                mask=own.mask,
                positions=own.positions,
                fed=0,
                running=torch.ones(own.ids.shape[0], dtype=torch.bool, device=own.ids.device),
                cache=DynamicCache(config=config),
                sampler=Sampler(options, defaults, own, generator),
            )
            for own, generator in zip(rows, generators, strict=True)
        ]
        self.live = list(range(len(rows)))

    @contextlib.contextmanager
    def step(self) -> Iterator[tuple[dict[str, Any], list[Segment] | None]]:
        """Within this context a pass may run: gives the forward's arguments, and where each live invoke
        lies where several share it."""
        own = [self._sequences[i] for i in self.live]
        if not self._shared:
            yield self._alone(own[0]), None
            return
        arguments, segments = inputs.packed(self._model, [each.next_rows() for each in own])
        with packed.attention_by_segment(self._model, segments, [each.cache for each in own]):
            yield arguments, segments

    def advance(self, output: Any, segments: Sequence[Segment] | None) -> dict[int, torch.Tensor]:
        """Choose each live invoke's next tokens from the pass's output; those chosen, by invoke."""
        logits = output.logits if hasattr(output, "logits") else output[0]
        chosen = {}
        for place, index in enumerate(self.live):
            own = self._sequences[index]
            if segments is None:
                last = logits[:, -1]
            else:
                segment = segments[place]
                part = logits[0, segment.start : segment.stop].view(segment.batch, segment.tokens, -1)
                last = part[:, -1]
            own.append(own.sampler.choose(own.ids, last))
            chosen[index] = own.ids[:, -1]
        self.live = [i for i in self.live if not self._sequences[i].ended]
        return chosen

    def result(self, index: int) -> torch.Tensor:
        """The ids of prompt and generated tokens of an invoke, [batch, n] int64."""
        return self._sequences[index].ids

    def _alone(self, own: Growing) -> dict[str, Any]:
        rows = own.next_rows()
        given: dict[str, Any] = {"input_ids": rows.ids, "past_key_values": own.cache, "use_cache": True}
        if rows.mask is not None:
            given |= {"attention_mask": rows.mask, "position_ids": rows.positions}
        return inputs.accepted(self._model, given)
