"""Tiny models of transformers, at random starts, with a task each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.frameworks.tasks import BYTES, PAD, Task, chains, gratings, masked, windows

TOKENS: dict[str, Any] = {"vocab_size": BYTES, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": PAD}


def next_byte(model: nn.Module, k: int) -> Tensor:
    """Predict the next byte of `text`."""
    ids = windows(k)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def masked_word(model: nn.Module, k: int) -> Tensor:
    """Predict masked words from their neighbours."""
    ids, labels = masked(chains(k), k)
    return model(input_ids=ids, labels=labels).loss


def restore(model: nn.Module, k: int) -> Tensor:
    """From a window with masked bytes to the window: an encoder and a decoder."""
    ids = windows(k)
    return model(input_ids=masked(ids, k)[0], labels=ids, use_cache=False).loss


def direction(model: nn.Module, k: int) -> Tensor:
    """Classify stripes."""
    images, labels = gratings(k, noise=0.1)
    return model(pixel_values=images, labels=labels).loss


def direction_in_noise(model: nn.Module, k: int) -> Tensor:
    """Classify stripes in white noise."""
    images, labels = gratings(k)
    return model(pixel_values=images, labels=labels).loss


def transformers_tasks(*, dropout: float = 0.0, tied: bool | None = None) -> dict[str, Task]:
    """Task by name; `tied` says whether embeddings are the output layer's weight too, None is each model's default."""
    import transformers as hf

    tie = {} if tied is None else {"tie_word_embeddings": tied}
    positions: dict[str, Any] = {"max_position_embeddings": 64}
    llama: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **TOKENS,
        **positions, **tie,
    }  # fmt: skip

    def gpt2() -> nn.Module:
        drop = {key: dropout for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **drop, **TOKENS, **tie)
        )

    def bert() -> nn.Module:
        config = hf.BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **TOKENS, **positions, **tie,
        )  # fmt: skip
        return hf.BertForMaskedLM(config)

    def t5() -> nn.Module:
        config = hf.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=dropout, decoder_start_token_id=PAD,
            **TOKENS, **tie,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(config)

    def vit() -> nn.Module:
        config = hf.ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
            patch_size=8, num_labels=10, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        return hf.ViTForImageClassification(config)

    def mixtral() -> nn.Module:
        config = hf.MixtralConfig(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, **llama)
        return hf.MixtralForCausalLM(config)

    tasks = [
        Task("GPT-2", gpt2, next_byte),
        Task("Llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=128, **llama)), next_byte),
        Task("BERT", bert, masked_word),
        Task("T5", t5, restore),
        Task("ViT", vit, direction),
        Task("ViT, noisy images", vit, direction_in_noise),
        Task("Mixtral", mixtral, next_byte),
    ]
    return {task.name: task for task in tasks}
