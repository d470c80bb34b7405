"""The code that a user runs on a GPU, once per variant on fake CUDA. `child.py` runs these.

A variant does its work once, since the first time may allocate, clears `seen`, and does it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table

import atlas.model.documents
import atlas.training.step
from atlas.config import AtlasConfig
from atlas.config.loader import nested, overlay, resolve
from atlas.inference import look as looking
from atlas.inference.generate import generate
from atlas.inference.load import LoadedModel
from atlas.inference.sampling import Sampling
from atlas.model import AtlasLM, build_model
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.generation import Generation
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.async_saver import Snapshot
from atlas.training.checkpoint.load import load_weights
from atlas.training.devices.compile import compile_blocks
from atlas.training.devices.device import Runtime, setup_runtime
from atlas.training.devices.signals import StopRequest
from atlas.training.evaluate import evaluate, token_losses
from atlas.training.guard import weights_fault
from atlas.training.micro_batch import _limit_memory
from atlas.training.state import TrainState
from atlas.training.step import accumulate_gradient, apply_gradient, fresh_learner
from benchmarks.fake_cuda import FakeCuda
from tests.toy import tokenizer

Seen = Counter[str]
VOCABULARY, LENGTH = 2000, 32  # more ids than top-p sorts first
MODERN = {
    "model.position": "rope",
    "model.norm": "rmsnorm",
    "model.mlp": "swiglu",
    "model.bias": False,
    "model.qk_norm": True,
    "model.num_kv_heads": 1,
}
SHALLOW = {"model.num_layers": 1}

TRAINING: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "fp32": {"training.precision": "fp32"},
    "fp16": {"training.precision": "fp16"},
    "bf16-true": {"training.precision": "bf16-true"},
    "Muon": {"training.optimizer": "muon"},
    "Adafactor": {"training.optimizer": "adafactor"},
    # adamw8bit is missing: the tests do not install torchao, and Triton must compile its step.
    "gradient checkpointing": {"training.gradient_checkpointing": True},
    "LoRA": {"lora.rank": 4},
    "modern": MODERN,
    "Muon in bf16-true": {**MODERN, "training.optimizer": "muon", "training.precision": "bf16-true"},
    "Adafactor in bf16-true": {
        **MODERN,
        "training.optimizer": "adafactor",
        "training.precision": "bf16-true",
    },
    "documents": {"data.document_mask": True},
    "documents, modern": {"data.document_mask": True, **MODERN},
    "documents with dropout": {"data.document_mask": True, "model.dropout": 0.1},
    "documents, narrow heads": {"data.document_mask": True, "model.num_heads": 4},
    "documents, narrow heads, bf16-true": {
        "data.document_mask": True,
        "model.num_heads": 4,
        "training.precision": "bf16-true",
    },
    "dropout, untied head": {"model.dropout": 0.1, "model.tie_embeddings": False},
    "uneven micro-batches": {"training.micro_batch_size": 3},
    "custom loss": {"training.loss": "tests.toy:stalling_loss"},
    "spikes": {"guard.spikes": "skip"},
}
"""Settings of two updates of two micro-batches each, with bf16 autocast by default."""


def config_of(settings: dict[str, Any]) -> AtlasConfig:
    layer: dict[str, Any] = {
        "device": "cuda",
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,  # 16 numbers each, the minimum of FlexAttention
            "vocab_size": VOCABULARY,
            "max_seq_len": LENGTH,
        },
        "training": {"batch_size": 2, "gradient_accumulation_steps": 2},
    }
    for key, value in settings.items():
        layer = overlay(layer, nested(key, value))
    return resolve(layer)


class Run:
    """A learner, its state, and its updates."""

    def __init__(self, settings: dict[str, Any], *, compiles: bool = False) -> None:
        self.config = config_of(settings)
        runtime = setup_runtime(self.config)
        self.runtime = Runtime(runtime.device, runtime.precision, compiles=compiles)
        self.learner = fresh_learner(self.config, self.runtime)
        size = self.config.training.micro_batch_size
        size = size if isinstance(size, int) else self.config.training.batch_size
        self.state = TrainState(horizon=100, micro_batch_size=size, eval_batch_size=size)
        self.stop = StopRequest(fail)

    def update(self) -> None:
        tokens = torch.randint(0, VOCABULARY, (self.config.training.sequences_per_update, LENGTH + 1))
        documents = [torch.zeros_like(tokens[:, 1:])] if self.config.data.document_mask else []
        gradient = accumulate_gradient(
            self.learner, [tokens[:, :-1], tokens[:, 1:], *documents], self.state, stop=self.stop
        )
        update = apply_gradient(self.learner, gradient, self.state, rate=1e-3)
        assert update.fault is None
        self.state.step += 1

    def check_devices(self) -> None:
        """Check that all weights and optimizer states, except step counts, are on the GPU."""
        tensors: dict[str, Tensor] = dict(self.learner.model.state_dict())
        for number, state in self.learner.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{key}": value for key, value in state.items() if torch.is_tensor(value)}
        elsewhere = {name for name, tensor in tensors.items() if tensor.dim() and not tensor.is_cuda}
        assert not elsewhere, f"not on the GPU: {sorted(elsewhere)}"

    def contents(self) -> dict[str, Any]:
        return {
            "model_state_dict": dict(self.learner.model.state_dict()),
            "optimizer_state_dict": self.learner.optimizer.state_dict(),
            "scaler_state_dict": self.learner.scaler.state_dict(),
            "config": self.config.model_dump(mode="json"),
        }


def fail(line: str) -> None:
    raise AssertionError(f"an unexpected message: {line}")


def train(settings: dict[str, Any], seen: Seen) -> None:
    run = Run(settings)
    run.update()
    seen.clear()
    run.update()
    run.check_devices()


def save(settings: dict[str, Any], seen: Seen) -> None:
    """The copy for a checkpoint: the second one, whose memory is already allocated."""
    settings = {**settings, **SHALLOW}
    run, snapshot = Run(settings), Snapshot()
    run.update()
    for _ in range(2):
        seen.clear()
        assert weights_fault(run.learner.model, run.runtime.world) is None
        contents = snapshot.take(run.contents())
    assert {tensor.device.type for tensor in contents["model_state_dict"].values()} == {"cpu"}


def resume(settings: dict[str, Any], seen: Seen) -> None:
    """A checkpoint's contents, loaded into a new run on the device, and its first update, which allocates nothing."""
    settings = {**settings, **SHALLOW}
    first = Run(settings)
    first.update()
    contents = Snapshot().take(first.contents())
    run = Run(settings)
    load_weights(run.learner.model, contents, None)
    run.learner.load_optimizer_state(contents["optimizer_state_dict"])
    if run.learner.scaler.is_enabled():
        run.learner.scaler.load_state_dict(contents["scaler_state_dict"])
    run.check_devices()
    seen.clear()
    run.update()
    run.check_devices()


