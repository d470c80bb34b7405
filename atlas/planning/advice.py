"""Compare the size of a model with the size of its training text.

For a given amount of computation, a model of P parameters is best trained on about 20 · P tokens (Hoffmann et al. 2022,
arXiv:2203.15556). If the text has fewer tokens, the run reads the text several times. Up to about 4 passes, repeated
text is almost as good as new text. Each further pass helps less, and passes beyond about 40 do not help (Muennighoff et
al. 2023, arXiv:2305.16264).
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas.config import ModelConfig
from atlas.config.loader import read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.model.cost import count_parameters

TOKENS_PER_PARAMETER = 20
GOOD_PASSES = 4
MOST_PASSES = 40


@dataclass(frozen=True)
class Advice:
    """A preset's size compared with the length of a text."""

    preset: str
    parameters: int
    max_seq_len: int
    tokens_per_parameter: float
    """The number of tokens per parameter, in one pass over the text."""
    passes: float
    """The number of passes over the text that gives `TOKENS_PER_PARAMETER` tokens per parameter."""

    @property
    def fits(self) -> bool:
        """Whether the text is large enough for the model."""
        return self.passes <= GOOD_PASSES

    @property
    def verdict(self) -> str:
        """A short verdict on the number of passes, as text."""
        if self.passes <= 1:
            return "fits: one pass is enough"
        if self.fits:
            return "fits: a few passes are almost as good as new text"
        if self.passes <= MOST_PASSES:
            return f"large: beyond about {GOOD_PASSES} passes, repeated text gives less and less"
        return "larger than this text can teach"


def advise(num_tokens: int, *, vocab_size: int) -> list[Advice]:
    """Compare every preset, smallest first, with a text of `num_tokens` tokens. Every model gets the vocabulary size
    `vocab_size`."""
    models = {name: resolve(read_yaml(preset_path(name))).model for name in preset_names()}
    return [
        advise_on(model.model_copy(update={"vocab_size": vocab_size}), num_tokens, name=name)
        for name, model in models.items()
    ]


def advise_on(model: ModelConfig, num_tokens: int, *, name: str) -> Advice:
    """Compare one model with a text of `num_tokens` tokens."""
    parameters = count_parameters(model).total
    passes = TOKENS_PER_PARAMETER * parameters / num_tokens
    return Advice(name, parameters, model.max_seq_len, num_tokens / parameters, passes)
