"""`atlas evaluate`: measure a checkpoint's loss on a text, or its scores in tasks of lm-eval."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atlas.cli import options
from atlas.cli.terminal import print_table, printable, say
from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.data.sequences.build import Windows
    from atlas.inference.load import LoadedModel
    from atlas.training.devices.device import Runtime

_MARKED, _AROUND = 8, 40
"""The number of marked tokens in a window, and the number of tokens shown before and after the worst token."""


def evaluate(
    data: Annotated[
        str | None,
        typer.Option(
            help="A text or JSONL file, or a prepared dataset. If the dataset has a validation split, Atlas "
            "evaluates only this split."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval, or YAML files or folders of your own tasks, separated by commas.",
            metavar="NAME[,NAME]",
        ),
    ] = None,
    checkpoint: options.Checkpoint = options.BEST_CHECKPOINT,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.", min=1)] = 8,
    device: options.Device = "auto",
    worst: Annotated[
        int, typer.Option(help="With --data: show the N windows with the highest loss.", min=0)
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(help="With --tasks: the number of examples per task.", min=1)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="With --tasks: the number of solved examples before each question.", min=0),
    ] = None,
    tokenizer: options.CustomTokenizer = None,
) -> None:
    """Measure loss, perplexity and bits per byte of a checkpoint on a text, or its scores in tasks of lm-eval.

    Use bits per byte to compare models with different tokenizers; loss and perplexity depend on the tokenizer.
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if (data is None) == (not names):
        raise AtlasError("give one of --data TEXT and --tasks NAME")
    if data is not None and (limit or num_fewshot is not None):
        raise AtlasError("--limit and --num-fewshot are for --tasks; omit both options")
    if names and worst:
        raise AtlasError(f"--worst {worst}: is for --data; omit --worst")
    from atlas.inference.load import load_model

    loaded = load_model(checkpoint, device=device, tokenizer=tokenizer)
    if data is not None:
        return _on_text(loaded, data, batch_size, device, worst)
    from atlas.inference.tasks import evaluate_tasks

    rows, track = [("task", "metric", "value", "±", "examples", "shots")], _bar("answering")
    for score in evaluate_tasks(loaded, names, limit, num_fewshot, batch_size=batch_size, track=track):
        error = "" if score.error is None else f"{score.error:.4f}"
        counts = f"{score.examples:,}", str(score.shots)
        rows.append((score.task, score.metric, f"{score.value:.4f}", error, *counts))
    print_table(rows, right=(2, 3, 4, 5))


def _bar(name: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """Return a function that iterates over a sequence and, on a terminal, draws a progress bar called `name`."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items: track(items, name, console=console, disable=not console.is_terminal)


def _on_text(loaded: LoadedModel, data: str, batch_size: int, device: str, worst: int) -> None:
    from atlas.config.loader import resolve
    from atlas.data import resolve_data, validation_windows
    from atlas.data.sequences.verify import DatasetVerifier
    from atlas.training.devices.device import setup_runtime
    from atlas.training.evaluate import evaluate as measure
    from atlas.training.loss import SummedLoss

    resolved = resolve_data(data, None, tokenizer=loaded.tokenizer, val_fraction=0.0)
    if resolved.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise AtlasError(
            f"{data}: was prepared with tokenizer {resolved.tokenizer.name}, but {loaded.path} needs the token ids of "
            f"{loaded.tokenizer.name}: set --data to the original text"
        )
    stream = resolved.val or resolved.train
    dataset = validation_windows(stream, resolve(loaded.facts["config"]))  # as in training
    runtime = setup_runtime(resolve({"device": device, "training": {"precision": "fp32"}}))
    verifier = DatasetVerifier(dataset.files)
    every, loss, track = range(len(dataset)), SummedLoss(loaded.model), _bar("evaluating")
    result = measure(loss, dataset, every, batch_size=batch_size, runtime=runtime, track=track)
    assert result is not None
    verifier.confirm(say, "result")
    part = "validation part" if resolved.val else "full text"
    typer.echo(
        f"{data} ({part}), {result.tokens:,} tokens\n"
        f"loss           {result.loss:.4f} nats per token\n"
        f"perplexity     {result.perplexity:,.2f}\n"
        f"bits per byte  {result.bits_per_byte:.4f}"
    )
    if worst:
        _show_worst(loaded, dataset, runtime, worst)


def _show_worst(loaded: LoadedModel, dataset: Windows, runtime: Runtime, count: int) -> None:
    """Print the `count` windows with the highest mean loss, each with the text around the token of highest loss. ⟦ and
    ⟧ mark the tokens with the highest losses in the window."""
    from atlas.training.evaluate import token_losses

    decode, windows = loaded.tokenizer.decode, _bar("searching")(range(len(dataset)))
    losses = {window: token_losses(loaded.model, dataset, window, runtime=runtime) for window in windows}
    ranked = sorted(losses, key=lambda window: -float(losses[window].nanmean()))
    for rank, window in enumerate(ranked[:count], start=1):
        mean, costs = float(losses[window].nanmean()), losses[window].nan_to_num()
        ids, worst = dataset[window][1].tolist(), int(costs.argmax())
        marked = set(costs.topk(min(_MARKED, len(costs))).indices.tolist())
        around = range(max(0, worst - _AROUND), min(len(ids), worst + _AROUND))
        places, shown = [place for place in around if ids[place] >= 0], ""
        for is_marked, run in itertools.groupby(places, marked.__contains__):
            text = decode([ids[place] for place in run])
            shown += f"⟦{text}⟧" if is_marked else text
        typer.echo(
            f"\n{rank}. window {window:,}: {mean:.3f} nats per token, {float(costs[worst]):.1f} for "
            f"{printable(decode([ids[worst]]))!r}\n   {printable(' '.join(shown.split()))}"
        )