class Windows:
    """Validation data."""

    bytes_per_token = 1.0

    def __init__(self, *, documents: bool = False) -> None:
        self.columns = 3 if documents else 2

    def __len__(self) -> int:
        return 3

    def __getitem__(self, window: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(LENGTH, dtype=torch.long) for _ in range(self.columns))


def evaluation(settings: dict[str, Any], seen: Seen) -> None:
    """Two batches, of which the second is smaller, and the losses of a window's tokens."""
    run = Run(settings)
    data: Any = Windows(documents=run.config.data.document_mask)
    seen.clear()
    assert evaluate(run.learner.objective, data, [0, 1, 2], batch_size=2, runtime=run.runtime)
    token_losses(run.learner.model, data, 0, runtime=run.runtime)


def model_of(settings: dict[str, Any]) -> AtlasLM:
    model = build_model(config_of(settings).model, seed=0)
    return model.to("cuda", torch.bfloat16).eval()


def generation(
    settings: dict[str, Any], prompts: list[list[int]], sampling: Sampling, seen: Seen, *, steps: int = 3
) -> None:
    """The cost of the third token: the first belongs to the prompt, and the second records a CUDA graph."""
    tokens = generate(model_of(settings), prompts, sampling, max_tokens=steps)
    for _ in range(steps):
        seen.clear()
        assert len(next(tokens)) == len(prompts)


