"""What a run is made of: frozen, validated, and each field described once.

The descriptions here are the only ones: `--help`, `docs/CONFIG.md` and the JSON schema for editors
are made from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PositiveInt, model_validator

from atlas.config.fields import DEVICE, Float, Int, Section, count_or_auto, device_name, off_on, size
from atlas.config.model import ModelConfig as ModelConfig

LOSS_CHUNK_TOKENS = 256
"""Rows of logits that exist at once in training's loss: 51 MB in fp32 for GPT-2's vocabulary. On CUDA other chunks:"""
CUDA_LOSS_BYTES = 256 << 20
"""That a chunk of logits may take there, with what is made of it where nothing is compiled."""
MUON_STACK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25, "mps": 1 << 20}
"""In the matrices of one shape that Muon orthogonalizes together, by device. On a CPU this is 1.8 times as fast in a
model 128 wide, and no faster at 768. On CUDA it saves kernel launches: a group takes 25, whatever its size."""


class MixturePart(Section):
    """One dataset of a mixture."""

    path: str = Field(description="A prepared folder, or plain text (file, folder or zip).")
    weight: Float = Field(gt=0, description="Its share of the sequences, beside the other weights.")


class DataConfig(Section):
    """Where tokens come from."""

    train_data: str | None = Field(
        None,
        description="Training data: a prepared folder, plain text (file, folder or zip), or conversations (JSONL), of "
        "which the answers are learnt.",
    )
    mixture: tuple[MixturePart, ...] | None = Field(
        None,
        min_length=1,
        description="Several datasets instead of train_data, each with its share of the sequences: "
        "[{path: a, weight: 0.7}, {path: b, weight: 0.3}].",
    )
    val_data: str | None = Field(
        None,
        description="Validation data, in the same forms; left out, the validation parts of the training data.",
    )
    tokenizer: str | None = Field(
        None,
        description="Tokenizer for plain text: gpt2 (also when left out), a tokenizer.json, or "
        "package.module:factory. A prepared folder brings its own.",
    )
    val_fraction: Float = Field(
        0.05, ge=0, lt=1, description="Part of the documents of a plain text that is held out for validation."
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="concat: windows cut out of the documents one after the other. best_fit: whole documents put "
        "together into windows, cut only where one is longer; validation is read as concat. Conversations are always "
        "packed whole.",
    )
    document_mask: bool = Field(
        False,
        description="Keep attention inside a document, and start positions again in each, where a sequence holds "
        "several. Of conversations true unless it is written.",
    )
    num_workers: Int = Field(
        1, ge=0, description="Threads that read batches ahead; 0 reads in the training thread."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.train_data is not None and self.mixture is not None:
            raise ValueError(
                f"train_data {self.train_data} and mixture exclude each other: set one of them to null"
            )
        return self


class TrainingConfig(Section):
    """The optimisation and what is watched while it runs."""

    batch_size: Int = Field(8, ge=1, description="Sequences per accumulation step.")
    gradient_accumulation_steps: Int = Field(
        1, ge=1, description="An update takes batch_size × gradient_accumulation_steps sequences."
    )
    micro_batch_size: Annotated[PositiveInt | Literal["auto"], BeforeValidator(count_or_auto)] = Field(
        "auto",
        description="Sequences that run through the model at once; changes memory and speed, "
        "not the result. auto: batch_size, or as many of them as fit into memory; on a GPU with ample memory up to the "
        "whole update, unless batch_size is written in a file of your own, with --set or as a flag.",
    )
    max_steps: Int | None = Field(
        None,
        ge=1,
        description="Updates to train for; with epochs, the smaller wins; with neither, one epoch.",
    )
    epochs: Int | None = Field(None, ge=1, description="Passes over the training data.")
    max_hours: Float | None = Field(
        None,
        gt=0,
        description="Hours to train for in all: the schedule is planned to end inside them, from the speed of the "
        "first updates. With max_steps or epochs, the smaller wins; alone, as many epochs as there is time for.",
    )
    optimizer: Literal["adamw", "adamw8bit", "muon", "adafactor"] = Field(
        "adamw",
        description="adamw. adamw8bit: a quarter of its memory, by torchao. muon: Muon for the matrices of the blocks, "
        "AdamW for the rest, less memory; its rate is AdamW's for a model 768 wide, and much the same for others. "
        "adafactor: almost no memory, AdamW's rate. Fixed for a run.",
    )
    learning_rate: Float = Field(3e-4, gt=0, description="Peak learning rate, reached after warm-up.")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine",
        description="How the learning rate falls after warm-up: along a cosine, along a line, or (wsd) not before the "
        "last part of the run, decay_fraction, and then along a line.",
    )
    decay_fraction: Float = Field(
        0.2, gt=0, le=1, description="The part of the run, at its end, in which wsd falls."
    )
    min_learning_rate_ratio: Float = Field(
        0.1, ge=0, le=1, description="Final learning rate as a part of the peak."
    )
    warmup_steps: Int = Field(100, ge=0, description="Updates of linear warm-up.")
    weight_decay: Float = Field(0.1, ge=0, description="Decay of matrices; never of biases and norms.")
    beta1: Float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient.")
    beta2: Float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean squared gradient.")
    grad_clip: Float = Field(1.0, ge=0, description="Largest gradient norm; 0 leaves gradients as they are.")
    precision: Literal["auto", "fp32", "bf16", "bf16-true", "fp16"] = Field(
        "auto",
        description="auto: bf16 where the GPU computes in it, else fp16 on CUDA, fp32 elsewhere. "
        "bf16-true: weights and gradients as well.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, more time."
    )
    compile: Annotated[Literal["auto", "off", "on"], BeforeValidator(off_on)] = Field(
        "auto",
        description="Compile each block with torch.compile: a minute at the start, faster updates after. auto: on CUDA "
        "where it works, never on a CPU, where it does not pay.",
    )
    parallel: Literal["auto", "ddp", "fsdp", "none"] = Field(
        "auto",
        description="How the processes that torchrun starts share the work. ddp: each has the whole model. fsdp: each "
        "has a part of it, of its gradients and of the optimizer's state. auto: ddp where a step fits one device.",
    )
    shard_size: Int | None = Field(
        None,
        ge=1,
        description="With fsdp: so many processes, such as those of one machine, share a model, and the groups are "
        "alike; left out, all share one.",
    )
    loss: str | None = Field(
        None,
        description="Own loss as package.module:function(logits, targets, mask=None) → mean over the tokens given.",
    )
    log_interval: Int = Field(10, ge=1, description="Updates between two lines of metrics.")
    eval_interval: Int = Field(100, ge=1, description="Updates between two evaluations on validation data.")
    eval_batch_size: Annotated[PositiveInt | Literal["auto"], BeforeValidator(count_or_auto)] = Field(
        "auto", description="Sequences evaluated at once. auto: as many as train at once."
    )
    eval_sequences: Int = Field(
        128, ge=1, description="Size of the fixed validation subset, in sequences of max_seq_len tokens."
    )
    early_stopping_patience: Int | None = Field(
        None, ge=1, description="Stop after so many evaluations without a better validation loss."
    )

    @property
    def sequences_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def sequences_at_once(self) -> int:
        """As long as memory does not run out."""
        asked = self.micro_batch_size
        return self.batch_size if asked == "auto" else min(asked, self.sequences_per_update)


class LoraConfig(Section):
    """Fine-tuning by low-rank updates beside weights that rest."""

    rank: Int = Field(
        0, ge=0, le=4096, description="Inner width of each update; 0: no updates, all weights learn."
    )
    alpha: Float = Field(16.0, gt=0, description="An update is multiplied by alpha / rank.")
    targets: tuple[Literal["qkv", "output", "up", "down"], ...] = Field(
        ("qkv", "output", "up", "down"),
        min_length=1,
        description="The matrices of each block that have one: qkv and output of attention, up and down of the MLP.",
    )


class CheckpointConfig(Section):
    """Where the run is kept and how often."""

    output_dir: str = Field(
        "checkpoints", description="Folder of checkpoints, training.log and metrics.jsonl."
    )
    save_interval: Int = Field(100, ge=1, description="Updates between two checkpoints.")
    keep_checkpoints: Int = Field(
        5, ge=1, description="Checkpoints kept of each kind; the best is always kept besides."
    )
    max_total: Annotated[ByteSize, BeforeValidator(size)] | None = Field(
        None,
        description="Bytes that all checkpoints together may take, such as 20GB: the oldest go first, never the best "
        "and the newest.",
    )
    slim_old: bool = Field(
        False,
        description="Remove the optimizer state (AdamW's is two thirds of the bytes) from step checkpoints beyond the "
        "newest two.",
    )
    format: Literal["auto", "single", "sharded"] = Field(
        "auto",
        description="single: one .pt, made whole on the first process. sharded: a folder to which each process writes "
        "its part. auto: sharded where parallel is fsdp and the first process has no memory for the whole.",
    )
    background: bool = Field(
        True,
        description="Write checkpoints from a copy in main memory while training goes on; false: training waits "
        "for the disk.",
    )


class GuardConfig(Section):
    """What is watched while a run goes on, and what happens then."""

    max_bad_steps: Int = Field(
        5,
        ge=1,
        description="So many updates in a row that could not be applied, since their loss or gradient was not finite, "
        "send the run back to its last save.",
    )
    spikes: Annotated[Literal["off", "skip", "rollback"], BeforeValidator(off_on)] = Field(
        "off",
        description="What to do with an update whose loss or gradient norm is far above the last 128: nothing, not "
        "apply it, or go back to the last save.",
    )
    spike_z_score: Float = Field(
        6.0, gt=0, description="How many standard deviations above their mean count as far."
    )
    max_gpu_temp: Int | None = Field(
        None,
        ge=40,
        le=110,
        description="°C at which training waits, between two updates, until the NVIDIA GPU is 5 °C below; "
        "left out, it never waits.",
    )


class TrackingConfig(Section):
    """Who is told of a run besides training.log and metrics.jsonl, and what the model writes on the way."""

    tensorboard: bool = Field(
        False, description="Write TensorBoard's event files to tensorboard/ in the output folder as well."
    )
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(off_on)] = Field(
        "off",
        description="Weights & Biases. offline: a run in wandb/ in the output folder, which `wandb sync` can send "
        "later. online: sent while it trains.",
    )
    samples: Int = Field(
        2, ge=0, le=16, description="Texts that the model writes after each evaluation; 0: none."
    )
    sample_prompt: str = Field("", description="How these begin; empty: as a document begins.")
    sample_tokens: Int = Field(64, ge=1, description="Tokens of each.")


class AtlasConfig(Section):
    """Everything a run is made of."""

    seed: Int = Field(1337, ge=0, lt=2**63, description="Decides initial weights, order of data and dropout.")
    device: Annotated[str, AfterValidator(device_name)] = Field(
        "auto",
        description="auto, cpu, cuda, cuda:N (GPU number N, from 0) or mps. auto: cuda, else mps, else cpu.",
        json_schema_extra={"pattern": f"^({DEVICE})$"},
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="The network.")
    data: DataConfig = Field(default_factory=DataConfig, description="The data.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="The optimisation.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Fine-tuning by low-rank updates.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="The output folder.")
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="What is watched, and what happens then."
    )
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="Who is told, and what the model writes on the way."
    )
