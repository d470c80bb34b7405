"""Measure the tokens per second of generation, compared with transformers and llama.cpp with the same weights.

    python benchmarks/decode.py                             tiny, 200 tokens, one text and eight in parallel
    python benchmarks/decode.py --preset small --tokens 100 --rounds 3
    python benchmarks/decode.py --device cuda --dtype bf16 --preset small

The model has random weights, the preset's shape and GPT-2's vocabulary. The model generates greedily, in f32 or bf16.
Atlas runs the code of `atlas generate`. transformers runs `generate` with a KV cache. llama.cpp (package `xllamacpp`)
runs the file that Atlas exports in the slots of its server, with an f32 KV cache. With `--dtype bf16`, llama.cpp runs
files in f32, f16 and bf16, on a CPU only. All programs have the same number of threads. Each program is a separate
process. The processes take turns, and the table shows medians. If a program is not installed, the script leaves it out
and prints a note.

The script records the time of each token. Counting starts when every text has its first token, so the time to read the
prompt does not count. "Over the context" shows the milliseconds per token in the first and the last quarter of a text
that fills the context. A program must read all weights for each token, so the memory bandwidth limits its speed. The
last row shows this limit in tokens per second.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from contenders import Contender, take_turns
from results import add_record_option, recorded
from twin import transformers_twin

PROMPTS = (
    "The river",
    "A small boat lay in the reeds",
    "Once the mill stood still,",
    "In the year 1848 the town had four thousand inhabitants, and",
    "Water",
    "The bridge, which was built of stone,",
    "He said that nobody had seen the",
    "Snow fell on the hills and on the harbour, and in the morning",
)
"""Prompts of different lengths, like real texts."""


@dataclass(frozen=True)
class Shape:
    preset: str
    device: str
    threads: int
    gguf: str
    """The folder with a GGUF file of each of llama.cpp's types."""
    dtype: str = "f32"

    @property
    def gguf_types(self) -> list[str]:
        if self.dtype == "bf16":
            return [] if self.device == "cuda" else ["f32", "f16", "bf16"]
        return ["f32"]

    def model(self) -> Any:
        """Return a model with the same weights in every process. The row of end-of-text is zero, so that end-of-text is
        never the likeliest token."""
        import torch

        from atlas.config.loader import read_yaml, resolve
        from atlas.config.presets import preset_path
        from atlas.model import build_model
        from atlas.tokenizer import Tokenizer

        gpt2 = Tokenizer.gpt2()
        config = resolve(read_yaml(preset_path(self.preset))).model
        config = config.model_copy(
            update={"vocab_size": gpt2.vocab_size, "dropout": 0.0, "tie_embeddings": True}
        )
        model = build_model(config, seed=0).eval()
        with torch.no_grad():
            model.token_embedding.weight[gpt2.eos_id] = 0
        return model.to(torch.bfloat16 if self.dtype == "bf16" else torch.float32)


Write = Callable[[Sequence[str], int], list[list[float]]]
"""Maps the texts to continue and a number of tokens to the time of each token of each text."""


# The contenders, each imported in its own process


def atlas(shape: Shape) -> Write:
    from atlas.process import set_up_process

    set_up_process()  # as the `atlas` command does
    from atlas.config import AtlasConfig
    from atlas.inference.layout import lay_out_for_decoding
    from atlas.inference.load import LoadedModel
    from atlas.inference.sampling import Sampling
    from atlas.inference.text import stream_text
    from atlas.tokenizer import Tokenizer
    from atlas.training.devices.device import choose_device

    model = shape.model().to(choose_device(shape.device))
    if shape.device == "cpu":
        lay_out_for_decoding(model)
    loaded = LoadedModel(model, Tokenizer.gpt2(), AtlasConfig(model=model.config), Path(), {})

    def write(prompts: Sequence[str], tokens: int) -> list[list[float]]:
        moments: list[float] = []
        for _ in stream_text(loaded, prompts, Sampling(temperature=0), max_tokens=tokens):
            moments.append(time.perf_counter())
        return [moments[:tokens] for _ in prompts]  # the last step releases the text that was held back

    return write


