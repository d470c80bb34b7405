"""The proof that a GGUF file says what the model says, in llama.cpp itself.

Four things must hold. The file: shape and vocabulary are the model's, and every tensor is the model's, rounded
to its type. Token ids: llama.cpp gives the tokenizer's ids for a corpus of awkward texts. Log-probabilities:
llama.cpp's are those of PyTorch running the weights *read back from the file*, in fp32. Greedy text: each
token of llama.cpp's is PyTorch's choice too, or less probable than it by less than the bound (a near-tie).

PyTorch is fed llama.cpp's own text, so that a near-tie does not end the comparison, and one prompt reaches
to the end of the context, so that no position stays unread.

The bound. llama.cpp rounds where PyTorch does not: it looks GELU up in a table of f16 numbers, and rounds to
f16 what it multiplies with f16 weights. How far that moves a log-probability depends on the model: 1e-4 in a
fresh one, 1e-3 (f32) and 2e-3 (f16) in a trained one of 4 layers, 9e-3 and 2e-2 in one that has learnt a text
by heart, so that no fixed number serves. Instead PyTorch is run once more with these roundings. llama.cpp was
0.8 to 1.4 times as far from the plain run as this one in 104 proofs (2 to 12 layers, 32 to 384 wide, f32 and
f16, on x86-64), and may be 3 times as far; with f16 weights 10 times, as some CPUs also add in f16.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.export.gguf import Quantization, exportable, file_tensors, metadata_of, read_gguf, tensor_type
from atlas.export.llama_cpp import Step, ask_llama_cpp
from atlas.model import AtlasLM
from atlas.model.mlp import MLP
from atlas.tokenizer import Tokenizer

SMALLEST_BOUND, LARGEST_BOUND = 1e-3, 0.1
"""Nats; between them the bound follows from the model."""

ROUNDING_FACTOR: dict[Quantization, float] = {"f32": 3.0, "f16": 10.0}
"""How many times as far as PyTorch's own rounded run llama.cpp may be."""

UNDERFLOW = -80.0
"""Below this log-probability llama.cpp's fp32 softmax runs out of numbers."""

PROMPT_TOKENS = 16
"""Length of the prompts that are beginnings of texts."""

CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's what they've said; we'll see, I'd think, you're right.",
    "def fib(n: int) -> int:\n    if n < 2:\n\treturn n\n    return fib(n - 1) + fib(n - 2)  # O(φⁿ)\n",
    "<|endoftext|> is plain text here, <|endoftext|>twice, and so is <|im_start|> or <s>.",
    "In 1984, 12345678901234567890 people paid $3.14159 (or 2,718.28 €) for ½ kg at ²³ °C — 100%!",
    "  two spaces before,   three between,\ttabs\t\tand a trailing run   ",
    "line\nline\r\nline\n\n\nline   \n   \n\t\n end\n\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. Ça va? Łódź, naïve café, İstanbul.",
    "Съешь ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "日本語のテキスト、漢字かな交じり文。中文没有空格。한국어 문장입니다.",
    "نص عربي مع أرقام ١٢٣ و עברית עם ניקוד שָׁלוֹם और देवनागरी क्षत्रिय ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs é, ﬁ ﬀ, a\u00a0b\u2003c\u200bd\u3000e, \ufeffBOM, \x00\x07\x1b[0m",
    '{"key": [1, 2.5e-3, null, true], "path": "C:\\\\new\\\\table", "url": "https://example.org/?q=a&b=c#d"}',
    "ALLCAPS CamelCase snake_case kebab-case x'sX 'S 'LL don’t ''quoted'' ...!!! ----- ##### ((()))",
    "",
    " ",
    "\n",
    "a",
)
"""English, contractions, code, digits, runs of white space, scripts, marks, control characters."""


