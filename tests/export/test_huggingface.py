"""Hugging Face's format out and in, as `transformers` reads and writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atlas.cli import main
from atlas.errors import AtlasError
from atlas.export import llama_cpp
from atlas.export.huggingface import export_hf
from atlas.export.import_hf import import_hf
from atlas.inference.load import load_model
from atlas.model.cost import count_parameters
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.tokenizer.chat_template import read_chat_template
from tests.conftest import corpus
from tests.export.test_export import MODERN, save_checkpoint, sharp_model
from tests.foreign import byte_level_bpe

TEXTS = ["The river runs.\n\tVerse 7", "naïve 漢字 🙂  two  blanks ", "don't x'sX 12345", ""]
SHAPES = {
    "gpt2": {"max_seq_len": 128},
    "gpt2-plain": {"bias": False, "tie_embeddings": False},
    "gpt2-exact": {"mlp": "gelu_exact"},
    **MODERN,
}


@pytest.fixture(scope="module")
def bpe() -> ByteLevelTokenizer:
    tokenizer = Tokenizer.train([corpus(), "naïve 漢字 🙂 " * 20], 400)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    return tokenizer


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_what_is_exported(tmp_path: Path, bpe: ByteLevelTokenizer, name: str) -> None:
    model = sharp_model(bpe, **SHAPES[name])
    export_hf(model, bpe, tmp_path / "out", name="river")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__.lower().startswith(name.split("-")[0])
    assert not any(loading.values()), loading
    tokens = torch.randint(bpe.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs.eval()(tokens).logits
    assert float((model(tokens) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer(text).input_ids == bpe.encode(text)
        assert tokenizer.decode(bpe.encode(text)) == text
    assert tokenizer.eos_token_id == bpe.eos_id
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == bpe.eos_id
    assert "# river" in (tmp_path / "out" / "README.md").read_text()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_for_bit(tmp_path: Path, bpe: ByteLevelTokenizer, name: str) -> None:
    model = sharp_model(bpe, **SHAPES[name])
    with torch.no_grad():  # rows that only pad stay zero, and are not exported
        model.head_table[bpe.vocab_size :] = 0
    export_hf(model, bpe, tmp_path / "out")
    back, tokenizer = import_hf(tmp_path / "out")
    assert tokenizer.fingerprint == bpe.fingerprint
    state = model.state_dict()
    if name == "gpt2-plain":  # GPT-2 has biases there
        assert back.config.bias
        assert all(not value.any() for key, value in back.state_dict().items() if key.endswith(".bias"))
    else:
        assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(back.state_dict()[key], value) for key, value in state.items())


def random_model(family: str) -> PreTrainedModel:
    """As `transformers` makes it, the weights large enough for clear favourites."""
    torch.manual_seed(5)
    common = {"vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common))
    else:
        kind, build = (
            (LlamaConfig, LlamaForCausalLM) if family == "llama" else (Qwen3Config, Qwen3ForCausalLM)
        )
        model = build(
            kind(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=64,
                rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
                **common,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 5
    return model.eval()


def saved(folder: Path, family: str, **options: object) -> PreTrainedModel:
    model = random_model(family)
    model.save_pretrained(folder, **options)
    Tokenizer.gpt2().save(folder / "tokenizer.json")
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_what_transformers_saved_goes_through_atlas_into_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    theirs = saved(tmp_path / "public", family, max_shard_size="1MB")
    assert len(list((tmp_path / "public").glob("*.safetensors"))) > 1
    monkeypatch.chdir(tmp_path)
    assert main(["import", "public"]) == 0
    said = capsys.readouterr()
    checkpoint = Path(said.out.strip())
    assert checkpoint == Path("checkpoints/public/atlas_best.pt")
    assert f"{family}: {theirs.num_parameters():,} parameters" in said.err
    prompt = torch.tensor([Tokenizer.gpt2().encode("The river runs past the old mill and")])
    loaded = load_model(checkpoint)
    expected = theirs(prompt).logits
    assert float((loaded.model(prompt) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    if not llama_cpp.is_available():
        pytest.skip("xllamacpp is not installed")
    assert main(["export", "--checkpoint", str(checkpoint), "--quantize", "f32", "--no-verify"]) == 0
    greedy = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=50256)[
        0, prompt.shape[1] :
    ]
    answer = llama_cpp.ask_llama_cpp("atlas_model.gguf", [], [prompt[0].tolist()], [20], context=64)
    assert [step.token for step in answer.continuations[0]][: len(greedy)] == greedy.tolist()


def test_an_imported_model_is_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "public", "llama")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(corpus(), encoding="utf-8")
    assert main(["import", "public", "--output-dir", "base"]) == 0
    command = ["train", "--resume", "base/atlas_best.pt", "--train-data", "text.txt", "--output-dir", "tuned"]
    assert main([*command, "--max-steps", "2", "--batch-size", "2", "--set", "training.warmup_steps=0"]) == 0
    tuned, base = load_model("tuned/atlas_best.pt"), load_model("base/atlas_best.pt")
    assert tuned.model.config == base.model.config
    assert tuned.tokenizer.fingerprint == base.tokenizer.fingerprint
    moved = tuned.model.head_weight - base.model.head_weight
    assert 0 < float(moved.abs().max()) < 0.01


def test_openais_own_names_and_leftovers_are_understood(tmp_path: Path) -> None:
    """The published GPT-2 leaves out `transformer.` and keeps its masks."""
    model = saved(tmp_path / "public", "gpt2")
    path = tmp_path / "public" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, path)
    back, _ = import_hf(tmp_path / "public")
    tokens = torch.arange(20)[None]
    assert float((back(tokens) - model(tokens).logits).abs().max()) <= 1e-4


def test_a_foreign_tokenizer_is_kept_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a normalizer and another split, as of Llama or Qwen; the model has spare rows."""
    own = byte_level_bpe([corpus()], 400, ["<s>", "</s>"], nfc=True)
    saved(tmp_path / "public", "qwen3")
    own.save(str(tmp_path / "public" / "tokenizer.json"))
    config = json.loads((tmp_path / "public" / "config.json").read_text())
    config["eos_token_id"] = [1, 0]
    (tmp_path / "public" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert main(["import", "public"]) == 0
    loaded = load_model("checkpoints/public/atlas_best.pt")
    assert (loaded.tokenizer.vocab_size, loaded.tokenizer.eos_id) == (50257, 1)
    for text in ["The river 2024 runs. </s>", "e\u0301"]:
        assert loaded.tokenizer.encode(text) == loaded.tokenizer.encode_batch([text])[0]
    assert loaded.tokenizer.encode("river 12") == own.encode("river 12").ids
    assert 1 not in loaded.tokenizer.encode("The end.</s>")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("The end.</s>")) == "The end.</s>"
    capsys.readouterr()
    command = ["export", "--checkpoint", "checkpoints/public/atlas_best.pt"]
    assert main([*command, "--format", "hf", "--output", "back"]) == 0
    theirs = AutoTokenizer.from_pretrained("back")
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", 1)
    assert theirs("river 12").input_ids == own.encode("river 12").ids
    before, after = (load_file(Path(folder, "model.safetensors")) for folder in ("public", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_a_chat_model_brings_is_kept_on_the_way_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Import, one update with LoRA on conversations, and export in both formats."""
    own = byte_level_bpe([corpus()], 400, ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>", "<unk>"])
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = random_model("llama")
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 0, [1, 3]
    model.save_pretrained(tmp_path / "public")
    fast = PreTrainedTokenizerFast(tokenizer_object=own, chat_template=template, **named)
    fast.save_pretrained(tmp_path / "public")
    rows = [{"prompt": f"river {n}?", "response": "The river runs."} for n in range(8)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    assert main(["import", "public", "--output-dir", "in"]) == 0
    tuned = [
        "train",
        "--init-from",
        "in/atlas_best.pt",
        "--train-data",
        "chats.jsonl",
        "--output-dir",
        "tuned",
    ]
    assert main([*tuned, "--max-steps", "1", "--set", "lora.rank=2", "--set", "training.warmup_steps=0"]) == 0
    command = ["export", "--checkpoint", "tuned/atlas_best.pt"]
    assert main([*command, "--format", "hf", "--output", "back"]) == 0
    assert main([*command, "--format", "peft", "--output", "adapter"]) == 0

    talk = [{"role": "user", "content": "river 3?"}]
    expected = fast.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    for folder in ("back", "adapter"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert {name: getattr(theirs, name) for name in named} == named
        assert theirs.chat_template == template
        assert theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) == expected
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "public"
    back = AutoModelForCausalLM.from_pretrained("back")
    assert sorted(back.generation_config.eos_token_id) == [1, 3]
    assert (back.config.bos_token_id, back.config.eos_token_id, back.config.pad_token_id) == (0, 1, 4)
    theirs = AutoTokenizer.from_pretrained("back", padding_side="left")
    prompts, options = ["river", "the old mill runs past"], {"max_new_tokens": 5, "do_sample": False}
    batch = theirs(prompts, padding=True, return_tensors="pt")
    together = back.generate(**batch, **options)[:, -5:].tolist()
    each = [back.generate(**theirs(text, return_tensors="pt"), **options) for text in prompts]
    alone = [ids[0, -5:].tolist() for ids in each]
    assert together == alone


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "public"
    saved(folder, "llama")
    return folder


def broken(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if what == "unknown family":
        config["model_type"] = "mamba"
    elif what == "scaled rope":
        config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}
    elif what == "other activation":
        config["hidden_act"] = "gelu"
    elif what == "biases":
        config["attention_bias"] = True
    elif what == "other vocabulary":
        config["vocab_size"] = 50000
    elif what == "other width":
        config["hidden_size"] = 64
    elif what == "strange numbers":
        config["num_attention_heads"] = "many"
    elif what == "missing tensor":
        del tensors["model.norm.weight"]
    elif what == "unknown tensor":
        tensors["model.layers.0.extra.weight"] = torch.ones(3)
    save_file(tensors, weights)
    (folder / "config.json").write_text("[]" if what == "no object" else json.dumps(config))
    if what == "missing shard":
        weights.unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "path in index":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    elif what == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("unknown family", "model_type mamba: Atlas imports gpt2, llama, qwen2, qwen3"),
        ("scaled rope", "rope_parameters of type yarn"),
        ("other activation", "hidden_act gelu: Atlas supports only silu"),
        ("biases", "attention_bias True"),
        ("other vocabulary", "has 50,257 rows, but vocab_size in config.json is 50,000"),
        ("other width", "config.json does not fit the weights"),
        ("strange numbers", "config.json: "),
        ("missing tensor", "lacks 1 tensors, such as model.norm.weight"),
        ("unknown tensor", "does not know, such as model.layers.0.extra.weight"),
        ("missing shard", "model-00001-of-00002.safetensors is missing"),
        ("path in index", "does not name files in this folder"),
        ("pickled", "pickled weights, which can run code"),
        ("cut off", "model.safetensors: cannot be read"),
        ("no weights", "has no model.safetensors"),
        ("no config", "has no config.json"),
        ("no object", "config.json: is not a JSON object"),
        ("no tokenizer", "name its tokenizer with --tokenizer"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    reason: str,
) -> None:
    shutil.copytree(llama, tmp_path / "public")
    broken(tmp_path / "public", what)
    monkeypatch.chdir(tmp_path)
    assert main(["import", "public"]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not Path("checkpoints").exists()


def test_the_default_of_several_chat_templates_is_read(tmp_path: Path) -> None:
    templates = [{"name": ["default"], "template": "a"}, "b", {"name": "default", "template": "c"}]
    for given, expected in ((templates, "c"), (templates[:2], None), ("d", "d"), (None, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
        assert read_chat_template(tmp_path) == expected
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(AtlasError, match="its chat template cannot be read"):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(AtlasError, match="its chat template cannot be read"):
        read_chat_template(tmp_path)


def test_a_folder_that_is_taken_is_left_alone(
    tmp_path: Path, bpe: ByteLevelTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoints", bpe)
    command = ["export", "--format", "hf", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("my thesis")
    assert main(command) == 2
    assert "exists and is not an exported model" in capsys.readouterr().err
    (tmp_path / "out" / "thesis.txt").unlink()
    for dtype in ("f32", "bf16"):
        assert main([*command, "--quantize", dtype]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["transformer.ln_f.weight"].dtype == torch.bfloat16
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]
    assert main([*command, "--quantize", "q8_0"]) == 2
    assert "--quantize q8_0: is for GGUF" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "out"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_shape_without_a_family_is_refused(tmp_path: Path, bpe: ByteLevelTokenizer) -> None:
    model = sharp_model(bpe, position="rope", max_seq_len=32)
    with pytest.raises(AtlasError, match="for Atlas only"):
        export_hf(model, bpe, tmp_path / "out")
    model = sharp_model(bpe)
    with torch.no_grad():
        model.final_norm.weight[0] = 1e6
    with pytest.raises(AtlasError, match="holds values that f16 cannot"):
        export_hf(model, bpe, tmp_path / "out", dtype="f16")
    assert not any(tmp_path.iterdir())


def test_reading_config_json_needs_no_defaults_of_ours(tmp_path: Path) -> None:
    """A config.json that states only what differs from the defaults of `transformers`."""
    from atlas.export.hf_format import config_in

    for kind in (GPT2Config, LlamaConfig, Qwen3Config):
        full, bare = config_in(kind().to_dict()), config_in({"model_type": kind.model_type})
        assert count_parameters(full) == count_parameters(bare)
        said = {"num_kv_heads": bare.kv_heads, "head_dim": bare.head_size, "mlp_size": bare.mlp_width}
        assert full.model_copy(update=said) == bare.model_copy(update=said)
