"""Graphics cards by name: their memory, the speed of their matrix products, and their power.

The values should equal the values in the makers' whitepapers and data sheets, which the comments name. The values were
written down from common knowledge. tests/planning/test_plan_run.py checks each rate against processing units × clock ×
FLOPs per clock. The values of H100 and H200 were also compared with copies of their data sheets. The values of the
other cards were not yet compared. No value was measured. `atlas.planning.speed` estimates which fraction of these peaks
a card reaches.

Rates are peaks of dense matrix products in the precision that training chooses on the card, accumulated in fp32 as in
PyTorch. These rates are lower than the advertised rates, for three reasons:

- the tensor cores of GeForce cards (20, 30, 40 and 50 series) accumulate in fp32 at half of their fp16 rate, while the
  tensor cores of workstation and data-centre cards accumulate in fp32 at the full rate;
- advertised rates "with sparsity" are twice the dense rates;
- GeForce 10 cards have no tensor cores: their fp16 products run at the rate of fp32.

A card that its vendor has overclocked is a little faster. A laptop's GPU with the same name is another chip, and much
slower.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from atlas.errors import AtlasError


@dataclass(frozen=True)
class Card:
    """The maker's specifications of a graphics card."""

    name: str
    gibibytes: int
    precision: str
    """`bf16`, or `fp16` for a card that does not compute in bf16."""
    tflops: float
    """TFLOP/s of dense matrix products in `precision`, accumulated in fp32."""
    bandwidth: int
    """Memory bandwidth in GB/s."""
    watts: int
    """Power of the board in watts."""

    @property
    def memory(self) -> int:
        """Memory in bytes."""
        return self.gibibytes << 30

    @property
    def is_geforce(self) -> bool:
        """Whether the tensor cores accumulate in fp32 at half of their fp16 rate, as in NVIDIA's consumer cards since
        Turing."""
        return re.match(r"RTX \d", self.name) is not None


CARDS = (
    # Pascal (NVIDIA, GeForce GTX 1080 whitepaper): fp32 units only
    Card("GTX 1060", 6, "fp16", 4.4, 192, 120),
    Card("GTX 1070", 8, "fp16", 6.5, 256, 150),
    Card("GTX 1080", 8, "fp16", 8.9, 320, 180),
    Card("GTX 1080 Ti", 11, "fp16", 11.3, 484, 250),
    # Turing (NVIDIA, Turing GPU Architecture)
    Card("RTX 2060", 6, "fp16", 25.8, 336, 160),
    Card("RTX 2070", 8, "fp16", 29.9, 448, 175),
    Card("RTX 2080", 8, "fp16", 40.3, 448, 215),
    Card("RTX 2080 Ti", 11, "fp16", 53.8, 616, 250),
    # Ampere (NVIDIA, Ampere GA102 GPU Architecture)
    Card("RTX 3050", 8, "bf16", 18.2, 224, 130),
    Card("RTX 3060", 12, "bf16", 25.5, 360, 170),
    Card("RTX 3060 Ti", 8, "bf16", 32.4, 448, 200),
    Card("RTX 3070", 8, "bf16", 40.6, 448, 220),
    Card("RTX 3070 Ti", 8, "bf16", 43.5, 608, 290),
    Card("RTX 3080", 10, "bf16", 59.5, 760, 320),
    Card("RTX 3080 Ti", 12, "bf16", 68.2, 912, 350),
    Card("RTX 3090", 24, "bf16", 71.0, 936, 350),
    Card("RTX 3090 Ti", 24, "bf16", 80.0, 1008, 450),
    # Ada (NVIDIA, Ada GPU Architecture)
    Card("RTX 4060", 8, "bf16", 30.2, 272, 115),
    Card("RTX 4060 Ti", 8, "bf16", 44.1, 288, 160),
    Card("RTX 4060 Ti", 16, "bf16", 44.1, 288, 165),
    Card("RTX 4070", 12, "bf16", 58.3, 504, 200),
    Card("RTX 4070 SUPER", 12, "bf16", 71.0, 504, 220),
    Card("RTX 4070 Ti", 12, "bf16", 80.2, 504, 285),
    Card("RTX 4070 Ti SUPER", 16, "bf16", 88.2, 672, 285),
    Card("RTX 4080", 16, "bf16", 97.5, 717, 320),
    Card("RTX 4080 SUPER", 16, "bf16", 104.4, 736, 320),
    Card("RTX 4090", 24, "bf16", 165.2, 1008, 450),
    # Blackwell (NVIDIA, RTX Blackwell GPU Architecture)
    Card("RTX 5050", 8, "bf16", 26.3, 320, 130),
    Card("RTX 5060", 8, "bf16", 38.4, 448, 145),
    Card("RTX 5060 Ti", 8, "bf16", 47.4, 448, 180),
    Card("RTX 5060 Ti", 16, "bf16", 47.4, 448, 180),
    Card("RTX 5070", 12, "bf16", 61.7, 672, 250),
    Card("RTX 5070 Ti", 16, "bf16", 87.9, 896, 300),
    Card("RTX 5080", 16, "bf16", 112.6, 960, 360),
    Card("RTX 5090", 32, "bf16", 209.5, 1792, 575),
    # Workstations and data centres (NVIDIA, data sheets of the cards; Tesla V100, A100 and H100 GPU Architecture)
    Card("V100", 16, "fp16", 125.0, 900, 300),
    Card("V100", 32, "fp16", 125.0, 900, 300),
    Card("T4", 16, "fp16", 65.0, 320, 70),
    Card("A10", 24, "bf16", 125.0, 600, 150),
    Card("RTX A6000", 48, "bf16", 154.8, 768, 300),
    Card("A100 PCIe", 40, "bf16", 312.0, 1555, 250),
    Card("A100 PCIe", 80, "bf16", 312.0, 1935, 300),
    Card("A100", 40, "bf16", 312.0, 1555, 400),
    Card("A100", 80, "bf16", 312.0, 2039, 400),
    Card("L4", 24, "bf16", 121.0, 300, 72),
    Card("L40S", 48, "bf16", 362.0, 864, 350),
    Card("H100 PCIe", 80, "bf16", 756.0, 2000, 350),
    Card("H100", 80, "bf16", 989.0, 3350, 700),
    Card("H200", 141, "bf16", 989.0, 4800, 700),
    # AMD (data sheets of the cards): the RX 6800 cards have no matrix units, and compute bf16 at the rate of fp32
    Card("RX 6800", 16, "bf16", 16.2, 512, 250),
    Card("RX 6800 XT", 16, "bf16", 20.7, 512, 300),
    Card("RX 7900 XTX", 24, "bf16", 122.8, 960, 355),
)