def loaded_model(settings: dict[str, Any]) -> LoadedModel:
    model = model_of(settings)
    facts: dict[str, Any] = {"data": {}}
    return LoadedModel(
        model, Tokenizer.wrap(tokenizer()), AtlasConfig(model=model.config), Path("fake.pt"), facts
    )


def server_step(settings: dict[str, Any], texts: list[Generation], seen: Seen) -> None:
    """The second step after all sequences have joined: the first records a CUDA graph."""
    engine = Engine(loaded_model(settings), "fake", parallel=4, queue=8)
    with torch.inference_mode():
        engine.submit(texts)
        engine._step()
        assert engine.num_running == len(texts)
        engine._step()
        seen.clear()
        engine._step()


def server_joins(settings: dict[str, Any], seen: Seen) -> None:
    """A sequence joins one that is being generated, and both end with the next step."""
    engine = Engine(loaded_model(settings), "fake", parallel=4, queue=8)
    with torch.inference_mode():
        engine.submit([text([1, 2, 3], max_tokens=3)])
        engine._step()
        seen.clear()
        engine.submit([text([4], max_tokens=2)])
        engine._step()
        engine._step()
        assert engine.num_running == 0


def look(seen: Seen) -> None:
    """What `atlas look` and the server's page show of a text. It is short, and its waits do not count."""
    loaded, ids = loaded_model(MODERN), [1, 2, 3, 4]
    loaded.logits(ids)
    looking.expectations(loaded, ids)
    looking.next_token(loaded, ids, RAGGED)
    looking.attention(loaded, ids)
    looking.lens(loaded, ids, position=1)
    seen.clear()


def text(prompt: list[int], sampling: Sampling | None = None, **options: Any) -> Generation:
    return Generation(prompt, sampling or Sampling(), **{"max_tokens": 8, "seed": 0, **options})


GREEDY, RAGGED = Sampling(temperature=0), Sampling(repetition_penalty=1.2, min_p=0.1)


def others() -> dict[str, Callable[[Seen], None]]:
    """All variants except training."""
    long = [[1] * LENGTH]
    mixed = [text([1, 2, 3]), text([4], GREEDY, num_candidates=3), text([5, 6], RAGGED)]
    return {
        "trial of a micro-batch": lambda seen: _limit_memory(1 << 30, torch.device("cuda")),
        "save": lambda seen: save({}, seen),
        "resume": lambda seen: resume({}, seen),
        "resume fp16": lambda seen: resume(TRAINING["fp16"], seen),
        "resume bf16-true": lambda seen: resume(TRAINING["bf16-true"], seen),
        "resume Muon": lambda seen: resume(TRAINING["Muon"], seen),
        "evaluation": lambda seen: evaluation({}, seen),
        "evaluation, documents": lambda seen: evaluation(TRAINING["documents, modern"], seen),
        "greedy": lambda seen: generation({}, [[1, 2, 3]], GREEDY, seen),
        "sampling": lambda seen: generation({}, [[1, 2, 3]], Sampling(), seen),
        "sampling, modern": lambda seen: generation(MODERN, [[1, 2, 3]], Sampling(), seen),
        "ragged, penalty, min_p": lambda seen: generation({}, [[1, 2, 3], [4]], RAGGED, seen),
        "ragged, modern": lambda seen: generation(MODERN, [[1, 2, 3], [4]], RAGGED, seen),
        "prompt": lambda seen: generation({}, [[1, 2, 3]], Sampling(), seen, steps=1),
        "window full": lambda seen: generation({}, long, GREEDY, seen, steps=2),
        "server": lambda seen: server_step({}, [text([1, 2, 3]), text([4, 5])], seen),
        "server, modern, mixed": lambda seen: server_step(MODERN, mixed, seen),
        "server, joining and leaving": lambda seen: server_joins({}, seen),
        "look": look,
    }


