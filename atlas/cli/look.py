"""`atlas look`: show a model's prediction for each token of a text, and the choice of the next token."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from atlas.cli import options
from atlas.cli.terminal import printable
from atlas.errors import AtlasError

if TYPE_CHECKING:
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from atlas.inference.look import Choice, LayerPrediction, NextToken, TextLoss, TokenPrediction
    from atlas.inference.sampling import Sampling

_OFF = {"repetition_penalty": 1, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
"""Sampling setting → the value at which the setting has no effect."""
_SHADES = " ░▒▓█"
_BAR = 10
"""Width of a probability bar in characters."""
_PATTERN = 48
"""The largest number of tokens in a text whose attention pattern is drawn."""
_UNWRAPPED = 1000
"""The width of the output in columns if there is no terminal. No line is wrapped at this width."""


def look(
    prompt: Annotated[
        str, typer.Option(help="The text to look at. An empty text means the beginning of a document.")
    ],
    checkpoint: options.Checkpoint = options.BEST_CHECKPOINT,
    lens: Annotated[
        bool, typer.Option("--lens", help="Show the prediction after each layer (logit lens).")
    ] = False,
    position: Annotated[
        int | None,
        typer.Option(
            help="Position of the token for --lens: 0 is the first token, -1 the last. Default: -1."
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Show which tokens a head attends to; layers and heads are counted from 0.",
            metavar="LAYER.HEAD",
        ),
    ] = None,
    temperature: options.Temperature = 0.8,
    top_k: options.TopK = 50,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    device: options.Device = "auto",
    tokenizer: options.CustomTokenizer = None,
) -> None:
    """Show a model's prediction at each position of a text, and how Atlas chooses the next token."""
    if position is not None and not lens:
        raise AtlasError(f"--position {position}: is the token for --lens; give both options, or neither")
    head = None if attention is None else re.fullmatch(r"(\d+)\.(\d+)", attention)
    if attention is not None and head is None:
        raise AtlasError(f"--attention {attention}: must be a layer's and a head's number, such as 0.1")
    from atlas.inference import look as inside
    from atlas.inference.load import load_model
    from atlas.inference.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    loaded = load_model(checkpoint, device=device, tokenizer=tokenizer)
    ids = inside.encode(loaded, prompt)
    tokens = inside.expectations(loaded, ids)
    facts: dict[str, Any] = {
        "tokens": tokens,
        "loss": inside.loss_of(loaded, tokens),
        "sampling": sampling,
        "next_token": inside.next_token(loaded, ids, sampling),
    }
    if lens:
        position = -1 if position is None else position
        depths = inside.lens(loaded, ids, position=position)
        facts["lens"] = {"position": position % len(ids), "depths": depths}
    if head is not None:
        heads = loaded.model.config.num_heads
        layer, number, layers = int(head[1]), int(head[2]), loaded.model.config.num_layers
        if number >= heads or layer >= layers:
            shape = f"layers 0 to {layers - 1}, each with heads 0 to {heads - 1}"
            raise AtlasError(f"--attention {attention}: the model has {shape}")
        weights = inside.attention(loaded, ids, layers=[layer])[0, number]
        facts["attention"] = {"layer": layer, "head": number, "weights": weights}
    if as_json:
        typer.echo(json.dumps(facts, default=_plain, ensure_ascii=False, indent=2))
    else:
        _print(facts)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value.tolist()  # type: ignore[arg-type]


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)  # a token may look like markup
    if not console.is_terminal:
        console.width = _UNWRAPPED
    tokens: list[TokenPrediction] = facts["tokens"]
    _print_tokens(console, tokens, facts["loss"])
    _print_next_token(console, facts["next_token"], facts["sampling"])
    if "lens" in facts:
        _print_lens(console, tokens, **facts["lens"])
    if "attention" in facts:
        _print_attention(console, tokens, **facts["attention"])


def _print_tokens(console: Console, tokens: Sequence[TokenPrediction], loss: TextLoss | None) -> None:
    table = _table("position>", "token", "probability", ">", "rank>", "entropy>", "likeliest")
    table.add_row("0", _token(tokens[0].text), "", "", "", "", "(the first token)")
    for number, each in enumerate(tokens[1:], start=1):
        probability = each.probability or 0.0
        cells = _percent(probability), f"{each.rank:,}", f"{each.entropy:.1f}", _choices(each.alternatives)
        table.add_row(str(number), _token(each.text), _bar(probability), *cells)
    console.print(table)
    if loss is not None:
        console.print(
            f"loss of this text {loss.loss:.4f} nats per token, perplexity {loss.perplexity:,.2f}, "
            f"{loss.bits_per_byte:.4f} bits per byte; entropy is in bits"
        )


