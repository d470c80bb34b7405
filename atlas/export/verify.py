"""Prove, with llama.cpp itself, that a GGUF file and the original model give the same results.

Four things must agree, and with quantized weights a fifth:

- The file has the model's shape and vocabulary. Every tensor equals the model's tensor, rounded to the type in the
  file.
- llama.cpp and Atlas's tokenizer give the same token ids for a corpus of difficult texts.
- llama.cpp computes the same log-probabilities as PyTorch with the weights *read back from the file*.
- In greedy decoding, llama.cpp and PyTorch choose the same tokens. A different token is accepted as a near-tie if
  PyTorch's log-probabilities of the two tokens differ by less than the bound.
- With quantized weights, the predictions of llama.cpp and of PyTorch also differ little on average.

PyTorch reads the text that llama.cpp generated, so that a near-tie does not end the comparison. One prompt and its
continuation fill the context, or `LONGEST_CONTEXT` tokens of it. The report also contains the drift: how much the
rounding of the weights changed the log-probabilities. The drift does not affect the verdict.

The bounds depend on the model, because llama.cpp rounds some numbers that PyTorch does not round. llama.cpp reads GELU
from a table of f16 numbers. It also rounds the inputs of matrix products to the type of the weights, or to 8 bits if
the weights are quantized. These roundings change a log-probability by 1e-4 in an untrained model, by 2e-2 in a model of
135 M parameters in f16, and by 1 in the same model with quantized weights. So no fixed bound fits all models. Instead
PyTorch runs once with these roundings and once without, and the difference of these two runs is the unit:

- Without quantized weights, the largest difference of a log-probability may be 3 units, or 10 units with f16 weights,
  since some CPUs also add in f16.
- With quantized weights, the largest difference may be 3 units too, but a large model amplifies small differences, so
  that this bound alone would let faults pass. The mean Kullback-Leibler divergence between the predictions of llama.cpp
  and of PyTorch may be 2 units. In SmolLM2 (135 M) it was 0.8 to 1.1 units in correct files of 5 types, 2.2 units where
  the rows of q and k had a wrong order in one of 30 layers, and 200 units where they had it in each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray
from torch import Tensor, nn

from atlas.export.gguf import file_tensors, metadata_of, read_gguf, tensor_types
from atlas.export.llama_cpp import UNDERFLOW, Step, ask_llama_cpp
from atlas.export.quantize import Quantization, as_type
from atlas.export.vocabulary import TEXTS, check_tokenizer, normalized
from atlas.model import AtlasLM
from atlas.model.mlp import MLP
from atlas.tokenizer import Tokenizer

SMALLEST_BOUND, LARGEST_BOUND = 1e-3, 0.1
"""The smallest bound of a difference, and the largest one without quantized weights, in nats. With quantized weights,
the largest one is the standard deviation of the log-probabilities over the vocabulary. Between these limits, the bound
depends on the model."""
SMALLEST_KL_BOUND = 1e-7
LONGEST_CONTEXT = 2048
"""The largest number of tokens in a prompt and its continuation. A context of 8,192 tokens took minutes."""

_ROUNDING_FACTOR, _ROUNDING_FACTOR_OF_F16, _KL_FACTOR = 3.0, 10.0, 2.0
"""The bound of the largest difference for most files and for f16 files, and the bound of the mean divergence. The unit
is the difference between the two runs of PyTorch, with and without llama.cpp's roundings."""

PROMPT_TOKENS = 16
"""The largest number of tokens in each prompt that is the beginning of a text."""


