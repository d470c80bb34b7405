"""`atlas look`: how a model reads a text, token by token, and how it chooses what comes next."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atlas.cli.terminal import printable
from atlas.errors import AtlasError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from torch import Tensor

    from atlas.inference.look import Choice, Depth, NextToken, Place
    from atlas.inference.sampling import Sampling

_OFF = {"repetition_penalty": 1, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
"""What switches a setting off."""
_EIGHTHS, _SHADES = " ▏▎▍▌▋▊▉█", " ░▒▓█"
_BAR = 10
"""Characters of a bar that stands for certainty."""
_PATTERN = 48
"""Tokens of a text whose attention is drawn as well as told."""
_UNWRAPPED = 1000
"""Columns where there is no terminal, which would break lines."""


def look(
    prompt: Annotated[str, typer.Option(help="The text to look at; empty: the beginning of a document.")],
    checkpoint: Annotated[
        str, typer.Option(help="The checkpoint to look into.")
    ] = "checkpoints/atlas_best.pt",
    lens: Annotated[
        bool, typer.Option("--lens", help="Show what would be predicted after each layer (logit lens).")
    ] = False,
    position: Annotated[
        int | None,
        typer.Option(
            help="Of --lens: the token to look at, from 0, or from the end as -1; left out: the last."
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Show which tokens a head looks at: the layer's and the head's number, both from 0.",
            metavar="LAYER.HEAD",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="0: always the likeliest; higher: more random. The defaults are atlas generate's."),
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens that reach this mass; 1: all.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens less than this part as likely as the likeliest; 0: none.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what was there before.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="package.module:factory, for a model trained with a custom tokenizer.")
    ] = None,
) -> None:
    """Show what a model expects at each place of a text, and how the next token is chosen."""
    if position is not None and not lens:
        raise AtlasError(f"--position {position}: is the token of --lens; give both, or neither")
    head = None if attention is None else re.fullmatch(r"(\d+)\.(\d+)", attention)
    if attention is not None and head is None:
        raise AtlasError(f"--attention {attention}: must be a layer's and a head's number, such as 0.1")
    from atlas.inference import look as inside
    from atlas.inference.load import load_model
    from atlas.inference.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    loaded = load_model(checkpoint, device=device, tokenizer=tokenizer)
    ids = inside.encode(loaded, prompt)
    facts: dict[str, Any] = {
        "tokens": inside.expectations(loaded, ids),
        "sampling": sampling,
        "next_token": inside.next_token(loaded, ids, sampling),
    }
    if lens:
        place = len(ids) - 1 if position is None else position
        if not -len(ids) <= place < len(ids):
            raise AtlasError(f"--position {place}: the text has tokens 0 to {len(ids) - 1}")
        place %= len(ids)
        facts["lens"] = {"position": place, "depths": inside.lens(loaded, ids, position=place)}
    if head is not None:
        heads = loaded.model.config.num_heads
        layer, number, layers = int(head[1]), int(head[2]), loaded.model.config.num_layers
        if number >= heads or layer >= layers:
            raise AtlasError(
                f"--attention {attention}: the model has layers 0 to {layers - 1}, each with heads 0 to {heads - 1}"
            )
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

    console = Console(highlight=False, markup=False, emoji=False)  # tokens may look like either
    if not console.is_terminal:
        console.width = _UNWRAPPED
    places: list[Place] = facts["tokens"]
    _print_places(console, places)
    _print_next_token(console, facts["next_token"], facts["sampling"])
    if "lens" in facts:
        _print_lens(console, places, **facts["lens"])
    if "attention" in facts:
        _print_attention(console, places, **facts["attention"])


def _print_places(console: Console, places: Sequence[Place]) -> None:
    from atlas.training.logs.run_log import perplexity

    table = _table("place", ">", "token", "<", "probability", "<", "", ">", "rank", ">", "entropy", ">")
    table.add_column("likeliest")
    for number, place in enumerate(places):
        if place.probability is None:
            table.add_row(str(number), _token(place.text), "", "", "", "", "(nothing comes before)")
            continue
        table.add_row(
            str(number),
            _token(place.text),
            _bar(place.probability),
            _percent(place.probability),
            f"{place.rank:,}",
            f"{place.entropy:.1f}",
            _choices(place.alternatives),
        )
    console.print(table)
    known = [place.log_probability for place in places if place.log_probability is not None]
    if known:
        loss = -sum(known) / len(known)
        console.print(
            f"loss of this text {loss:.4f} nats per token, perplexity {perplexity(loss):,.2f}; "
            "entropy is in bits"
        )


def _print_next_token(console: Console, next_token: NextToken, sampling: Sampling) -> None:
    """A column for each setting that is on."""
    on = [name for name, off in _OFF.items() if getattr(sampling, name) != off]
    steps = ["model", *on]
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(sampling, name):g}" for name in on)
    console.print(f"\nthe next token, {f'with {flags}' if on else 'as the model has it'}")
    table = _table("token", "<")
    for step in steps:
        table.add_column(step.removeprefix("repetition_").replace("_", "-"), justify="right")
    table.add_column("chance")
    for candidate in next_token.candidates:
        cells = []
        for step in steps:
            is_out = candidate.removed_by in steps[: steps.index(step) + 1]
            cells.append("–" if is_out else _percent(candidate.probabilities[step]))
        table.add_row(_token(candidate.text), *cells, _bar(candidate.probabilities[steps[-1]]))
    table.add_section()
    table.add_row("tokens left", *(f"{next_token.remaining[step]:,}" for step in steps))
    table.add_row("entropy", *(f"{next_token.entropy[step]:.1f}" for step in steps))
    console.print(table)


def _print_lens(console: Console, places: Sequence[Place], *, position: int, depths: Sequence[Depth]) -> None:
    follows = places[position + 1].text if position + 1 < len(places) else None
    console.print(f"\nafter each layer, what follows place {position}, {_token(places[position].text)}")
    table = _table("after", "<", "entropy", ">", "likeliest", "<")
    if follows is not None:
        table.add_column(f"really: {_token(follows)}", justify="right")
        table.add_column("rank", justify="right")
    for depth in depths:
        after = "embedding" if depth.layer is None else f"layer {depth.layer}"
        cells = [after, f"{depth.entropy:.1f}", _choices(depth.likeliest)]
        if depth.probability is not None:
            cells += [_percent(depth.probability), f"{depth.rank:,}"]
        table.add_row(*cells)
    console.print(table)


def _print_attention(
    console: Console, places: Sequence[Place], *, layer: int, head: int, weights: Tensor
) -> None:
    """The tokens that each looks at most and, where they fit, a shade for each: the first on the left."""
    is_drawn = len(places) <= _PATTERN
    console.print(f"\nlayer {layer}, head {head}: where each token looks")
    table = _table("place", ">", "token", "<", *(("pattern", "<") if is_drawn else ()), "looks at", "<")
    for number, (place, row) in enumerate(zip(places, weights, strict=True)):
        best = row[: number + 1].topk(min(3, number + 1))
        seen = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        pattern = "".join(
            _SHADES[round(weight * (len(_SHADES) - 1))] for weight in row[: number + 1].tolist()
        )
        told = (f"{other} {_token(places[other].text)}:{_percent(weight)}" for other, weight in seen)
        table.add_row(str(number), _token(place.text), *([pattern] if is_drawn else []), "  ".join(told))
    console.print(table)


def _table(*columns: str) -> Table:
    """Of names and the side to which each column goes, `<` or `>`, by turns."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in zip(columns[::2], columns[1::2], strict=True):
        table.add_column(name, justify="right" if side == ">" else "left", no_wrap=name != "likeliest")
    return table


def _token(text: str) -> str:
    """Blanks as dots, what cannot be seen as escapes."""
    return printable(text).replace(" ", "·")


def _choices(choices: Iterable[Choice]) -> str:
    """Without blanks inside, at which a narrow terminal would break them."""
    return "  ".join(f"{_token(choice.text)}:{_percent(choice.probability)}" for choice in choices)


def _percent(part: float) -> str:
    return f"{100 * part:.1f}%" if part >= 0.0005 else "<0.1%"


def _bar(part: float) -> Text:
    """`part` of ten characters, to an eighth of one."""
    from rich.text import Text

    eighths = round(8 * _BAR * part)
    bar = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    colour = "green" if part >= 0.5 else "yellow" if part >= 0.1 else "red"
    return Text(bar, style=colour)