def _print_next_token(console: Console, next_token: NextToken, sampling: Sampling) -> None:
    """Print the candidates for the next token, with their probability after each sampling setting that has an
    effect."""
    on = [name for name, off in _OFF.items() if getattr(sampling, name) != off]
    steps = ["model", *on]
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(sampling, name):g}" for name in on)
    console.print(f"\nthe next token, {f'with {flags}' if on else 'without sampling settings'}")
    names = [step.removeprefix("repetition_").replace("_", "-") for step in steps]
    table = _table("token", *(f"{name}>" for name in names), "probability")
    for candidate in next_token.candidates:
        cells = [
            "–" if candidate.removed_by in steps[: number + 1] else _percent(candidate.probabilities[step])
            for number, step in enumerate(steps)
        ]
        table.add_row(_token(candidate.text), *cells, _bar(candidate.probabilities[steps[-1]]))
    table.add_section()
    table.add_row("tokens left", *(f"{next_token.remaining[step]:,}" for step in steps))
    table.add_row("entropy", *(f"{next_token.entropy[step]:.1f}" for step in steps))
    console.print(table)


def _print_lens(
    console: Console, tokens: Sequence[TokenPrediction], *, position: int, depths: Sequence[LayerPrediction]
) -> None:
    token = _token(tokens[position].text)
    console.print(f"\nthe prediction after each layer, at position {position}, {token}")
    is_last = position + 1 == len(tokens)
    actual = [] if is_last else [f"actual: {_token(tokens[position + 1].text)}>", "rank>"]
    table = _table("after", "entropy>", "likeliest", *actual)
    for depth in depths:
        after = "embedding" if depth.layer is None else f"layer {depth.layer}"
        cells = [after, f"{depth.entropy:.1f}", _choices(depth.likeliest)]
        if depth.probability is not None:
            cells += [_percent(depth.probability), f"{depth.rank:,}"]
        table.add_row(*cells)
    console.print(table)


def _print_attention(
    console: Console, tokens: Sequence[TokenPrediction], *, layer: int, head: int, weights: Tensor
) -> None:
    """Print, for each token, the tokens with the largest attention weights. For a short text, also draw the weights as
    shades."""
    is_drawn = len(tokens) <= _PATTERN
    console.print(f"\nlayer {layer}, head {head}: which tokens each token attends to")
    table = _table("position>", "token", *(["pattern"] if is_drawn else []), "attends to")
    for number, (each, row) in enumerate(zip(tokens, weights, strict=True)):
        row = row[: number + 1]
        best = row.topk(min(3, number + 1))
        pattern = "".join(_SHADES[round(weight * (len(_SHADES) - 1))] for weight in row.tolist())
        attended = (
            f"{other} {_token(tokens[other].text)}:{_percent(weight)}"
            for other, weight in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        table.add_row(str(number), _token(each.text), *([pattern] if is_drawn else []), "  ".join(attended))
    console.print(table)


def _table(*columns: str) -> Table:
    """Return a table with these column names. A `>` at the end of a name aligns the column to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        justify: Literal["left", "right"] = "right" if name.endswith(">") else "left"
        table.add_column(name.removesuffix(">"), justify=justify, no_wrap=name != "likeliest")
    return table


def _token(text: str) -> str:
    """Return the text of a token with dots for spaces and escapes for invisible characters."""
    return printable(text).replace(" ", "·")


def _choices(choices: Iterable[Choice]) -> str:
    """Return the choices as one line. No choice contains a space, so that a narrow terminal breaks the line only
    between choices."""
    return "  ".join(f"{_token(choice.text)}:{_percent(choice.probability)}" for choice in choices)


def _percent(part: float) -> str:
    return f"{100 * part:.1f}%" if part >= 0.0005 else "<0.1%"


def _bar(part: float) -> Bar:
    """Return a bar that fills the fraction `part` of `_BAR` characters, to an eighth of a character."""
    from rich.bar import Bar

    color = "green" if part >= 0.5 else "yellow" if part >= 0.1 else "red"
    return Bar(1, 0, part, width=_BAR, color=color)