@dataclass(frozen=True)
class Proof:
    """The results of all comparisons. `holds` is the verdict, and `str()` gives the report."""

    num_tensors: int
    quantize: Quantization
    file_differences: tuple[str, ...]
    num_texts: int
    num_text_tokens: int
    text_differences: tuple[str, ...]
    num_logprobs: int
    largest_difference: float
    bound: float
    mean_kl: float
    """Mean Kullback-Leibler divergence of llama.cpp's predictions from PyTorch's, in nats."""
    kl_bound: float | None
    """None without quantized weights."""
    same_first: float
    """The share of the steps where PyTorch's most probable token is llama.cpp's."""
    mean_drift: float
    largest_drift: float
    num_steps: int
    near_ties: int
    wrong_steps: int

    @property
    def checks(self) -> list[tuple[str, bool, str]]:
        """For each of the checks: the name, whether the check passed, and details."""
        file = f"{self.num_tensors} tensors as {self.quantize} files have them, shape, vocabulary"
        texts = f"{self.num_text_tokens:,} tokens of {self.num_texts} texts"
        logprobs = f"{self.num_logprobs:,} compared, largest difference {self.largest_difference:.1e}"
        steps = f"{self.num_steps:,} tokens, {self.near_ties} near-ties, {self.wrong_steps} different"
        logprobs_agree = self.num_logprobs > 0 and self.largest_difference < self.bound
        checks = [
            ("file", not self.file_differences, ", not ".join([file, *self.file_differences])),
            ("token ids", not self.text_differences, ", not ".join([texts, *self.text_differences])),
            ("log-probabilities", logprobs_agree, f"{logprobs} (bound {self.bound:.1e})"),
            ("greedy text", self.num_steps > 0 and self.wrong_steps == 0, steps),
        ]
        if self.kl_bound is not None:
            first = f"{self.same_first:.1%} the same first choice"
            divergence = f"mean KL divergence {self.mean_kl:.1e} (bound {self.kl_bound:.1e}), {first}"
            checks.insert(3, ("predictions", self.mean_kl < self.kl_bound, divergence))
        return checks

    @property
    def holds(self) -> bool:
        """Whether all checks passed."""
        return all(agrees for _, agrees, _ in self.checks)

    def __str__(self) -> str:
        rows = [
            f"{'same' if agrees else 'DIFFERENT':<10} {name:<18} {facts}"
            for name, agrees, facts in self.checks
        ]
        if self.quantize != "f32":
            rows.append(
                f"{'note':<10} {'drift':<18} log-probabilities moved by {self.mean_drift:.1e} on average, "
                f"{self.largest_drift:.1e} at most, as the weights were rounded (f32: 0)"
            )
        return "\n".join(["llama.cpp against PyTorch with the weights read back from the file:", *rows])


def verify_gguf(
    path: str | Path,
    model: AtlasLM,
    tokenizer: Tokenizer,
    *,
    quantize: Quantization,
    texts: Sequence[str] = (),
    max_tokens: int = 100,
) -> Proof:
    """Compare the GGUF file `path` with `model` and `tokenizer`, from which the file was exported with `quantize`.

    `texts` are placed before the difficult texts. The beginnings of the first two texts that are not empty become
    prompts.
    Raises `ExportError` if `path` is not a GGUF file that Atlas wrote, or if llama.cpp cannot run the file.
    """
    check_tokenizer(tokenizer, model.config)
    read, metadata = read_gguf(path)
    tensors = file_tensors(model)
    types = tensor_types(model, tensors, quantize)
    expected = {
        name: torch.from_numpy(gguf.dequantize(as_type(tensor.numpy(), types[name]), types[name]))
        for name, tensor in tensors.items()
    }
    file_differences = _differing(metadata, metadata_of(model, tokenizer, quantize), operator.eq)
    file_differences += _differing(file_tensors(read), expected, torch.equal)

    corpus = normalized([*texts, *TEXTS], tokenizer)
    ids = tokenizer.encode_batch(corpus)
    context = min(read.config.max_seq_len, LONGEST_CONTEXT)
    prompts = _prompts(ids, tokenizer.eos_id, context, max_tokens)
    lengths = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    answer = ask_llama_cpp(path, corpus, prompts, lengths, context=context)
    tokenized = zip(corpus, ids, answer.token_ids, strict=True)
    continued = zip(prompts, answer.continuations, strict=True)

    found = _compare(read, model, quantize, continued)
    has_blocks = not {TensorType.F32, TensorType.F16, TensorType.BF16}.issuperset(types.values())
    has_f16_only = not has_blocks and TensorType.F16 in types.values()
    factor = _ROUNDING_FACTOR_OF_F16 if has_f16_only else _ROUNDING_FACTOR
    moved = factor * np.nan_to_num(found.roundings, nan=np.inf).max(initial=0)
    bound = float(np.clip(moved, SMALLEST_BOUND, found.spread if has_blocks else LARGEST_BOUND))
    unit = np.nan_to_num(found.own_divergences, nan=np.inf).mean() if len(found.gaps) else 0.0
    return Proof(
        num_tensors=len(expected),
        quantize=quantize,
        file_differences=tuple(file_differences),
        num_texts=len(corpus),
        num_text_tokens=sum(map(len, ids)),
        text_differences=tuple(text for text, ours, theirs in tokenized if ours != theirs),
        num_logprobs=len(found.differences),
        largest_difference=float(found.differences.max(initial=0)),
        bound=bound,
        mean_kl=float(found.divergences.mean()) if len(found.gaps) else 0.0,
        kl_bound=max(_KL_FACTOR * float(unit), SMALLEST_KL_BOUND) if has_blocks else None,
        same_first=float((found.gaps == 0).mean()) if len(found.gaps) else 0.0,
        mean_drift=float(found.drifts.mean()) if len(found.drifts) else 0.0,
        largest_drift=float(found.drifts.max(initial=0)),
        num_steps=len(found.gaps),
        near_ties=int(((found.gaps > 0) & (found.gaps < bound)).sum()),
        wrong_steps=int((~(found.gaps < bound)).sum()),
    )


