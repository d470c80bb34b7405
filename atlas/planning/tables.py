"""The tables of docs/TRAINING.md, docs/FAQ.md and docs/SCALING.md that say what presets take:
`python -m atlas.planning.tables`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from atlas.config.loader import read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.model.cost import count_parameters
from atlas.planning.cards import Card, find_card
from atlas.planning.communication import cluster_of
from atlas.planning.machine import machine_with
from atlas.planning.run import describe_duration, plan_run
from atlas.planning.scaling import scale
from atlas.planning.summary import summarize
from atlas.training.memory.estimate import estimate_training_memory
from atlas.training.memory.presets import ASSUMED_VOCABULARY, PresetPlan, largest_that_fits, plan_presets

DOCS = Path(__file__).parents[2] / "docs"

_MADE_BY = "made by python -m atlas.planning.tables"
_SHOWN = ("RTX 3060", "RTX 5060 Ti 16GB", "RTX 4090")
_BY_MEMORY = (
    "GTX 1060",
    "RTX 4060",
    "RTX 3080",
    "RTX 3060",
    "RTX 5060 Ti 16GB",
    "RTX 4090",
    "RTX 5090",
    "A100 80GB",
)
_SCALED = ("small", "default", "large")
_SCALED_ON = "H100"
_GPUS_OF_A_NODE = 8
_NODES = (1, 8, 64)
_AT_ONCE, _MICRO_BATCHES = 8, 4
"""Sequences of a GPU: in a micro-batch, and how often in an update."""
_SIMPLE_WIKIPEDIA = 31_000_000  # tokens of GPT-2's vocabulary


def presets_table() -> str:
    """Each preset with its own number of updates, on a few cards."""
    cards = [find_card(name) for name in _SHOWN]
    header = ("preset", "parameters", "training memory, estimated", "tokens", "FLOPs", *map(_title, cards))
    rows = []
    for name, preset in _presets().items():
        updates = preset.config.training.max_steps
        whole = plan_run(preset.config, machine_with(cards[0]), updates=updates)
        memory = estimate_training_memory(preset.config, device="cuda").total
        rows.append(
            (
                f"`{name}`",
                _parameters(name, preset),
                f"{memory / 2**30:.2f} GiB",
                f"{(whole.tokens or 0) / 1e6:,.1f} M",
                f"{whole.flops or 0:.1e}",
                *(_time(preset, card, updates) for card in cards),
            )
        )
    return _markdown(header, rows)


def pass_table() -> str:
    """One pass over Simple Wikipedia; those that take a vocabulary of their own are left out."""
    cards = [find_card(name) for name in _SHOWN]
    rows = []
    for name, preset in _presets().items():
        training, length = preset.config.training, preset.config.model.max_seq_len
        updates = _SIMPLE_WIKIPEDIA // (training.sequences_per_update * length)
        if not name.endswith("nano"):
            rows.append((f"`{name}`", f"{updates:,}", *(_time(preset, card, updates) for card in cards)))
    return _markdown(("preset", "updates", *map(_title, cards)), rows)


def cards_table() -> str:
    """What fits on a card, and for how long it is busy with that."""
    rows = []
    for card in map(find_card, _BY_MEMORY):
        machine = machine_with(card)
        preset = largest_that_fits(plan_presets(card.memory, device=machine.device))
        assert preset is not None
        summary = summarize(preset.config, machine, updates=preset.config.training.max_steps)
        rows.append(
            (
                card.name,
                f"{card.gibibytes} GB",
                f"`{preset.name}`",
                str(summary.largest_micro_batch),
                _time(preset, card, summary.run.updates),
            )
        )
    header = (
        "card",
        "memory",
        "largest preset that fits",
        "sequences at once, at most",
        "time",
    )
    return _markdown(header, rows)


def scaling_table() -> str:
    """Presets on 8 GPUs and more; an update grows with their number."""
    machine = machine_with(find_card(_SCALED_ON))
    header = (
        "preset",
        "GPUs",
        "sequences an update",
        "parallel",
        "memory of a GPU",
        "computing",
        "exposed",
        "efficiency",
        "tokens/s",
    )
    rows = []
    for name in _SCALED:
        config = _presets()[name].config
        for nodes in _NODES:
            link = "nvlink4" if nodes == 1 else "nvlink4,infiniband-400"
            cluster = cluster_of(_GPUS_OF_A_NODE, nodes, link)
            size = {
                "batch_size": _AT_ONCE,
                "gradient_accumulation_steps": _MICRO_BATCHES * cluster.ranks,
            }
            training = config.training.model_copy(update=size)
            scaling = scale(config.model_copy(update={"training": training}), machine, cluster)
            rows.append(
                (
                    f"`{name}`",
                    f"{cluster.ranks}",
                    f"{training.sequences_per_update:,}",
                    scaling.parallel,
                    f"{scaling.memory.total / 2**30:.1f} GiB",
                    f"{scaling.computing * 1e3:,.0f} ms",
                    f"{scaling.communication.exposed * 1e3:,.1f} ms",
                    f"{scaling.efficiency:.1%}",
                    f"{scaling.tokens_per_second / 1e6:,.2f} M",
                )
            )
    return _markdown(header, rows)


TABLES = {
    "presets_table": ("TRAINING.md", presets_table),
    "pass_table": ("FAQ.md", pass_table),
    "cards_table": ("FAQ.md", cards_table),
    "scaling_table": ("SCALING.md", scaling_table),
}


def with_tables(name: str, page: str) -> str:
    """The text of the page called `name` with its tables made anew, each between its marks."""
    for table, (home, make) in TABLES.items():
        if home == name:
            before, begin, rest = page.partition(f"<!-- {table}: {_MADE_BY} -->\n")
            _, end, after = rest.partition("\n<!-- end -->\n")
            assert end, f"{name} has no place for {table}"
            page = before + begin + "\n" + make() + end + after
    return page


def _presets() -> dict[str, PresetPlan]:
    plans = plan_presets(0, device="cuda")
    return dict(zip(preset_names(), plans, strict=True))


def _parameters(name: str, preset: PresetPlan) -> str:
    """The size, and with what vocabulary where the preset leaves it to the data."""
    size = f"{count_parameters(preset.config.model).total / 1e6:.1f} M"
    stated = resolve(read_yaml(preset_path(name))).model.vocab_size
    return size if stated else f"{size} with a vocabulary of {ASSUMED_VOCABULARY:,}"


def _title(card: Card) -> str:
    return f"{card.name}, {card.gibibytes} GB"


def _time(preset: PresetPlan, card: Card, updates: int | None) -> str:
    if preset.memory > card.memory:
        return "does not fit"
    seconds = plan_run(preset.config, machine_with(card), updates=updates).seconds
    assert seconds is not None
    return describe_duration(seconds)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in (header, *rows))
    return "".join([first, "|---" * len(header), "|\n", *others])


def main() -> None:
    """Write the tables into their pages."""
    for name in {home for home, _ in TABLES.values()}:
        page = DOCS / name
        made = with_tables(name, page.read_text(encoding="utf-8"))
        page.write_text(made, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
