"""Settings of Atlas 1.x, nanoGPT and other programs, and the settings of Atlas that replace them.

Old names that are similar to the new name are not listed: `loader.py` finds such names by their spelling.
`docs/MIGRATING.md` has the same tables.
"""

from __future__ import annotations

FIRST_ATLAS = {
    "activation": "model.mlp",
    "mlp_ratio": "model.mlp_size",
    "use_bias": "model.bias",
    "tie_weights": "model.tie_embeddings",
    "attention_dropout": "model.dropout",
    "max_grad_norm": "training.grad_clip",
    "optimizer_type": "training.optimizer",
    "lr_schedule": "training.schedule",
    "scheduler_type": "training.schedule",
    "min_lr_ratio": "training.min_learning_rate_ratio",
    "use_amp": "training.precision",
    "mixed_precision": "training.precision",
    "eval_steps": "training.eval_sequences",
    "train_data_path": "data.train_data",
    "val_data_path": "data.val_data",
    "tokenizer_path": "data.tokenizer",
    "sequence_length": "model.max_seq_len",
    "checkpoint_dir": "checkpoint.output_dir",
    "checkpoint_interval": "checkpoint.save_interval",
    "keep_last_n_checkpoints": "checkpoint.keep_checkpoints",
    "save_optimizer_state": "checkpoint.slim_old",
}
"""The last part of a key in Atlas 1.x → the setting of Atlas."""

_ELSEWHERE = {
    "block_size": "model.max_seq_len",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_heads",
    "n_layer": "model.num_layers",
    "dtype": "training.precision",
    "lr": "training.learning_rate",
    "max_iters": "training.max_steps",
    "min_lr": "training.min_learning_rate_ratio",
    "warmup_iters": "training.warmup_steps",
}
"""A key of nanoGPT and other programs → the setting of Atlas."""

RENAMED = FIRST_ATLAS | _ELSEWHERE

VALUES = {
    "activation": "gelu_exact computes what gelu computed in Atlas 1.x",
    "mlp_ratio": "hidden_size × mlp_ratio, by default 4 × hidden_size",
    "attention_dropout": "one value for embeddings, attention and MLP",
    "optimizer_type": "adamw, adamw8bit, muon or adafactor",
    "lr_schedule": "cosine, linear or wsd",
    "scheduler_type": "cosine, linear or wsd",
    "use_amp": "auto, fp32, bf16, bf16-true or fp16",
    "mixed_precision": "auto, fp32, bf16, bf16-true or fp16",
    "eval_steps": "in sequences: eval_steps × batch_size",
    "save_optimizer_state": "slim_old: true removes the state from older checkpoints",
}
"""Keys whose values differ as well → a hint about the new value."""

REMOVED = {
    "momentum": "Atlas has no SGD, and training.beta1 is AdamW's momentum",
    "prefetch_factor": "Atlas reads batches ahead by itself (data.num_workers)",
    "pin_memory": "Atlas pins memory by itself on a GPU",
    "log_dir": "training.log and metrics.jsonl are in checkpoint.output_dir",
    "log_gradients": "Atlas logs the gradient norm to metrics.jsonl by itself",
    "log_model_structure": "atlas info CONFIG prints the structure",
    "data.max_seq_len": "model.max_seq_len applies to the data, too",
    "logging": "its keys are now in training and checkpoint",
    "inference": "these are options of atlas generate, such as --max-tokens and --temperature",
}
"""The last part of a key, a section, or a full key → the reason to remove it."""

OLD_SECTIONS = {"logging"}
"""Sections of Atlas 1.x that Atlas does not have. Each key of such a section gets its own hint."""


def hint(dotted: str) -> str | None:
    """Return what to write instead of a key or a section of another program, or None if no table has the key."""
    leaf = dotted.rsplit(".", 1)[-1]
    if leaf in RENAMED:
        values = f" ({VALUES[leaf]})" if leaf in VALUES else ""
        return f"it is {RENAMED[leaf]} here{values}"
    reason = REMOVED.get(dotted) or REMOVED.get(leaf)
    return f"remove it: {reason}" if reason else None
