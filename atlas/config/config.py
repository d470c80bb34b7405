"""The settings of a run, as frozen and validated classes.

The docstring under a field is its only description. `--help`, `docs/CONFIG.md` and the JSON schema for editors are
generated from these docstrings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PositiveInt, model_validator

from atlas.config.fields import DEVICE, Float, Int, Section, count_or_auto, device_name, off_on, size
from atlas.config.model import ModelConfig as ModelConfig

LOSS_CHUNK_TOKENS = 256
"""Number of tokens per chunk of logits in the training loss on a CPU. With GPT-2's vocabulary, a chunk needs 51 MB in
fp32."""
LOSS_CACHED_ROWS = 32
"""The training loss on a CPU computes the probabilities of this number of tokens at a time. In fp32, they fit into a
processor's cache."""
CUDA_LOSS_BYTES = 256 << 20
"""Largest size in bytes of a chunk of logits on CUDA. Without compilation, the size includes all tensors that are
computed from the chunk."""
MUON_STACK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25, "mps": 1 << 20}
"""Largest number of elements in a group of matrices that Muon orthogonalizes together, by device. All matrices of a
group have the same shape. On a CPU, grouping makes Muon 1.8 times as fast in a model of width 128, and no faster at
width 768. On CUDA, grouping saves kernel launches: a group needs 25 launches, whatever its size."""


class MixturePart(Section):
    """One dataset of a mixture."""

    path: str
    """A prepared folder, or plain text (file, folder or zip)."""
    weight: Float = Field(gt=0)
    """The dataset's share of the sequences, relative to the other weights."""


