"""Tiny random models of several architectures, made from configs: two layers, hidden 32, vocabulary 99."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB, HIDDEN, LAYERS, HEADS = 99, 32, 2, 4
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}


def _config(name: str) -> PretrainedConfig:
    if name == "llama":
        return LlamaConfig(**_GROUPED)
    if name == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
    if name == "gpt_neox":
        return GPTNeoXConfig(**_COMMON)
    if name == "gemma3":
        return Gemma3TextConfig(
            **_GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        )
    if name == "qwen3":
        return Qwen3Config(**_GROUPED)
    if name == "mixtral":
        return MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    raise ValueError(name)


NAMES = ("llama", "gpt2", "gpt_neox", "gemma3", "qwen3", "mixtral")


def tiny_model(name: str) -> PreTrainedModel:
    """A tiny random model in evaluation mode; the same weights each time."""
    torch.manual_seed(NAMES.index(name))
    return AutoModelForCausalLM.from_config(_config(name)).eval()


def tiny_folder(name: str, parent: Path) -> Path:
    """The same model saved as a folder."""
    folder = parent / name
    tiny_model(name).save_pretrained(folder)
    return folder