def graphs(device: FakeCuda, seen: Seen) -> dict[str, dict[str, int]]:
    """The number of graphs compiled in each phase of a run, in this order, for a block and for the loss; and the waits
    of a compiled update."""
    compiled: Seen = Counter()

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        lines = "".join(node.stack_trace or "" for node in graph.graph.nodes)
        compiled["block" if "atlas/model/" in lines else "loss"] += 1
        return graph.forward  # type: ignore[no-any-return]

    counts: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        compiled.clear()
        yield
        counts[name] = dict(compiled)

    device.backend = backend
    try:
        settings = {"training.batch_size": 5, "training.gradient_accumulation_steps": 1}
        settings |= {"training.micro_batch_size": 3, "model.num_layers": 3}
        run = Run(settings, compiles=True)
        with phase("first update, 3 + 2 sequences"):
            run.update()
        with phase("second update"):
            run.update()
        data: Any = Windows()
        for name in ("evaluation of 2 + 1", "second evaluation"):
            with phase(name):
                evaluate(run.learner.objective, data, [0, 1, 2], batch_size=2, runtime=run.runtime)
        seen.clear()
        with phase("third update"):
            run.update()
        counts["waits of the third update"] = dict(seen)
        with phase("less memory, 2 + 2 + 1"):
            run.state.micro_batch_size = 2
            run.update()
    finally:
        device.backend = None
    return counts


def patch() -> None:
    """Replace what fake CUDA lacks: Triton, and a generator of the device, whose numbers nobody reads."""
    atlas.model.documents.has_flex_attention = lambda device: device.type == "cuda"
    atlas.training.step.rounding_generator = lambda *place: None  # type: ignore[assignment, return-value]


BLOCKS: dict[str, dict[str, Any]] = {"gpt2": {}, "modern": MODERN, "dropout": {"model.dropout": 0.1}}
SAVED_BY = [f"{family}, {how}" for family in BLOCKS for how in ("eager", "little", "all")]
SEQUENCES, CONTEXT = 2, 256


def block_config(family: str) -> AtlasConfig:
    return config_of({"model.hidden_size": 64, "model.max_seq_len": CONTEXT, **SHALLOW, **BLOCKS[family]})


def saved(device: FakeCuda) -> dict[str, int]:
    """Bytes that a block saves for the backward pass in bf16 autocast, each storage once. Weights, their copies and
    what all blocks use are left out. `little` and `all` are compiled."""
    found = {}
    for name in SAVED_BY:
        family, how = name.split(", ")
        kept: dict[int, Tensor] = {}
        keep = partial(_keep, kept)
        model = build_model(block_config(family).model, seed=0).to("cuda").train()
        if how == "eager":
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            model.blocks[0].register_forward_pre_hook(lambda *_, hooks=hooks: hooks.__enter__())
            model.blocks[0].register_forward_hook(lambda *_, hooks=hooks: hooks.__exit__())
        else:
            torch._dynamo.reset()
            device.backend = aot_autograd(
                fw_compiler=partial(_keep_outputs, keep),
                bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
                partition_fn=min_cut_rematerialization_partition,
                decompositions=select_decomp_table(),
            )
            compile_blocks(model, keeps_little=how == "little")
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            model(torch.zeros(SEQUENCES, CONTEXT, dtype=torch.long, device="cuda"))
        device.backend = None
        found[name] = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return found


def _keep(kept: dict[int, Tensor], tensor: Any) -> Any:
    if isinstance(tensor, Tensor) and tensor.shape[:1] in ((SEQUENCES,), (SEQUENCES * CONTEXT,)):
        kept[tensor.untyped_storage()._cdata] = tensor
    return tensor


def _keep_outputs(keep: Callable[[Any], Any], graph: Any, inputs: Any) -> Any:
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    for node in outputs[1:]:
        keep(node.meta.get("val"))
    return make_boxed_func(graph.forward)
