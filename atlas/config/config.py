"""What a run is made of: frozen, validated, and each field described once.

The docstrings under the fields are the only descriptions: `--help`, `docs/CONFIG.md` and the JSON schema for editors
are made from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PositiveInt, model_validator

from atlas.config.fields import DEVICE, Float, Int, Section, count_or_auto, device_name, off_on, size
from atlas.config.model import ModelConfig as ModelConfig

LOSS_CHUNK_TOKENS = 256
"""Rows of logits that training's loss computes at a time on a CPU: 51 MB in fp32 for GPT-2's vocabulary."""
CUDA_LOSS_BYTES = 256 << 20
"""Bytes of a chunk of logits on CUDA, with all that is computed from it where nothing is compiled."""
MUON_STACK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25, "mps": 1 << 20}
"""Numbers in the matrices of one shape that Muon orthogonalizes together, by device. On a CPU this is 1.8 times as fast
in a model 128 wide, and no faster at 768. On CUDA it saves kernel launches: a group needs 25, whatever its size."""


class MixturePart(Section):
    """One dataset of a mixture."""

    path: str
    """A prepared folder, or plain text (file, folder or zip)."""
    weight: Float = Field(gt=0)
    """Its share of the sequences, relative to the other weights."""


class DataConfig(Section):
    """The training and validation data."""

    train_data: str | None = None
    """Training data: a prepared folder, plain text (file, folder or zip), or conversations (JSONL), of which only the
    answers are trained on."""
    mixture: tuple[MixturePart, ...] | None = Field(None, min_length=1)
    """Several datasets instead of train_data, each with its share of the sequences:
    [{path: a, weight: 0.7}, {path: b, weight: 0.3}]."""
    val_data: str | None = None
    """Validation data, in the same formats. Default: the validation parts of the training data."""
    tokenizer: str | None = None
    """Tokenizer for plain text: gpt2 (the default), a tokenizer.json, or package.module:factory. A prepared folder
    brings its own."""
    val_fraction: Float = Field(0.05, ge=0, lt=1)
    """Fraction of the documents of a plain text that is held out for validation."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents are joined and cut into windows. best_fit: complete documents are combined into windows, and
    cut only where one is longer than a window; validation data is still read as concat. Conversations are always
    packed complete."""
    document_mask: bool = False
    """Keep attention inside a document, and restart positions in each, where a sequence holds several. Default: true
    for conversations, else false."""
    num_workers: Int = Field(1, ge=0)
    """Threads that read batches ahead; 0 reads in the training thread."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.train_data is not None and self.mixture is not None:
            raise ValueError(
                f"train_data {self.train_data} and mixture exclude each other: set one of them to null"
            )
        return self


