"""Bits per byte of a GGUF file in llama.cpp, against PyTorch's, and the option of `atlas export` that prints them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from atlas.cli import main
from atlas.config import AtlasConfig
from atlas.data import SequenceDataset, open_dataset, prepare, resolve_data
from atlas.export.gguf import export_gguf
from atlas.export.score import Sample, llama_cpp_logprobs, pytorch_logprobs, sample_of
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.training.devices.device import setup_runtime
from atlas.training.evaluate import evaluate
from atlas.training.loss import SummedLoss
from tests.conftest import corpus
from tests.export.test_export import needs_llama_cpp, save_checkpoint, sharp_model, with_swapped_norms

CONTEXT = 48


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus()], 400)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(corpus(300), encoding="utf-8")
    return path


def awkward_sample(bpe: ByteLevelTokenizer) -> Sample:
    """End-of-text tokens, tokens that end inside a character, a window as long as the context, and short windows."""
    ids = [
        *bpe.encode("The river, naïve 漢字 🙂 漢字"),
        bpe.eos_id,
        *bpe.encode("Съешь ½"),
        bpe.eos_id,
        bpe.eos_id,
    ]
    ids += bpe.encode(" the old mill, " * 5)
    assert len(ids) > CONTEXT
    return Sample("text", [ids[:CONTEXT], ids[CONTEXT - 1 :], [bpe.eos_id, *ids[:20]]], 2.0, CONTEXT)


@needs_llama_cpp
def test_llama_cpp_scores_a_text_as_pytorch_does(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    model, sample = sharp_model(bpe), awkward_sample(bpe)
    export_gguf(model, bpe, tmp_path / "m.gguf", quantize="f32")
    theirs, ours = llama_cpp_logprobs(tmp_path / "m.gguf", sample), pytorch_logprobs(model, sample)
    assert theirs.shape == ours.shape == (sample.num_tokens,)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-3)
    assert sample.bits_per_byte(theirs) == pytest.approx(sample.bits_per_byte(ours), rel=1e-3)


@needs_llama_cpp
def test_a_damaged_file_scores_differently(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    model, damaged, sample = sharp_model(bpe), sharp_model(bpe), awkward_sample(bpe)
    with_swapped_norms(damaged)
    export_gguf(damaged, bpe, tmp_path / "m.gguf", quantize="f32")
    theirs, ours = llama_cpp_logprobs(tmp_path / "m.gguf", sample), pytorch_logprobs(model, sample)
    assert sample.bits_per_byte(theirs) != pytest.approx(sample.bits_per_byte(ours), rel=1e-3)


def test_a_sample_of_all_tokens_equals_the_evaluation(text: Path, bpe: ByteLevelTokenizer) -> None:
    model, sample = sharp_model(bpe), sample_of(text, bpe, CONTEXT, num_tokens=10**6)
    stream = resolve_data(text, tokenizer=bpe, val_fraction=0.0).train
    dataset = SequenceDataset(stream, CONTEXT - 1, pad_last=True)
    runtime = setup_runtime(AtlasConfig(device="cpu"))
    result = evaluate(SummedLoss(model), dataset, range(len(dataset)), batch_size=4, runtime=runtime)
    assert result is not None
    assert sample.num_tokens == result.tokens
    assert sample.bits_per_byte(pytorch_logprobs(model, sample)) == pytest.approx(result.bits_per_byte)


def test_a_sample_is_spread_over_the_validation_part(
    tmp_path: Path, text: Path, bpe: ByteLevelTokenizer
) -> None:
    documents = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": f"{number} {text.read_text()}"}) for number in range(20)]
    documents.write_text("\n".join(lines))
    prepare([documents], tmp_path / "data", bpe, val_fraction=0.5)
    sample = sample_of(tmp_path / "data", bpe, CONTEXT, num_tokens=200)
    stream = open_dataset(tmp_path / "data").split("val")
    assert stream is not None
    assert sample.name.endswith("data (validation part)")
    assert [len(window) for window in sample.windows[:-1]] == [CONTEXT] * 3
    assert sample.windows[0] == stream.read(0, CONTEXT).tolist()
    assert sample.windows[-1][-1] == stream.read(stream.num_tokens - 1, stream.num_tokens)[0]


# The command.


def export(folder: Path, bpe: ByteLevelTokenizer, *options: object) -> int:
    checkpoint = save_checkpoint(folder / "checkpoints", bpe)
    return main(
        ["export", "--checkpoint", str(checkpoint), "--output", str(folder / "out"), *map(str, options)]
    )


@needs_llama_cpp
def test_export_prints_bits_per_byte_beside_pytorch_s_and_the_drift(
    tmp_path: Path, text: Path, bpe: ByteLevelTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, bpe, "--quantize", "q8_0", "--data", text) == 0
    said = capsys.readouterr().err
    line = r"bits per byte  (\S+) in llama\.cpp, (\S+) in PyTorch .* on [\d,]+ tokens of .*text\.txt \(full text\)"
    found = re.search(line, said)
    assert found
    assert float(found[1]) == pytest.approx(float(found[2]), rel=0.02)
    assert re.search(r"note +drift +log-probabilities moved by \S+ on average, \S+ at most", said)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--no-verify"], "--data: evaluates the file in llama.cpp, but --no-verify skips llama.cpp"),
        (["--format", "hf"], "--data: is for GGUF"),
        (["--format", "peft"], "--data: is for GGUF"),
    ],
)
def test_evaluating_a_text_needs_llama_cpp(
    tmp_path: Path,
    text: Path,
    bpe: ByteLevelTokenizer,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    assert export(tmp_path, bpe, "--data", text, *options) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