@dataclass(frozen=True)
class Proof:
    """What was compared and what differed; `holds` is the verdict, `str()` the report."""

    num_tensors: int
    quantize: Quantization
    file_differences: tuple[str, ...]
    num_texts: int
    num_text_tokens: int
    text_differences: tuple[str, ...]
    num_logprobs: int
    largest_difference: float
    bound: float
    num_steps: int
    near_ties: int
    wrong_steps: int

    @property
    def checks(self) -> list[tuple[str, bool, str]]:
        """What was compared, whether it agrees, and the facts."""
        file = f"{self.num_tensors} {self.quantize} tensors, shape, vocabulary"
        texts = f"{self.num_text_tokens:,} tokens of {self.num_texts} texts"
        logprobs = f"{self.num_logprobs:,} compared, largest difference {self.largest_difference:.1e}"
        steps = f"{self.num_steps:,} tokens, {self.near_ties} near-ties, {self.wrong_steps} different"
        logprobs_agree = self.num_logprobs > 0 and self.largest_difference < self.bound
        return [
            ("file", not self.file_differences, ", not ".join([file, *self.file_differences])),
            ("token ids", not self.text_differences, ", not ".join([texts, *self.text_differences])),
            ("log-probabilities", logprobs_agree, f"{logprobs} (bound {self.bound:.1e})"),
            ("greedy text", self.num_steps > 0 and self.wrong_steps == 0, steps),
        ]

    @property
    def holds(self) -> bool:
        return all(agrees for _, agrees, _ in self.checks)

    def __str__(self) -> str:
        rows = [
            f"{'same' if agrees else 'DIFFERENT':<10} {name:<18} {facts}"
            for name, agrees, facts in self.checks
        ]
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
    """Compare `path` with the `model` and `tokenizer` it was exported from, as `quantize` says.

    `texts` join the corpus, and the first of them are prompts. Raises `AtlasError` where the file is not a
    GGUF file of ours, or llama.cpp cannot run it.
    """
    tokenizer = exportable(tokenizer, model.config)
    read, metadata = read_gguf(path)
    expected = {name: _rounded(name, tensor, quantize) for name, tensor in file_tensors(model).items()}
    file_differences = _differing(metadata, metadata_of(model, tokenizer, quantize), operator.eq)
    file_differences += _differing(file_tensors(read), expected, torch.equal)

    corpus = [*texts, *CORPUS]
    ids = tokenizer.encode_batch(corpus)
    context = read.config.max_seq_len
    prompts = _prompts(ids, tokenizer.eos_id, context, max_tokens)
    lengths = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    threads = max(1, torch.get_num_threads() // 2)
    answer = ask_llama_cpp(path, corpus, prompts, lengths, context=context, threads=threads)
    told = zip(corpus, ids, answer.token_ids, strict=True)

    differences, roundings, gaps = _compare(read, quantize, prompts, answer.continuations)
    moved = ROUNDING_FACTOR[quantize] * np.nan_to_num(roundings, nan=np.inf).max(initial=0)
    bound = float(np.clip(moved, SMALLEST_BOUND, LARGEST_BOUND))
    return Proof(
        num_tensors=len(expected),
        quantize=quantize,
        file_differences=tuple(file_differences),
        num_texts=len(corpus),
        num_text_tokens=sum(map(len, ids)),
        text_differences=tuple(text for text, ours, theirs in told if ours != theirs),
        num_logprobs=len(differences),
        largest_difference=float(differences.max(initial=0)),
        bound=bound,
        num_steps=len(gaps),
        near_ties=int(((gaps > 0) & (gaps < bound)).sum()),
        wrong_steps=int((~(gaps < bound)).sum()),
    )


def _rounded(name: str, tensor: Tensor, quantize: Quantization) -> Tensor:
    type = tensor_type(name, tensor, quantize)
    return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), type), type))


def _differing(
    found: dict[str, Any], expected: dict[str, Any], equal: Callable[[Any, Any], bool]
) -> list[str]:
    return [name for name in expected if name not in found or not equal(found[name], expected[name])]


def _prompts(ids: Sequence[list[int]], eos_id: int, context: int, max_tokens: int) -> list[list[int]]:
    """The start of a document, the beginnings of two texts, and as much text as leaves room to go on."""
    short = min(PROMPT_TOKENS, max(1, context // 2))
    beginnings = [text[:short] for text in ids if text][:2]
    everything = [id for text in ids for id in text]
    long = max(context - max_tokens, short)
    return [[eos_id], *beginnings, (everything * (1 + long // len(everything)))[:long]]


def _compare(
    model: AtlasLM, quantize: Quantization, prompts: Sequence[list[int]], continuations: Sequence[list[Step]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Distances from PyTorch's log-probabilities: llama.cpp's, and PyTorch's own with llama.cpp's roundings;
    and for each step how much more probable PyTorch's choice is than llama.cpp's (0: they are one).
    """
    differences, roundings, gaps = [], [], []
    for prompt, steps in zip(prompts, continuations, strict=True):
        plain = _logprobs(model, prompt, steps)
        with _rounding_as_llama_cpp(model, quantize):
            rounded = _logprobs(model, prompt, steps)
        for row, rounded_row, step in zip(plain, rounded, steps, strict=True):
            for id, logprob in step.logprobs.items():
                if not logprob <= UNDERFLOW:  # nan is compared, and fails
                    differences.append(abs(logprob - row[id].item()))
                    roundings.append((rounded_row[id] - row[id]).abs().item())
            gaps.append((row.max() - row[step.token]).item())
    return np.array(differences), np.array(roundings), np.array(gaps)


@torch.inference_mode()
def _logprobs(model: AtlasLM, prompt: list[int], steps: Sequence[Step]) -> Tensor:
    """(steps, V): what PyTorch expects at each step of llama.cpp's continuation."""
    tokens = [*prompt, *(step.token for step in steps)][:-1] if steps else prompt
    hidden = model.hidden_states(torch.tensor([tokens]))[0]
    return F.log_softmax(model.head(hidden[len(prompt) - 1 :][: len(steps)]), dim=-1)


@contextmanager
def _rounding_as_llama_cpp(model: AtlasLM, quantize: Quantization) -> Iterator[None]:
    """GELU's input and output are f16; with f16 weights, so is all that is multiplied with them."""
    mlps = [module for module in model.modules() if isinstance(module, MLP)]
    hooks = [mlp.up.register_forward_hook(lambda *args: _as_in_gelu_table(args[-1])) for mlp in mlps]
    hooks += [mlp.down.register_forward_pre_hook(lambda _, args: _as_in_gelu_table(args[0])) for mlp in mlps]
    if quantize == "f16":
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        hooks += [module.register_forward_pre_hook(lambda _, args: _as_f16(args[0])) for module in linear]
        hooks.append(model.final_norm.register_forward_hook(lambda *args: _as_f16(args[-1])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _as_in_gelu_table(x: Tensor) -> Tensor:
    """llama.cpp's table serves -10 to 10; beyond, GELU is 0 or its input."""
    return torch.where(x.abs() < 10, _as_f16(x), x)


def _as_f16(x: Tensor) -> Tensor:
    return x.half().float()
