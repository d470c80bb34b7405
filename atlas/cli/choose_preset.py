"""The menu of presets: what each one needs on this machine, and which one to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.planning.machine import Machine
    from atlas.training.memory.presets import PresetPlan

VOCABULARY = 1024
"""Entries of the vocabulary that is learnt from the text, for the presets that leave theirs open."""
ON_A_CPU = "modern-nano"


def choose_preset(ask: Callable[[str], str] | None, *, vocab_size: int | None, device: str = "auto") -> str:
    """The name of the preset to train, or the path of a config file: the one that a person answers with, or the default
    where `ask` is None. `vocab_size` is that of a dataset, None for text that is still to be prepared.

    Raises `AtlasError` if no preset fits into memory.
    """
    from atlas.config.loader import resolve
    from atlas.planning.machine import this_machine
    from atlas.training.memory.presets import plan_presets

    machine = this_machine(resolve({"device": device}))
    plans = plan_presets(
        machine.memory, device=machine.device, vocab_size=vocab_size, open_vocab_size=VOCABULARY
    )
    default = _default(plans, machine)
    _print_menu(plans, machine, default)
    if ask is None:
        typer.echo(f"training {default}; choose another with --config", err=True)
        return default
    question = f"\nWhich one to train? Its number or name (Enter: {default}): "
    while True:
        answer = ask(question).strip() or default
        try:
            return _preset_of(answer, plans)
        except AtlasError as error:
            question = f"{error}\nNumber or name (Enter: {default}): "


def _default(plans: Sequence[PresetPlan], machine: Machine) -> str:
    """The largest preset that fits a GPU. A CPU has the memory for large models, but not the speed."""
    from atlas.training.memory.presets import largest_that_fits

    largest = largest_that_fits(plans)
    if largest is None:
        raise AtlasError(
            f"{machine.memory / 1e9:.1f} GB of memory: too little for any preset; close other programs"
        )
    return largest.name if machine.device == "cuda" else ON_A_CPU


def _print_menu(plans: Sequence[PresetPlan], machine: Machine, default: str) -> None:
    from atlas.planning.run import describe_duration, plan_run

    typer.echo(f"\n{machine.name}: {machine.memory / 1e9:.1f} GB of memory free\n", err=True)
    header = f"   {'preset':<12}{'parameters':>13}{'vocabulary':>12}{'context':>9}{'memory':>10}  training time here"
    typer.echo(header, err=True)
    for number, plan in enumerate(plans, start=1):
        run = plan_run(plan.config, machine, updates=plan.config.training.max_steps)
        duration = describe_duration(run.seconds) if run.seconds else "not known"
        model = plan.config.model
        note = "" if plan.fits else ", does not fit into memory"
        note += "  ← suggested" if plan.name == default else ""
        typer.echo(
            f"{number}  {plan.name:<12}{plan.parameters:>13,}{model.vocabulary:>12,}{model.max_seq_len:>9,}"
            f"{plan.memory / 1e9:>7.1f} GB  {duration}{note}",
            err=True,
        )
    if len({plan.config.model.vocabulary for plan in plans}) > 1:
        typer.echo(
            f"\nA vocabulary of {VOCABULARY:,} is learnt from your text; one of 50,257 is GPT-2's.", err=True
        )


def _preset_of(answer: str, plans: Sequence[PresetPlan]) -> str:
    """The preset, or the config file, that an answer means. Raises `AtlasError`."""
    from atlas.config.presets import find_config

    if answer.isdecimal():
        if not 1 <= int(answer) <= len(plans):
            raise AtlasError(f"{answer}: the presets are numbered 1 to {len(plans)}")
        return plans[int(answer) - 1].name
    find_config(answer)
    return answer


def print_next_commands(checkpoint: Path) -> None:
    """What to do with a trained model, as commands that work in this shell as they stand."""
    import shlex

    from atlas.cli.terminal import own_command

    atlas, named = own_command(), f"--checkpoint {shlex.quote(str(checkpoint))}"
    for purpose, command in (
        ("write text", f'{atlas} generate {named} --prompt "Once upon a time"'),
        ("open it in the browser", f"{atlas} serve {named}"),
        ("export it to llama.cpp", f"{atlas} export {named} --output atlas_model.gguf"),
        (
            "teach it to answer",
            f"{atlas} train --init-from {shlex.quote(str(checkpoint))} --train-data chats.jsonl --epochs 40 "
            "--batch-size 4 --output-dir checkpoints/chat",
        ),
    ):
        typer.echo(f"{purpose + ':':<24}{command}", err=True)
    typer.echo('(chats.jsonl: your own file, {"prompt": …, "response": …} on each line)', err=True)
