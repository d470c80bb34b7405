"""Measure prompt lookup: the speed of a text in the server's engine, with and without drafts from earlier in the text.

    python benchmarks/lookup.py --checkpoint checkpoints/atlas_best.pt
    python benchmarks/lookup.py --checkpoint smollm2/atlas_best.pt --rounds 5 --dtype bf16

The model must answer conversations. The engine answers three requests at temperature 0: to repeat a text, to write
JSON by a schema, and to tell a story; and the story again at temperature 1. Both engines run in this process and take
turns. The table shows medians of the new tokens per second, from the first token on, and how many texts are the same:
rounding can decide between two nearly equal tokens in bf16, and between two improbable ones at temperature 1.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

from results import add_record_option, recorded

from atlas.inference.layout import lay_out_for_decoding
from atlas.inference.load import load_model
from atlas.inference.sampling import Sampling
from atlas.serving.backends.engine import Engine
from atlas.serving.backends.generation import Generation, GenerationRequest
from atlas.serving.backends.grammar import Grammar
from atlas.tokenizer.chat import Message

TEXT = (
    "The river runs past the old mill and the stone bridge. In winter the water is high, and the boats stay in the "
    "harbour. The miller's daughter counts the reeds, and her brother repairs the nets. In spring they sail to the "
    "town."
)
PERSON = {
    "name": {"type": "string", "maxLength": 20},
    "age": {"type": "integer", "minimum": 1, "maximum": 99},
}
PEOPLE = {
    "type": "array",
    "minItems": 6,
    "items": {
        "type": "object",
        "properties": PERSON,
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}
TASKS: dict[str, tuple[str, float, dict[str, Any] | None]] = {
    "repeat a text": (f"Repeat this text word for word:\n{TEXT}", 0, None),
    "JSON": ("List six people with name and age as JSON.", 0, PEOPLE),
    "a story": ("Tell a story about a river.", 0, None),
    "a story, temperature 1": ("Tell a story about a river.", 1, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tokens", type=int, default=120, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    add_record_option(parser)
    arguments = parser.parse_args()
    with recorded("Prompt lookup", arguments):
        asyncio.run(measure(arguments))


async def measure(arguments: argparse.Namespace) -> None:
    loaded = load_model(arguments.checkpoint, dtype=arguments.dtype, context=arguments.context)
    lay_out_for_decoding(loaded.model)
    options = {"parallel": 1, "queue": 1, "prefix_tokens": 0}
    engines = [Engine(loaded, "with", **options), Engine(loaded, "without", **options, draft_tokens=0)]
    for engine in engines:
        engine.start()
    print("| text | with drafts, tokens/s | without, tokens/s | with ÷ without | the same texts |")
    print("|---|---:|---:|---:|---:|")
    for name, task in TASKS.items():
        speeds: tuple[list[float], list[float]] = [], []
        num_same = 0
        for number in range(-1, arguments.rounds):  # the first texts load and create things
            texts = []
            for engine, measured in zip(engines, speeds, strict=True):
                text, speed = await generated(engine, *task, tokens=arguments.tokens, seed=number + 1)
                texts.append(text)
                measured += [speed] if number >= 0 else []
            num_same += number >= 0 and texts[0] == texts[1]
        ours, other = map(statistics.median, speeds)
        print(
            f"| {name} | {ours:.1f} | {other:.1f} | {ours / other:.2f} | {num_same} of {arguments.rounds} |"
        )
    for engine in engines:
        engine.close()


async def generated(
    engine: Engine, prompt: str, temperature: float, schema: dict[str, Any] | None, *, tokens: int, seed: int
) -> tuple[str, float]:
    """Return a text, and its tokens per second after the first token."""
    constraint = engine.constrain(Grammar(schema, "schema")) if schema else None
    ids = engine.encode_chat([Message("user", prompt)])
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0)
    generation = Generation(ids, sampling, tokens, seed, constraint=constraint)
    request = GenerationRequest(engine, [generation], 600.0, lambda _: None)
    text, first = "", 0.0
    async for _, piece in request.pieces():
        first = first or time.perf_counter()
        text += piece.text
    return text, (request.num_generated - 1) / (time.perf_counter() - first)


if __name__ == "__main__":
    main()