class TrainingConfig(Section):
    """Optimization, and how often progress is logged and evaluated."""

    batch_size: Int = Field(8, ge=1)
    """Sequences per accumulation step."""
    gradient_accumulation_steps: Int = Field(1, ge=1)
    """An update uses batch_size × gradient_accumulation_steps sequences."""
    micro_batch_size: Annotated[PositiveInt | Literal["auto"], BeforeValidator(count_or_auto)] = "auto"
    """Sequences per forward pass; changes memory and speed, not the result. auto: batch_size, or as many of them as fit
    into memory; on a GPU with ample memory up to the full update, unless you set batch_size in a file of your own, with
    --set or as a flag."""
    max_steps: Int | None = Field(None, ge=1)
    """Updates to train for. With epochs, the smaller wins; with neither, one epoch."""
    epochs: Int | None = Field(None, ge=1)
    """Passes over the training data."""
    max_hours: Float | None = Field(None, gt=0)
    """Total hours to train for. The schedule is planned to end within them, from the speed of the first updates. With
    max_steps or epochs, the smaller wins; alone, as many epochs as there is time for."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "adafactor"] = "adamw"
    """adamw. adamw8bit: a quarter of its memory, by torchao. muon: Muon for the matrices of the blocks, AdamW for all
    other weights, less memory; its rate is AdamW's for a model 768 wide, and much the same for others. adafactor:
    almost no memory, AdamW's rate. Fixed for a run."""
    learning_rate: Float = Field(3e-4, gt=0)
    """Peak learning rate, reached after warm-up."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the learning rate decays after warm-up: cosine, linear, or wsd, which keeps it constant and decays it
    linearly in the last part of the run, decay_fraction."""
    decay_fraction: Float = Field(0.2, gt=0, le=1)
    """Fraction of the run, at its end, in which wsd decays."""
    min_learning_rate_ratio: Float = Field(0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    warmup_steps: Int = Field(100, ge=0)
    """Updates of linear warm-up."""
    weight_decay: Float = Field(0.1, ge=0)
    """Weight decay of matrices; biases and norms have none."""
    beta1: Float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the mean gradient."""
    beta2: Float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the mean squared gradient."""
    grad_clip: Float = Field(1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16", "bf16-true", "fp16"] = "auto"
    """auto: bf16 where the GPU supports it, else fp16 on CUDA, fp32 elsewhere. bf16-true: weights and gradients are
    bf16 too."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    compile: Annotated[Literal["auto", "off", "on"], BeforeValidator(off_on)] = "auto"
    """Compile each block with torch.compile: a minute at the start, faster updates after. auto: on CUDA where it works,
    never on a CPU, where it does not pay."""
    parallel: Literal["auto", "ddp", "fsdp", "none"] = "auto"
    """How the processes that torchrun starts share the work. ddp: each holds the full model. fsdp: each holds a part of
    the model, of its gradients and of the optimizer's state. auto: ddp where a step fits one device."""
    shard_size: Int | None = Field(None, ge=1)
    """With fsdp: the number of processes that share one model, such as those of one machine; the groups are replicas.
    Default: all processes share one model."""
    loss: str | None = None
    """A loss of your own, as package.module:function(logits, targets, mask=None) → mean over the tokens given."""
    log_interval: Int = Field(10, ge=1)
    """Updates between two lines of metrics."""
    eval_interval: Int = Field(100, ge=1)
    """Updates between two evaluations on validation data."""
    eval_batch_size: Annotated[PositiveInt | Literal["auto"], BeforeValidator(count_or_auto)] = "auto"
    """Sequences per forward pass of an evaluation. auto: as many as in training."""
    eval_sequences: Int = Field(128, ge=1)
    """Size of the fixed validation subset, in sequences of max_seq_len tokens."""
    early_stopping_patience: Int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better validation loss."""

    @property
    def sequences_per_update(self) -> int:
        """Sequences of one update."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def sequences_at_once(self) -> int:
        """Sequences per forward pass, as long as memory does not run out."""
        asked = self.micro_batch_size
        return self.batch_size if asked == "auto" else min(asked, self.sequences_per_update)


class LoraConfig(Section):
    """Fine-tuning by low-rank updates; the base weights are frozen."""

    rank: Int = Field(0, ge=0, le=4096)
    """Inner width of each update; 0: no updates, all weights are trained."""
    alpha: Float = Field(16.0, gt=0)
    """An update is multiplied by alpha / rank."""
    targets: tuple[Literal["qkv", "output", "up", "down"], ...] = Field(
        ("qkv", "output", "up", "down"), min_length=1
    )
    """The matrices of each block that get an update: qkv and output of attention, up and down of the MLP."""


class CheckpointConfig(Section):
    """Where checkpoints are saved and how often."""

    output_dir: str = "checkpoints"
    """Folder of checkpoints, training.log and metrics.jsonl."""
    save_interval: Int = Field(100, ge=1)
    """Updates between two checkpoints."""
    keep_checkpoints: Int = Field(5, ge=1)
    """Checkpoints kept of each kind; the best is always kept as well."""
    max_total: Annotated[ByteSize, BeforeValidator(size)] | None = None
    """Most bytes of all checkpoints together, such as 20GB: the oldest are deleted first, never the best and the
    newest."""
    slim_old: bool = False
    """Remove the optimizer state (AdamW's is two thirds of the bytes) from step checkpoints older than the newest
    two."""
    format: Literal["auto", "single", "sharded"] = "auto"
    """single: one .pt, gathered on the first process. sharded: a folder to which each process writes its part. auto:
    sharded where parallel is fsdp and the first process has no memory for the full checkpoint."""
    background: bool = True
    """Write checkpoints from a copy in main memory while training continues; false: training waits for the disk."""


class GuardConfig(Section):
    """What is watched during a run, and how it reacts."""

    max_bad_steps: Int = Field(5, ge=1)
    """After this many updates in a row whose loss or gradient was not finite, the run returns to its last save."""
    spikes: Annotated[Literal["off", "skip", "rollback"], BeforeValidator(off_on)] = "off"
    """What to do with an update whose loss or gradient norm is far above the last 128: nothing, skip it, or roll back
    to the last save."""
    spike_z_score: Float = Field(6.0, gt=0)
    """How many standard deviations above their mean count as far."""
    max_gpu_temp: Int | None = Field(None, ge=40, le=110)
    """°C at which training waits, between two updates, until the NVIDIA GPU is 5 °C below. Default: never wait."""


class TrackingConfig(Section):
    """Experiment tracking besides training.log and metrics.jsonl, and sample texts during training."""

    tensorboard: bool = False
    """Write TensorBoard's event files to tensorboard/ in the output folder as well."""
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(off_on)] = "off"
    """Weights & Biases. offline: a run in wandb/ in the output folder, which `wandb sync` can send later. online:
    sends the run while it trains."""
    samples: Int = Field(2, ge=0, le=16)
    """Texts that the model generates after each evaluation; 0: none."""
    sample_prompt: str = ""
    """The prompt of these texts; empty: the beginning of a document."""
    sample_tokens: Int = Field(64, ge=1)
    """Tokens of each."""


class AtlasConfig(Section):
    """All settings of a run."""

    seed: Int = Field(1337, ge=0, lt=2**63)
    """Decides initial weights, order of data and dropout."""
    device: Annotated[str, AfterValidator(device_name)] = Field(
        "auto", json_schema_extra={"pattern": f"^({DEVICE})$"}
    )
    """auto, cpu, cuda, cuda:N (GPU number N, from 0) or mps. auto: cuda, else mps, else cpu."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()

    def replace(self, section: str, **changes: Any) -> AtlasConfig:
        """The config with changed values in one section. They are not validated."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=changes)})
