"""Measure how well a GGUF file in llama.cpp predicts a text, compared with the original model in PyTorch.

llama.cpp and PyTorch read the same windows, spread evenly over the text, and return the log-probability of every token
except the first token of each window. In each window, both programs read at most `context - 1` tokens, since
llama.cpp's server accepts no prompt that fills the context. Within a window, attention crosses document boundaries,
since llama.cpp has no setting like `data.document_mask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from atlas.data import IGNORE_INDEX, SequenceDataset, resolve_data
from atlas.data.sequences.conversations import Conversations
from atlas.data.sequences.verify import DatasetVerifier
from atlas.errors import ExportError
from atlas.export.llama_cpp import UNDERFLOW, ask_llama_cpp
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.evaluate import Evaluation, fixed_subset

NUM_TOKENS = 4000
"""The default number of tokens for an evaluation. With a small model, the evaluation takes seconds. The uncertainty of
the result is a few percent."""

LogProbs = NDArray[np.float64]
"""(tokens,): the log-probability of each predicted token of a sample, in order."""


@dataclass(frozen=True)
class Sample:
    """Windows of token ids from the text `name`. The model predicts all tokens of a window except the first."""

    name: str
    windows: Sequence[list[int]]
    bytes_per_token: float
    context: int

    @property
    def num_tokens(self) -> int:
        """The number of predicted tokens."""
        return sum(len(window) - 1 for window in self.windows)

    def bits_per_byte(self, logprobs: LogProbs) -> float:
        """The mean bits per byte of the sample, from the log-probability of each predicted token."""
        num_bytes = self.num_tokens * self.bytes_per_token
        return Evaluation(-float(logprobs.mean()), self.num_tokens, num_bytes).bits_per_byte


def sample_of(
    data: str | Path, tokenizer: Tokenizer, context: int, *, num_tokens: int = NUM_TOKENS
) -> Sample:
    """Return a sample of about `num_tokens` tokens from a prepared folder or from plain text. If the folder has a
    validation part, the sample comes from this part.

    Raises `AtlasError` if there is no text, if the data are conversations, or if the data were prepared with another
    tokenizer.
    """
    resolved = resolve_data(data, None, tokenizer=tokenizer, val_fraction=0.0)
    length, stream = max(1, context - 1), resolved.val or resolved.train
    if isinstance(stream, Conversations):
        raise ExportError(
            f"--data {data}: contains conversations; give plain text or a folder of prepared text"
        )
    dataset = SequenceDataset(stream, length, pad_last=True)
    windows = []
    for number in fixed_subset(len(dataset), max(1, num_tokens // length)):
        inputs, targets = dataset[number]
        windows.append([int(inputs[0]), *targets[targets != IGNORE_INDEX].tolist()])
    DatasetVerifier(dataset.files).confirm(lambda line: None)
    part = "validation part" if resolved.val else "full text"
    return Sample(f"{data} ({part})", windows, dataset.bytes_per_token, context)


@torch.inference_mode()
def pytorch_logprobs(model: AtlasLM, sample: Sample) -> LogProbs:
    """The log-probability of each predicted token of the sample under the model in PyTorch."""
    rows = []
    for window in sample.windows:
        tokens = torch.tensor(window)
        rows.append(-F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none"))
    logprobs: LogProbs = torch.cat(rows).clamp(min=UNDERFLOW).double().numpy()
    return logprobs


def llama_cpp_logprobs(path: str | Path, sample: Sample) -> LogProbs:
    """The log-probability of each predicted token of the sample under the GGUF file `path` in llama.cpp.

    Raises `ExportError` if llama.cpp cannot run the file.
    """
    answer = ask_llama_cpp(path, windows=sample.windows, context=sample.context)
    logprobs = [logprob for row in answer.logprobs for logprob in row]
    return np.maximum(np.array(logprobs, dtype=np.float64), UNDERFLOW)  # None becomes nan
