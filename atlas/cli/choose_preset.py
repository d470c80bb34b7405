"""The menu of presets: the memory and time of each preset on this machine, and the user's choice."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from atlas.cli.terminal import own_command, print_table, say
from atlas.config.loader import resolve
from atlas.config.presets import find_config
from atlas.errors import AtlasError
from atlas.planning.machine import Machine, this_machine
from atlas.planning.run import describe_duration, plan_run
from atlas.training.memory.presets import PresetPlan, largest_that_fits, plan_presets

VOCABULARY = 1024
"""Vocabulary size of the tokenizer that Atlas trains on the text, for presets that do not set `model.vocab_size`."""
ON_A_CPU = "modern-nano"


def choose_preset(ask: Callable[[str], str] | None, *, vocab_size: int | None, device: str) -> str:
    """Return the name of the preset to train, or the path of a config file.

    The choice is the user's answer, or the default preset if `ask` is None. `vocab_size` is the vocabulary size of the
    dataset, or None for text that is not prepared yet.

    Raises `AtlasError` if no preset fits into memory.
    """
    machine = this_machine(resolve({"device": device}))
    plans = plan_presets(
        machine.memory, device=machine.device, vocab_size=vocab_size, open_vocab_size=VOCABULARY
    )
    largest = largest_that_fits(plans)
    if largest is None:
        raise AtlasError(
            f"{machine.memory / 1e9:.1f} GB of memory: too little for any preset; close other programs"
        )
    # Without CUDA, a large model may fit into memory, but its training would take too long.
    default = largest.name if machine.device == "cuda" else ON_A_CPU
    _print_menu(plans, machine, default)
    if ask is None:
        say(f"training {default}; choose another preset with --config")
        return default
    question = f"\nWhich preset to train? Number or name (Enter: {default}): "
    while True:
        answer = ask(question).strip() or default
        try:
            return _preset_of(answer, plans)
        except AtlasError as error:
            question = f"{error}\nNumber or name (Enter: {default}): "


def _print_menu(plans: Sequence[PresetPlan], machine: Machine, default: str) -> None:
    say(f"\n{machine.name}: {machine.memory / 1e9:.1f} GB of memory free\n")
    rows = [("", "preset", "parameters", "vocabulary", "context", "memory", "training time here")]
    for number, plan in enumerate(plans, start=1):
        model, updates = plan.config.model, plan.config.training.max_steps
        seconds = plan_run(plan.config, machine, updates=updates).seconds
        duration = describe_duration(seconds) if seconds else "not known"
        note = "" if plan.fits else ", does not fit into memory"
        note += "  ← suggested" if plan.name == default else ""
        size = f"{plan.parameters:,}", f"{model.vocabulary:,}", f"{model.max_seq_len:,}"
        rows.append((str(number), plan.name, *size, f"{plan.memory / 1e9:.1f} GB", duration + note))
    print_table(rows, right={2, 3, 4, 5}, err=True)
    if len({plan.config.model.vocabulary for plan in plans}) > 1:
        say(
            f"\nAtlas trains a vocabulary of {VOCABULARY:,} tokens on your text; GPT-2's vocabulary has 50,257."
        )


def _preset_of(answer: str, plans: Sequence[PresetPlan]) -> str:
    """Return the preset or the config file that the user's answer names. Raises `AtlasError` if the answer names
    neither."""
    if answer.isdecimal():
        if not 1 <= int(answer) <= len(plans):
            raise AtlasError(f"{answer}: the presets are numbered 1 to {len(plans)}")
        return plans[int(answer) - 1].name
    find_config(answer)
    return answer


def print_next_commands(checkpoint: Path) -> None:
    """Print commands for the next steps with a trained model. Each command works in this shell as printed."""
    atlas, named = own_command(), f"--checkpoint {shlex.quote(str(checkpoint))}"
    for purpose, command in (
        ("generate text", f'{atlas} generate {named} --prompt "Once upon a time"'),
        ("start a server", f"{atlas} serve {named}"),
        ("export to llama.cpp", f"{atlas} export {named} --output atlas_model.gguf"),
        (
            "fine-tune to answer",
            f"{atlas} train --init-from {shlex.quote(str(checkpoint))} --train-data chats.jsonl --epochs 40 "
            "--batch-size 4 --output-dir checkpoints/chat",
        ),
    ):
        say(f"{purpose + ':':<24}{command}")
    say('(chats.jsonl: your own file, {"prompt": …, "response": …} on each line)')
