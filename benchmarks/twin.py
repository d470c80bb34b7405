"""Convert Atlas's model to the GPT-2 class of transformers, with the same weights."""

from __future__ import annotations

from typing import Any


def transformers_twin(model: Any) -> Any:
    """Return transformers' GPT-2 with the weights of `model`. GPT-2 stores most matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary,
            n_positions=config.max_seq_len,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
        )
    ).eval()
    twin.generation_config.eos_token_id = None
    names = {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "blocks": "transformer.h",
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    state = {}
    for name, value in model.state_dict().items():
        transposed = any(
            part in name for part in (".qkv.weight", ".output.weight", ".up.weight", ".down.weight")
        )
        for ours, theirs in names.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        state[name] = value.T if transposed else value
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: config.vocabulary]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    twin.load_state_dict(state)
    return twin
