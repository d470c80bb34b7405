"""The tables of presets in docs/TRAINING.md, docs/FAQ.md and docs/SCALING.md: memory and time of training.

`python -m atlas.planning.tables` rebuilds the tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from atlas.planning.cards import Card, find_card
from atlas.planning.communication import cluster_of
from atlas.planning.machine import machine_with
from atlas.planning.run import describe_duration, plan_run
from atlas.planning.scaling import scale
from atlas.training.memory.fit import largest_micro_batch
from atlas.training.memory.presets import ASSUMED_VOCABULARY, PresetPlan, largest_that_fits, plan_presets

DOCS = Path(__file__).parents[2] / "docs"

_MADE_BY = "made by python -m atlas.planning.tables"
_SHOWN = ("RTX 3060", "RTX 5060 Ti 16GB", "RTX 4090")
_BY_MEMORY = ("GTX 1060", "RTX 4060", "RTX 3080", *_SHOWN, "RTX 5090", "A100 80GB")
_SCALED, _SCALED_ON = ("small", "default", "large"), "H100"
_GPUS_OF_A_NODE, _NODES = 8, (1, 8, 64)
_PER_MICRO_BATCH, _MICRO_BATCHES = 8, 4
"""Sequences per micro-batch, and micro-batches per update, of each GPU."""
_SIMPLE_WIKIPEDIA = 31_000_000  # tokens of GPT-2's vocabulary


def presets_table() -> str:
    """Return a table of all presets on a few cards, each with the preset's own number of updates."""
    cards = [find_card(name) for name in _SHOWN]
    rows = []
    for preset in plan_presets(0, device="cuda"):
        updates = preset.config.training.max_steps
        run = plan_run(preset.config, machine_with(cards[0]), updates=updates)
        rows.append(
            f"`{preset.name}` | {_parameters(preset)} | {preset.memory / 2**30:.2f} GiB "
            f"| {(run.tokens or 0) / 1e6:,.1f} M | {run.flops or 0:.1e} | {_times(preset, cards, updates)}"
        )
    titles = f"preset | parameters | training memory, estimated | tokens | FLOPs | {_titles(cards)}"
    return _markdown(titles, rows)


def pass_table() -> str:
    """Return a table of the time of one pass over Simple Wikipedia. The nano presets are left out, because they do not
    use GPT-2's vocabulary."""
    cards, rows = [find_card(name) for name in _SHOWN], []
    for preset in plan_presets(0, device="cuda"):
        training, length = preset.config.training, preset.config.model.max_seq_len
        updates = _SIMPLE_WIKIPEDIA // (training.sequences_per_update * length)
        if not preset.name.endswith("nano"):
            rows.append(f"`{preset.name}` | {updates:,} | {_times(preset, cards, updates)}")
    return _markdown(f"preset | updates | {_titles(cards)}", rows)


def cards_table() -> str:
    """Return a table of the largest preset that fits each card, with its training time."""
    rows = []
    for card in map(find_card, _BY_MEMORY):
        preset = largest_that_fits(plan_presets(card.memory, device="cuda"))
        assert preset is not None
        most = largest_micro_batch(preset.config, card.memory, device="cuda")
        times = _times(preset, [card], preset.config.training.max_steps)
        rows.append(f"{card.name} | {card.gibibytes} GB | `{preset.name}` | {most} | {times}")
    return _markdown(
        "card | memory | largest preset that fits | sequences per micro-batch, at most | time", rows
    )


def scaling_table() -> str:
    """Return a table of presets on 8 and more GPUs. The number of sequences per update grows with the number of
    GPUs."""
    machine, rows = machine_with(find_card(_SCALED_ON)), []
    for preset in plan_presets(0, device="cuda"):
        for nodes in _NODES if preset.name in _SCALED else ():
            link = "nvlink4" if nodes == 1 else "nvlink4,infiniband-400"
            cluster = cluster_of(_GPUS_OF_A_NODE, nodes, link)
            micro_batches = _MICRO_BATCHES * cluster.ranks
            size = {"batch_size": _PER_MICRO_BATCH, "gradient_accumulation_steps": micro_batches}
            config = preset.config.replace("training", **size)
            scaling = scale(config, machine, cluster)
            rows.append(
                f"`{preset.name}` | {cluster.ranks} | {config.training.sequences_per_update:,} | {scaling.parallel} "
                f"| {scaling.memory.total / 2**30:.1f} GiB | {scaling.computing * 1e3:,.0f} ms "
                f"| {scaling.communication.exposed * 1e3:,.1f} ms | {scaling.efficiency:.1%} "
                f"| {scaling.tokens_per_second / 1e6:,.2f} M"
            )
    titles = "preset | GPUs | sequences an update | parallel | memory of a GPU | computing | exposed"
    return _markdown(f"{titles} | efficiency | tokens/s", rows)


PAGES = {
    "TRAINING.md": (presets_table,),
    "FAQ.md": (pass_table, cards_table),
    "SCALING.md": (scaling_table,),
}


def with_tables(name: str, page: str) -> str:
    """Return the text of the page called `name` with rebuilt tables, each between its two HTML comments."""
    for table in PAGES[name]:
        before, begin, rest = page.partition(f"<!-- {table.__name__}: {_MADE_BY} -->\n")
        _, end, after = rest.partition("\n<!-- end -->\n")
        assert end, f"{name} has no place for {table.__name__}"
        page = before + begin + "\n" + table() + end + after
    return page


def _parameters(preset: PresetPlan) -> str:
    """Return the number of parameters, and the assumed vocabulary if the preset leaves the vocabulary to the data."""
    size = f"{preset.parameters / 1e6:.1f} M"
    is_assumed = preset.config.model.vocab_size == ASSUMED_VOCABULARY
    return f"{size} with a vocabulary of {ASSUMED_VOCABULARY:,}" if is_assumed else size


def _titles(cards: Iterable[Card]) -> str:
    return " | ".join(f"{card.name}, {card.gibibytes} GB" for card in cards)


def _times(preset: PresetPlan, cards: Iterable[Card], updates: int | None) -> str:
    return " | ".join(_time(preset, card, updates) for card in cards)


def _time(preset: PresetPlan, card: Card, updates: int | None) -> str:
    if preset.memory > card.memory:
        return "does not fit"
    seconds = plan_run(preset.config, machine_with(card), updates=updates).seconds
    assert seconds is not None
    return describe_duration(seconds)


def _markdown(titles: str, rows: Iterable[str]) -> str:
    rule = "|---" * (titles.count("|") + 1)
    return "\n".join([f"| {titles} |", f"{rule}|", *(f"| {row} |" for row in rows), ""])


def main() -> None:
    """Rebuild the tables in the pages of docs/."""
    for name in PAGES:
        page = DOCS / name
        page.write_text(with_tables(name, page.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
