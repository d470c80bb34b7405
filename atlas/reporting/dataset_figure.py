"""A chart of the lengths of a dataset's documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from atlas.reporting.dataset_statistics import Lengths
from atlas.reporting.targets import save_png

_COLORS = {"train": "tab:blue", "val": "tab:orange"}


def draw_lengths(
    path: Path, lengths: Mapping[str, Lengths], *, title: str, contexts: Mapping[int, str]
) -> None:
    """Write a histogram of the document lengths of each split, as a PNG of 1500 × 825 pixels.

    Heights are fractions of a split's documents, so that splits of different sizes can be compared. `contexts` maps
    each context length to mark, in tokens, to its label.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shortest = min(int(split.values[0]) for split in lengths.values())
    longest = max(split.longest for split in lengths.values())
    bins = np.unique(np.geomspace(shortest, longest + 1, 36).round()).tolist()
    for name, split in lengths.items():
        shares, color = split.counts / split.documents, _COLORS[name]
        if name == "train":
            axes.hist(split.values, bins, weights=shares, color=color, alpha=0.35)
        axes.hist(split.values, bins, weights=shares, color=color, histtype="step", linewidth=1.5)
        facts = f"median {split.median:,.10g} (dashed), longest {split.longest:,}"
        legend = f"{name}: {split.documents:,} documents, {facts}"
        axes.axvline(split.median, color=color, linewidth=1.5, linestyle="--", label=legend)
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # space for the labels of the context lengths
    for tokens, name in contexts.items():
        axes.axvline(tokens, color="0.45", linewidth=1, linestyle=":")
        text = f"context {tokens:,}\n{name}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        label = axes.text(
            tokens, 0.99, text, color="0.3", fontsize=8, rotation=90, ha="center", va="top", bbox=box
        )
        label.set_transform(axes.get_xaxis_transform())  # 0.99 of the axes' height
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %" if share <= 1 else "")
    axes.set(title=title, xlabel="tokens in a document, end of text included", ylabel="share of documents")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_png("--plot", path, figure)