_MEMORY = re.compile(r"(?<![a-z0-9])(\d{1,3})\s?gi?b(?![a-z])")
_NO_NAME = re.compile(r"nvidia|geforce|amd|radeon|tesla|\bgpu\b|\bsxm\d?\b|\bhbm\d?e?\b|[\s\-_,]")


def card_named(text: str) -> Card | None:
    """Return the card with the name `text`, in the spelling of people or drivers, or None if the card is not known.

    Examples: `rtx3060`, `RTX 3060 12GB`, `NVIDIA GeForce RTX 3060`. If the card was sold with several memory sizes and
    the name states no size, return the card with the smallest memory.
    """
    key, gibibytes = _key(text)
    return next(
        (card for card in CARDS if _key(card.name)[0] == key and gibibytes in (None, card.gibibytes)), None
    )


def find_card(text: str) -> Card:
    """Return the result of `card_named`. For an unknown card, raise `AtlasError` with the closest known names."""
    card = card_named(text)
    if card is None:
        raise AtlasError(f"--gpu {text}: is not a known card; {_hint(text)}")
    return card


def _key(text: str) -> tuple[str, int | None]:
    """Return the name without maker, family and spaces, and the memory in GiB, or None if the name states no memory."""
    text = text.lower()
    stated = _MEMORY.search(text)
    bare = _NO_NAME.sub("", _MEMORY.sub("", text))
    return re.sub(r"^(rtx|gtx|rx)(?=a?\d)", "", bare), int(stated[1]) if stated else None


def _hint(text: str) -> str:
    if re.search(r"laptop|mobile|max-?q", text, re.IGNORECASE):
        return (
            "a laptop's GPU is not the desktop card with the same name; give the GPU's memory: --memory 8GB"
        )
    sizes = [str(card.gibibytes) for card in CARDS if _key(card.name)[0] == _key(text)[0]]
    if sizes:
        return f"that card has {' or '.join(sizes)} GB; leave the size out, and give --memory as well"
    names = {spelling: card.name for card in CARDS for spelling in (card.name.lower(), _key(card.name)[0])}
    if close := difflib.get_close_matches(text.lower(), names, n=3, cutoff=0.7):
        meant = " or ".join(dict.fromkeys(names[spelling] for spelling in close))
        return f"did you mean {meant}? For any other card, give the card's memory: --memory 8GB"
    return f"give the card's memory (--memory 8GB), or a card of the table: {', '.join(dict.fromkeys(names.values()))}"