def _differing(
    found: dict[str, Any], expected: dict[str, Any], equal: Callable[[Any, Any], bool]
) -> list[str]:
    return [name for name in expected if name not in found or not equal(found[name], expected[name])]


def _prompts(ids: Sequence[list[int]], eos_id: int, context: int, max_tokens: int) -> list[list[int]]:
    """Return the prompts: the start of a document, the beginnings of two texts, and the longest prompt that leaves room
    for `max_tokens` new tokens."""
    short = min(PROMPT_TOKENS, max(1, context // 2))
    beginnings = [text[:short] for text in ids if text][:2]
    everything = [id for text in ids for id in text]
    long = max(context - max_tokens, short)
    return [[eos_id], *beginnings, (everything * (1 + long // len(everything)))[:long]]


class _Comparison(NamedTuple):
    """Arrays of the differences between llama.cpp and PyTorch. The plain run is PyTorch in fp32; the rounded run is
    PyTorch with llama.cpp's roundings."""

    differences: NDArray[Any]
    """Per log-probability: llama.cpp against the rounded run."""
    roundings: NDArray[Any]
    """Per log-probability: the rounded run against the plain run."""
    drifts: NDArray[Any]
    """Per log-probability: the plain run against the model whose weights were not rounded."""
    gaps: NDArray[Any]
    """Per step of greedy decoding: the log-probability of PyTorch's choice minus that of llama.cpp's choice, in the
    rounded run. 0 if both choices are the same token."""
    divergences: NDArray[Any]
    """Per step: llama.cpp against the plain run, as Kullback-Leibler divergence."""
    own_divergences: NDArray[Any]
    """Per step: the rounded run against the plain run."""
    spread: float
    """The mean standard deviation of the log-probabilities over the vocabulary."""


def _compare(
    read: AtlasLM, model: AtlasLM, quantize: Quantization, continued: Iterable[tuple[list[int], list[Step]]]
) -> _Comparison:
    """Compare each step of llama.cpp with PyTorch. `model` has the weights before they were rounded, `read` those in
    the file."""
    compared, steps_compared, spreads = [], [], []
    for prompt, steps in continued:
        own, plain = _logprobs(model, prompt, steps), _logprobs(read, prompt, steps)
        with _rounding_as_llama_cpp(read, quantize):
            rounded = _logprobs(read, prompt, steps)
        spreads += plain.std(dim=-1).tolist() if steps else []
        for own_row, row, rounded_row, step in zip(own, plain, rounded, steps, strict=True):
            for id, logprob in step.logprobs.items():
                if not logprob <= UNDERFLOW:  # true also for nan, so that the check fails
                    difference = abs(logprob - rounded_row[id].item())
                    rounding, drift = rounded_row[id] - row[id], row[id] - own_row[id]
                    compared.append((difference, abs(rounding.item()), abs(drift.item())))
            gap = (rounded_row.max() - rounded_row[step.token]).item()
            ids = list(step.logprobs)
            theirs = torch.tensor([step.logprobs[id] for id in ids])
            steps_compared.append(
                (gap, _divergence(row[ids], theirs), _divergence(row[ids], rounded_row[ids]))
            )
    spread = float(np.mean(spreads)) if spreads else 0.0
    differences, roundings, drifts = np.reshape(compared, (-1, 3)).T
    gaps, divergences, own_divergences = np.reshape(steps_compared, (-1, 3)).T
    return _Comparison(differences, roundings, drifts, gaps, divergences, own_divergences, spread)


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    """Return the Kullback-Leibler divergence between two predictions, in nats, from the log-probabilities of the same
    tokens, shape (n,). All other tokens count as one."""
    p, q = ours.double().exp(), theirs.double().exp()
    rest_p, rest_q = (1 - p.sum()).clamp(min=1e-12), (1 - q.sum()).clamp(min=1e-12)
    return float((p * (ours.double() - theirs.double())).sum() + rest_p * (rest_p / rest_q).log())


@torch.inference_mode()
def _logprobs(model: AtlasLM, prompt: list[int], steps: Sequence[Step]) -> Tensor:
    """Return (steps, V): PyTorch's log-probabilities at each step of llama.cpp's continuation."""
    tokens = [*prompt, *(step.token for step in steps)][:-1] if steps else prompt
    hidden = model.hidden_states(torch.tensor([tokens]))[0]
    return F.log_softmax(model.head(hidden[len(prompt) - 1 :][: len(steps)]), dim=-1)


@contextmanager
def _rounding_as_llama_cpp(model: AtlasLM, quantize: Quantization) -> Iterator[None]:
    """A context in which `model` rounds like llama.cpp: the input and output of GELU, and the inputs of matrix
    products."""
    head = "q6_k" if quantize.startswith(("q4", "q5")) else quantize  # see `quantize.tensor_type`
    with ExitStack() as hooks:
        add = hooks.enter_context
        for module in model.modules():
            if isinstance(module, MLP) and not module.is_gated:
                add(module.up.register_forward_hook(lambda *args: _as_in_gelu_table(args[-1])))
                add(module.down.register_forward_pre_hook(lambda _, args: _as_in_gelu_table(args[0])))
            elif isinstance(module, nn.Linear):
                add(module.register_forward_pre_hook(lambda _, args: _as_multiplied(args[0], quantize)))
        add(model.final_norm.register_forward_hook(lambda *args: _as_multiplied(args[-1], head)))
        yield


def _as_in_gelu_table(x: Tensor) -> Tensor:
    """Round the values of `x` between -10 and 10 to f16, as in llama.cpp's table of GELU. For other values, llama.cpp
    needs no table, since GELU(x) is 0 or x."""
    return torch.where(x.abs() < 10, x.half().float(), x)


def _as_multiplied(x: Tensor, quantize: str) -> Tensor:
    """Round `x` as llama.cpp rounds the input of a matrix product. The rounding depends on the type of the weights.

    For quantized weights, the input is rounded to 8 bits, with one scale per block of 32 numbers. For K-quants, a block
    has 256 numbers if the last dimension of `x` is a multiple of 256. If this dimension is not a multiple of 32, the
    weights are in f16, and the input is rounded to f16.
    """
    if quantize == "f32":
        return x
    if quantize == "bf16":
        return x.bfloat16().float()
    if quantize == "f16" or x.shape[-1] % 32:
        return x.half().float()
    is_long = "_k" in quantize and x.shape[-1] % 256 == 0
    blocks = x.reshape(*x.shape[:-1], -1, 256 if is_long else 32)
    scales = (blocks.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / scales).round() * (scales if is_long else scales.half().float())).view_as(x)