def transformers(shape: Shape) -> Write:
    import torch
    from transformers.generation.streamers import BaseStreamer

    from atlas.tokenizer import Tokenizer

    model, tokenizer = shape.model(), Tokenizer.gpt2()
    twin = transformers_twin(model).to(shape.device, model.head_table.dtype)

    class Moments(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.moments: list[float] = []

        def put(self, value: Any) -> None:
            self.moments.append(time.perf_counter())

        def end(self) -> None:
            pass

    def write(prompts: Sequence[str], tokens: int) -> list[list[float]]:
        rows = [tokenizer.encode(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=shape.device)
        mask = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=shape.device
        )
        streamer = Moments()
        # Without eos_token_id no text ends before its last token.
        options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            twin.generate(ids, attention_mask=mask, streamer=streamer, use_cache=True, **options)
        return [streamer.moments[1:] for _ in prompts]  # the first belongs to the prompt

    return write


def llama_cpp(shape: Shape, kind: str, slots: int) -> Write:
    import xllamacpp

    if shape.device == "cuda":
        gpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_GPU
        if gpu not in [device["type"] for device in xllamacpp.get_device_info()]:
            raise SystemExit("this xllamacpp is built without support for the GPU")
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(shape.gguf, f"{kind}.gguf"))
    params.n_parallel = slots
    params.n_ctx = slots * shape.model().config.max_seq_len
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = shape.threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.n_gpu_layers = 999 if shape.device == "cuda" else 0
    params.fit_params = False
    params.verbosity = 1  # errors only
    server = xllamacpp.Server(params)

    request = {"temperature": 0, "ignore_eos": True, "stream": True, "cache_prompt": False}

    def write_one(prompt: str, tokens: int, moments: list[float]) -> None:
        def receive(chunk: Any) -> None:
            if not chunk["choices"][0]["finish_reason"]:  # the last one has no token
                moments.append(time.perf_counter())

        server.handle_completions(request | {"prompt": prompt, "max_tokens": tokens}, receive)

    def write(prompts: Sequence[str], tokens: int) -> list[list[float]]:
        rows: list[list[float]] = [[] for _ in prompts]
        threads = [
            threading.Thread(target=write_one, args=(prompt, tokens, row))
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return rows

    return write


KINDS: dict[str, Callable[[Shape], Write]] = {
    "atlas": atlas,
    "transformers": transformers,
}
for _type in ("f32", "f16", "bf16"):
    for _slots in (1, len(PROMPTS)):
        KINDS[f"llama.cpp, {_type}, {_slots}"] = partial(llama_cpp, kind=_type, slots=_slots)


def prepare(kind: str, shape: Shape) -> Callable[[Any], Any]:
    import torch

    torch.set_num_threads(shape.threads)
    if kind == "memory":
        return lambda request: bytes_per_second(shape.device)
    write = KINDS[kind](shape)
    write(PROMPTS[:1], 8)  # to warm up

    def answer(request: Any) -> list[list[float]]:
        texts, tokens = request
        rows = write(PROMPTS[:texts], tokens)
        if any(len(row) != tokens for row in rows):
            raise SystemExit(f"wrote {[len(row) for row in rows]} tokens instead of {tokens} each")
        return rows

    return answer


def bytes_per_second(device: str) -> float:
    """Return the speed of reading memory: that of a copy, including its writes, or of a sum, whichever is faster."""
    import torch

    from atlas.machine import measure_copy

    numbers = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - start)
    return max(measure_copy(torch.device(device)), numbers.nbytes / min(seconds))


def bytes_per_token(model: Any) -> int:
    """Return the bytes of the weights that a step reads: all weights, but only one row of the position table."""
    from atlas.model.cost import count_parameters

    parameters = count_parameters(model.config)
    return int(model.head_table.element_size()) * (parameters.total - parameters.position_embedding)


# The parent


def tokens_per_second(rows: list[list[float]]) -> float:
    """Return the tokens per second of all texts together, from the moment when every text has its first token."""
    start, end = max(row[0] for row in rows), max(row[-1] for row in rows)
    return sum(moment > start for row in rows for moment in row) / (end - start)


def milliseconds_in_quarters(row: list[float]) -> tuple[float, float]:
    """Return the median seconds per token in the first and the last quarter of a text. Medians ignore interruptions by
    other programs."""
    gaps = [(after - before) * 1e3 for before, after in itertools.pairwise(row)]
    quarter = len(gaps) // 4
    return statistics.median(gaps[:quarter]), statistics.median(gaps[-quarter:])


@dataclass
class Writer:
    """A contender, and one figure per round for each quantity."""

    name: str
    contender: Contender
    speeds: list[float]
    quarters: list[tuple[float, float]]

    def write(self, texts: int, tokens: int) -> None:
        self.speeds.append(tokens_per_second(self.contender.ask([texts, tokens])))

    def fill_context(self, tokens: int) -> None:
        [row] = self.contender.ask([1, tokens])
        self.quarters.append(milliseconds_in_quarters(row))


def contender(kind: str, shape: Shape) -> Contender:
    return Contender(kind, [sys.executable, __file__, "--child", kind, json.dumps(asdict(shape))])