class DataConfig(Section):
    """The training and validation data."""

    train_data: str | None = None
    """Training data: a prepared folder, plain text (file, folder or zip), or conversations (JSONL). With conversations,
    the loss counts only the answers."""
    mixture: tuple[MixturePart, ...] | None = Field(None, min_length=1)
    """Several datasets instead of train_data, each with its share of the sequences:
    [{path: a, weight: 0.7}, {path: b, weight: 0.3}]."""
    val_data: str | None = None
    """Validation data, in the same formats as train_data. Default: the validation split of the training data."""
    tokenizer: str | None = None
    """Tokenizer for plain text: gpt2 (the default), a tokenizer.json, or package.module:factory. The command must name
    such a factory, not only a config file. A prepared folder has its own tokenizer."""
    val_fraction: Float = Field(0.05, ge=0, lt=1)
    """Fraction of the documents of a plain text that is held out for validation."""
    chat_format: str | None = None
    """Layout of the conversations, if Atlas should not find it out: openai, sharegpt, alpaca, dolly, or the fields
    themselves, such as messages or question/answer."""
    on_error: Literal["stop", "skip"] | None = None
    """stop: end at the first row or file that cannot be read. skip: leave out any number of them. Default: leave out a
    few."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents are joined and cut into windows. best_fit: complete documents are combined into windows, and a
    document is cut only if it is longer than a window. Validation data is always read as concat. Complete conversations
    are always combined into windows."""
    document_mask: bool = False
    """If a sequence holds several documents, keep attention inside each document, and restart positions in each
    document. Default: true for conversations, else false."""
    num_workers: Int = Field(1, ge=0)
    """Number of threads that read batches ahead of training. With 0, the training thread reads the batches."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.train_data is not None and self.mixture is not None:
            raise ValueError(
                f"train_data {self.train_data} and mixture exclude each other: set one of them to null"
            )
        return self


class TrainingConfig(Section):
    """Optimization, logging and evaluation."""

    batch_size: Int = Field(8, ge=1)
    """Number of sequences per accumulation step."""
    gradient_accumulation_steps: Int = Field(1, ge=1)
    """An update uses batch_size × gradient_accumulation_steps sequences."""
    micro_batch_size: Annotated[PositiveInt | Literal["auto"], BeforeValidator(count_or_auto)] = "auto"
    """Sequences per forward pass. The value changes memory and speed, not the result. auto: batch_size, or fewer if
    memory is too small. On a GPU with ample memory, auto may use all sequences of an update. auto never exceeds a
    batch_size that you set yourself (in your own config file, with --set or as a flag)."""
    max_steps: Int | None = Field(None, ge=1)
    """Updates to train for. If epochs is set too, the smaller limit counts. If neither is set, training runs for one
    epoch, but fine-tuning on conversations for 400 updates (800 with LoRA) or three epochs, whichever is more."""
    epochs: Int | None = Field(None, ge=1)
    """Passes over the training data."""
    max_hours: Float | None = Field(None, gt=0)
    """Total hours to train for. From the speed of the first updates, Atlas plans the learning-rate schedule so that
    training ends within this time. If max_steps or epochs is set too, the earlier limit counts. Otherwise, training
    runs for as many epochs as there is time for."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "adafactor"] = "adamw"
    """The optimizer, which cannot change during a run. adamw: AdamW. adamw8bit: torchao's AdamW, whose state needs a
    quarter of the memory. muon: Muon for the matrices of the blocks and AdamW for all other weights; needs less memory
    than AdamW. At width 768, Muon's updates are as large as AdamW's at the same learning rate. Muon's best learning
    rate changes little with the width. adafactor: Adafactor, whose state needs almost no memory, with AdamW's learning
    rates."""
    learning_rate: Float = Field(3e-4, gt=0)
    """Peak learning rate, reached after warm-up."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the learning rate decays after warm-up: cosine, linear or wsd. wsd keeps the learning rate constant, and
    decays it linearly in the last part of the run (decay_fraction)."""
    decay_fraction: Float = Field(0.2, gt=0, le=1)
    """With wsd: the last fraction of the run, in which the learning rate decays."""
    min_learning_rate_ratio: Float = Field(0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    warmup_steps: Int = Field(100, ge=0)
    """Updates of linear warm-up."""
    weight_decay: Float = Field(0.1, ge=0)
    """Weight decay of matrices. Biases and norms have no weight decay."""
    beta1: Float = Field(0.9, ge=0, lt=1)
    """Decay rate of AdamW's moving average of the gradient."""
    beta2: Float = Field(0.95, ge=0, lt=1)
    """Decay rate of AdamW's moving average of the squared gradient."""
    grad_clip: Float = Field(1.0, ge=0)
    """Largest gradient norm: gradients with a larger norm are scaled down to this norm. 0: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "bf16-true", "fp16"] = "auto"
    """auto: bf16 if the GPU or the CPU computes in it, else fp16 on CUDA, and fp32 on other devices. A resumed run
    keeps its precision. bf16-true: weights and gradients are bf16 too."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    compile: Annotated[Literal["auto", "off", "on"], BeforeValidator(off_on)] = "auto"
    """Compile each block with torch.compile. Compilation takes a minute at the start, and makes updates on a GPU
    faster. auto: compile on CUDA if compilation works there, and on no other device. On a CPU, compiled blocks can be
    slower."""
    parallel: Literal["auto", "ddp", "fsdp", "none"] = "auto"
    """How the processes that torchrun starts share the work. ddp: each process holds the full model. fsdp: each process
    holds a part of the model, of its gradients and of the optimizer's state. auto, with several processes: ddp if an
    update fits on one device, else fsdp."""
    shard_size: Int | None = Field(None, ge=1)
    """With fsdp: the number of processes that share one copy of the model, such as the processes of one machine. Each
    group of shard_size processes holds its own copy. Default: all processes share one copy."""
    loss: str | None = None
    """Your own loss, as package.module:function. Atlas calls function(logits, targets, mask=None). The function returns
    the mean loss over the tokens at which mask is true. The command must name this function, not only a config file."""
    log_interval: Int = Field(10, ge=1)
    """Number of updates between two lines of metrics."""
    eval_interval: Int = Field(100, ge=1)
    """Number of updates between two evaluations on validation data."""
    eval_batch_size: Annotated[PositiveInt | Literal["auto"], BeforeValidator(count_or_auto)] = "auto"
    """Sequences per forward pass of an evaluation. auto: the same number as in training."""
    eval_sequences: Int = Field(128, ge=1)
    """Size of the fixed validation subset, in sequences of max_seq_len tokens."""
    early_stopping_patience: Int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better validation loss."""

    @property
    def sequences_per_update(self) -> int:
        """Number of sequences per update."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def sequences_at_once(self) -> int:
        """Number of sequences per forward pass. If memory runs out, Atlas uses fewer sequences."""
        asked = self.micro_batch_size
        return self.batch_size if asked == "auto" else min(asked, self.sequences_per_update)


class LoraConfig(Section):
    """Fine-tuning by low-rank updates; the base weights are frozen."""

    rank: Int = Field(0, ge=0, le=4096)
    """Rank of each low-rank update. 0: no LoRA; all weights are trained."""
    alpha: Float = Field(16.0, gt=0)
    """Each low-rank update is multiplied by alpha / rank."""
    targets: tuple[Literal["qkv", "output", "up", "down", "embedding", "head"], ...] = Field(
        ("qkv", "output", "up", "down"), min_length=1
    )
    """The matrices that get a low-rank update: in each block, qkv and output of attention, and up and down of the MLP;
    embedding, the table of the tokens; head, the LM head. In a model with tied embeddings, embedding and head are one
    matrix, with one update."""

    @property
    def updates_tables(self) -> bool:
        """Whether the token embedding or the LM head gets a low-rank update."""
        return self.rank > 0 and not {"embedding", "head"}.isdisjoint(self.targets)


class CheckpointConfig(Section):
    """Where checkpoints are saved and how often."""

    output_dir: str = "checkpoints"
    """Folder for checkpoints, training.log and metrics.jsonl."""
    save_interval: Int = Field(100, ge=1)
    """Number of updates between two checkpoints."""
    keep_checkpoints: Int = Field(5, ge=1)
    """Number of checkpoints to keep of each kind (step, epoch, interrupt); the best checkpoint is always kept as
    well."""
    max_total: Annotated[ByteSize, BeforeValidator(size)] | None = None
    """Largest total size of all checkpoints, such as 20GB. The oldest checkpoints are deleted first; the best and the
    newest are never deleted."""
    slim_old: bool = False
    """Remove the optimizer state from all step checkpoints except the newest two. AdamW's state is two thirds of a
    checkpoint."""
    format: Literal["auto", "single", "sharded"] = "auto"
    """single: one .pt file, gathered on the first process. sharded: a folder to which each process writes its part.
    auto: sharded if parallel is fsdp and the first process has too little memory for the full checkpoint, else
    single."""
    background: bool = True
    """Write checkpoints from a copy in main memory while training continues. false: training waits for the disk."""


class GuardConfig(Section):
    """Problems that Atlas detects during a run, and how Atlas reacts."""

    max_bad_steps: Int = Field(5, ge=1)
    """After this many updates in a row whose loss or gradient was not finite, the run rolls back to the last save."""
    spikes: Annotated[Literal["off", "skip", "rollback"], BeforeValidator(off_on)] = "off"
    """Reaction to an update whose loss or gradient norm is far above the mean of the last 128 updates. off: none. skip:
    skip the update. rollback: roll back to the last save."""
    spike_z_score: Float = Field(6.0, gt=0)
    """An update is a spike if its loss or gradient norm is more than this number of standard deviations above the mean
    of the last 128 updates."""
    max_gpu_temp: Int | None = Field(None, ge=40, le=110)
    """Temperature in °C at which training pauses between two updates until the NVIDIA GPU is 5 °C cooler. Default:
    never pause."""


class TrackingConfig(Section):
    """Experiment tracking in addition to training.log and metrics.jsonl, and sample texts during training."""

    tensorboard: bool = False
    """Write TensorBoard's event files to tensorboard/ in the output folder as well."""
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(off_on)] = "off"
    """Weights & Biases. offline: save the run to wandb/ in the output folder; `wandb sync` can send it later. online:
    send the run during training."""
    samples: Int = Field(2, ge=0, le=16)
    """Texts that the model generates after each evaluation; 0: none."""
    sample_prompt: str = ""
    """The prompt of the sample texts; empty: the beginning of a document."""
    sample_tokens: Int = Field(64, ge=1)
    """Tokens per sample text."""


class AtlasConfig(Section):
    """All settings of a run."""

    seed: Int = Field(1337, ge=0, lt=2**63)
    """Random seed for initial weights, order of data and dropout."""
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
        """Return the config with changed values in one section. The new values are not validated."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=changes)})