def writers(shape: Shape) -> Iterator[tuple[Writer, Writer]]:
    """Return the contenders for one text and for eight texts. One text and eight texts use the same process, except
    with llama.cpp, whose slots divide its context."""
    kinds = {"Atlas": ("atlas", "atlas"), "transformers": ("transformers", "transformers")}
    if shape.gguf:
        for kind in shape.gguf_types:
            name = f"llama.cpp, {kind}"
            kinds[name] = (f"{name}, 1", f"{name}, {len(PROMPTS)}")
    else:
        print("llama.cpp: left out: xllamacpp is not installed, or this is bf16 on a GPU", file=sys.stderr)
    if not importlib.util.find_spec("transformers"):
        print("transformers: is not installed and left out", file=sys.stderr)
        del kinds["transformers"]
    for name, (one, eight) in kinds.items():
        first = contender(one, shape)
        second = first if one == eight else contender(eight, shape)
        ready = True
        for each in {id(first): first, id(second): second}.values():
            each.launch()
            ready = each.is_ready() and ready
        if ready:
            yield Writer(name, first, [], []), Writer(name, second, [], [])


def compare(
    shape: Shape, context: int, tokens: int, rounds: int
) -> tuple[list[tuple[Writer, Writer]], float]:
    pairs = list(writers(shape))
    if not pairs or pairs[0][0].name != "Atlas":
        raise SystemExit("nothing to compare")
    memory = contender("memory", shape)
    memory.launch()
    memory.is_ready()
    rates = []
    for number in range(rounds):
        for one, eight in pairs:
            one.write(1, tokens)
            eight.write(len(PROMPTS), tokens)
            one.fill_context(context - len(PROMPTS[0]))
        rates.append(memory.ask())
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for each in (*(writer.contender for pair in pairs for writer in pair), memory):
        each.stop()
    return pairs, statistics.median(rates)


def report(pairs: list[tuple[Writer, Writer]], rate: float, num_bytes: int) -> None:
    print("| | tokens/s | Atlas ÷ it | ms a token over the context, first and last quarter | |")
    print("|---|---:|---:|---:|---:|")
    speeds = {one.name: statistics.median(one.speeds) for one, _ in pairs}
    for one, _ in pairs:
        first, last = (statistics.median(quarter) for quarter in zip(*one.quarters, strict=True))
        print(
            f"| {one.name} | {speeds[one.name]:,.1f} | {speeds['Atlas'] / speeds[one.name]:.2f} "
            f"| {first:.2f} → {last:.2f} | × {last / first:.2f} |"
        )
    bound = rate / num_bytes
    print(f"| weights read once per token | {bound:,.1f} | {speeds['Atlas'] / bound:.2f} | | |")
    print(
        f"\n| {len(PROMPTS)} texts in parallel | tokens/s in total | Atlas ÷ it | of one text |\n|---|---:|---:|---:|"
    )
    together = {eight.name: statistics.median(eight.speeds) for _, eight in pairs}
    for name, speed in together.items():
        print(f"| {name} | {speed:,.1f} | {together['Atlas'] / speed:.2f} | {speed / speeds[name]:.2f} |")
    print(f"\nA token reads {num_bytes / 1e6:,.0f} MB of weights; memory gives {rate / 1e9:,.1f} GB/s.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: PyTorch's, one per core")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", default="f32", choices=["f32", "bf16"], help="of the weights and the cache"
    )
    add_record_option(parser)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, given = arguments.child
        take_turns(lambda: prepare(kind, Shape(**json.loads(given))))
        return

    import torch

    from atlas.model.cost import count_parameters

    threads = arguments.threads or torch.get_num_threads()
    shape = Shape(arguments.preset, arguments.device, threads, gguf="", dtype=arguments.dtype)
    model = shape.model()
    context = model.config.max_seq_len
    if not 4 <= arguments.tokens <= context - max(map(len, PROMPTS)):
        parser.error(f"--tokens {arguments.tokens}: with its prompt, a text must fit a context of {context}")
    parameters = count_parameters(model.config)
    num_bytes = bytes_per_token(model)
    with tempfile.TemporaryDirectory() as folder, recorded("Decoding", arguments):
        if importlib.util.find_spec("xllamacpp") and shape.gguf_types:
            from atlas.export.gguf import export_gguf
            from atlas.tokenizer import Tokenizer

            for kind in shape.gguf_types:
                export_gguf(model.float(), Tokenizer.gpt2(), Path(folder, f"{kind}.gguf"), quantize=kind)
            shape = replace(shape, gguf=folder)
        del model
        pairs, rate = compare(shape, context, arguments.tokens, arguments.rounds)
        print(
            f"{arguments.preset}, {parameters.total:,} parameters in {arguments.dtype}, {arguments.device}, "
            f"{threads} threads, {arguments.tokens} tokens a text, greedy, medians of {arguments.rounds} rounds\n"
        )
        report(pairs, rate, num_bytes)


if __name__ == "__main__":
    main()
