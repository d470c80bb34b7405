"""Config files, `--set` and flags: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import ast
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import atlas
from atlas.config import AtlasConfig, ModelConfig, reference
from atlas.config.loader import describe, fields, nested, overlay, parse_overrides, read_yaml, resolve
from atlas.config.presets import find_config, preset_names, preset_path
from atlas.errors import AtlasError
from atlas.model import AtlasLM
from atlas.training.devices.device import choose_device

MY_CONFIG = """\
# configs/my_config.yaml
model:
  hidden_size: 768      # Model dimension
  num_layers: 12        # Transformer blocks
  num_heads: 12         # Attention heads
  vocab_size: 50257     # Vocabulary size
  max_seq_len: 512      # Context length

training:
  batch_size: 4
  learning_rate: 3e-4
  max_steps: 100000
"""


def config_of(text: str, folder: Path) -> AtlasConfig:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return resolve(read_yaml(path))


def refusal(text: str, folder: Path) -> str:
    with pytest.raises(AtlasError) as caught:
        config_of(text, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder / "config.yaml"), "config.yaml")


# What is taken


def test_the_example_of_the_faq_works_as_printed(tmp_path: Path) -> None:
    config = config_of(MY_CONFIG, tmp_path)
    assert config.model.model_dump(include={"hidden_size", "num_layers", "num_heads", "vocab_size"}) == {
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "vocab_size": 50257,
    }
    assert config.model.max_seq_len == 512
    assert config.training.learning_rate == 0.0003
    assert (config.training.batch_size, config.training.max_steps) == (4, 100_000)


@pytest.mark.parametrize(
    ("written", "read"), [("1e5", 100_000), ("1E5", 100_000), ("100_000", 100_000), ("2.0", 2)]
)
def test_integers_are_read_in_every_usual_spelling(written: str, read: int, tmp_path: Path) -> None:
    max_steps = config_of(f"training: {{max_steps: {written}}}", tmp_path).training.max_steps
    assert max_steps == read
    assert isinstance(max_steps, int)


def test_an_empty_file_and_a_section_of_comments_are_the_defaults(tmp_path: Path) -> None:
    assert config_of("", tmp_path) == AtlasConfig()
    assert config_of("training:\n  # batch_size: 4\nseed: 5\n", tmp_path) == AtlasConfig(seed=5)


def test_a_key_where_the_faqs_authors_put_it_reaches_its_place(tmp_path: Path) -> None:
    assert config_of("training: {keep_checkpoints: 3}", tmp_path).checkpoint.keep_checkpoints == 3


def test_a_mapping_may_be_merged_as_yaml_has_it(tmp_path: Path) -> None:
    model = config_of("model: {<<: {num_heads: 4, hidden_size: 8}, hidden_size: 16}", tmp_path).model
    assert (model.num_heads, model.hidden_size) == (4, 16)


def test_a_windows_editors_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 5\r\n")
    assert resolve(read_yaml(tmp_path / "bom.yaml")).seed == 5


def test_the_resolved_config_written_out_reads_back_as_itself(tmp_path: Path) -> None:
    config = resolve({"model": {"vocab_size": 300}, "training": {"micro_batch_size": 2, "max_steps": 7}})
    written = yaml.safe_dump(config.model_dump(mode="json"))
    assert config_of(written, tmp_path) == config


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        AtlasConfig().seed = 5  # type: ignore[misc]


# Precedence


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training: {batch_size: 3, learning_rate: 3e-3}\nseed: 3", encoding="utf-8")
    checkpoint = {
        "training": {"batch_size": 2, "warmup_steps": 2, "beta1": 0.2},
        "model": {"dropout": 0.2},
        "seed": 2,
    }
    overrides = parse_overrides(["training.learning_rate=4e-4", "training.beta1=0.4", "seed=4"])
    flags = nested("seed", "5")
    config = resolve(checkpoint, read_yaml(path), overrides, flags)

    assert config.training.weight_decay == AtlasConfig().training.weight_decay  # nobody wrote it
    assert config.training.warmup_steps == 2  # the checkpoint's
    assert config.model.dropout == 0.2
    assert config.training.batch_size == 3  # the file over the checkpoint
    assert config.training.learning_rate == 4e-4  # --set over the file
    assert config.training.beta1 == 0.4  # --set over the checkpoint
    assert config.seed == 5  # a flag over everything


def test_overlay_changes_neither_layer() -> None:
    below, above = {"training": {"batch_size": 2}}, {"training": {"epochs": 1}}
    assert overlay(below, above) == {"training": {"batch_size": 2, "epochs": 1}}
    assert (below, above) == ({"training": {"batch_size": 2}}, {"training": {"epochs": 1}})


def test_overrides_speak_yaml_and_the_last_of_one_key_wins() -> None:
    layer = parse_overrides(
        ["training.max_steps=null", "model.bias=false", "data.tokenizer=a=b", "seed=1", "seed=2"]
    )
    assert layer == {
        "training": {"max_steps": None},
        "model": {"bias": False},
        "data": {"tokenizer": "a=b"},
        "seed": 2,
    }


# What is refused, and how


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {num_layers: 3}", "config.yaml: unknown setting modle: did you mean model?"),
        ("sed: 3", "config.yaml: unknown setting sed: did you mean seed?"),
        (
            "training: {learning_rat: 1}",
            "config.yaml: unknown setting training.learning_rat: did you mean training.learning_rate?",
        ),
        (
            "model: {learning_rate: 1}",
            "config.yaml: model.learning_rate is not a setting here; write it as training.learning_rate",
        ),
        (
            "training: {num_workers: 2}",
            "config.yaml: training.num_workers is not a setting here; write it as data.num_workers",
        ),
        ("training: {device: cpu}", "config.yaml: training.device is not a setting here; write it as device"),
        ("batch_size: 4", "config.yaml: batch_size is not a setting here; write it as training.batch_size"),
        (
            "training.batch_size: 4",
            "config.yaml: training.batch_size: write it as batch_size in the section training",
        ),
        (
            "tokenizer: {name: gpt2}",
            "config.yaml: tokenizer is not a setting here; write it as data.tokenizer",
        ),
        ("training: {lr: 1}", "config.yaml: unknown setting training.lr: it is training.learning_rate here"),
        ("n_layer: 3", "config.yaml: unknown setting n_layer: it is model.num_layers here"),
        ("zzz: 1", "config.yaml: unknown setting zzz: docs/CONFIG.md lists every setting"),
        ("seed: 1\nmodel: {bias: true}\nseed: 2", "config.yaml line 3: key 'seed' is given twice"),
        ("training:\n  epochs: 1\n  epochs: 2", "config.yaml line 3: key 'epochs' is given twice"),
        (
            "training: {keep_checkpoints: 2}\ncheckpoint: {keep_checkpoints: 3}",
            "config.yaml: keep_checkpoints is given twice, as 2 and 3",
        ),
        ("model: 12", "config.yaml: model: is a section with keys of its own, not 12"),
        ("- model", "config.yaml: must contain sections such as `model:`; its content is of type list"),
        ("model: {", "config.yaml line 1: expected the node content, but found '<stream end>'"),
        ("training: {batch_size: -5}", "training.batch_size: -5: must be greater than or equal to 1"),
        ("training: {micro_batch_size: 0}", "training.micro_batch_size: 0: must be at least 1, or auto"),
        ("training: {batch_size: 2.5}", "training.batch_size: 2.5: must be a whole number"),
        ("training: {batch_size: yes}", "training.batch_size: True: must be a number, not true/false"),
        ("training: {learning_rate: true}", "training.learning_rate: True: must be a number, not true/false"),
        ("training: {learning_rate: fast}", "training.learning_rate: 'fast': must be a number"),
        ("training: {learning_rate: 0}", "training.learning_rate: 0: must be greater than 0"),
        ("training: {learning_rate: .inf}", "training.learning_rate: inf: must be a finite number"),
        ("training: {max_steps: 1e400}", "training.max_steps: '1e400': must be a whole number"),
        ("model: {dropout: 1}", "model.dropout: 1: must be less than 1"),
        ("model: {num_layers: 1e9}", "model.num_layers: 1000000000: must be less than or equal to 10000"),
        ("device: gpu", "device: 'gpu': must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
        (
            "model: {hidden_size: 770, num_heads: 12}",
            "model: hidden_size 770 is not divisible by num_heads 12: use hidden_size 768 or 792, "
            "or a num_heads that divides 770",
        ),
        (
            "model: {hidden_size: 5, num_heads: 12}",
            "model: hidden_size 5 is not divisible by num_heads 12: use hidden_size 24, or a num_heads that divides 5",
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path) == message


def test_all_mistakes_of_a_file_are_reported_together(tmp_path: Path) -> None:
    message = refusal("training: {batch_size: 0}\nmodel: {dropout: 2}", tmp_path)
    assert "model.dropout: 2" in message
    assert "training.batch_size: 0" in message


def test_every_layer_is_checked_alike() -> None:
    with pytest.raises(AtlasError, match=r"^training\.batch_size: -5: must be greater"):
        resolve(parse_overrides(["training.batch_size=-5"]))
    with pytest.raises(
        AtlasError, match=r"^--set: unknown setting training\.bach_size: did you mean training\.batch_size"
    ):
        parse_overrides(["training.bach_size=5"])
    with pytest.raises(AtlasError, match=r"^--set batch_size: write it as section\.key=value$"):
        parse_overrides(["batch_size"])
    with pytest.raises(AtlasError, match=r"^training\.batch_size: 'x': must be a number$"):
        resolve(nested("training.batch_size", "x"))


def test_a_missing_or_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="no such config file"):
        read_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(AtlasError, match="cannot be read as a config file"):
        read_yaml(tmp_path)


def test_values_that_would_fill_the_memory_are_shown_in_brief(tmp_path: Path) -> None:
    message = refusal(f"seed: {[list(range(9))] * 1000}", tmp_path)
    assert message.startswith("seed: [")
    assert len(message) < 500
    levels = "\n".join(f"  - &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))
    message = refusal(f"seed:\n  - &l0 [0]\n{levels}", tmp_path)
    assert message.startswith("config.yaml line 3: aliases within anchors")


YAML_SIGNS = r"""
model training seed hidden_size batch_size : - [ ] { } , ? ! & * << | > # % @ ` ' " 1e5 .nan .inf yes null ~
!!int !!bool !!timestamp !!map !!set !!omap !!binary !!float 2020-99-99 &a *a --- ... 1:30 0x 0b 99999999999999999999
"""
YAML_PIECES = [*YAML_SIGNS.split(), "\n", "\t"]
PLAIN_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*fields(), "model", "training", "batch_size", ""]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(st.sampled_from(YAML_PIECES), max_size=14).map(lambda pieces: " ".join(pieces).encode()),
        PLAIN_VALUES.map(lambda value: yaml.safe_dump(value).encode()),
    )
)
@example(b"? !!set {a}\n: 1")
@example(b"seed: !!int ''")
@example(b"seed: !!bool x")
@example(b"seed: !!timestamp x")
@example(b"!!map [a]")
@example(b"<<: 3")
@example(b"seed: &a {b: *a}")
@example(b"seed: " + b"1" * 5000)
@example(b"[" * 5000)
def test_whatever_the_file_holds_it_is_a_config_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    try:
        config = resolve(read_yaml(path))
    except AtlasError as error:
        message = str(error)
    else:
        message = ""
        assert config == resolve(config.model_dump())
    assert "\n" not in message


# Settings are described, read, and complete


def test_every_setting_is_described() -> None:
    for key in fields():
        assert describe(key).endswith("."), key


def attributes(tree: ast.AST) -> set[tuple[str, str]]:
    """(last name of the owner, attribute) of every attribute that is read."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {(ast.unparse(node.value).rsplit(".", 1)[-1], node.attr) for node in nodes}


def test_every_setting_is_read_by_some_code() -> None:
    """As `config.training.x`, `training.x` or `config.x`, or through a property of its section: no dead knobs."""
    package = Path(atlas.__file__).parent
    outside = [path for path in package.rglob("*.py") if package / "config" not in path.parents]
    read = set().union(*(attributes(ast.parse(path.read_text(encoding="utf-8"))) for path in outside))
    own = [
        ast.parse((package / "config" / name).read_text(encoding="utf-8"))
        for name in ("config.py", "model.py")
    ]
    for function in itertools.chain(*map(ast.walk, own)):
        is_property = isinstance(function, ast.FunctionDef) and function.decorator_list
        if is_property and any(name == function.name for _, name in read):
            read |= {("config", name) for owner, name in attributes(function) if owner == "self"}
    unread = [
        key
        for key in fields()
        if not {("config", key.split(".")[-1]), tuple(f"config.{key}".split(".")[-2:])} & read
    ]
    assert unread == []


# The reference

DOCS = Path(__file__).parents[1] / "docs"


def test_reference_and_schema_are_current() -> None:
    remedy = "run python -m atlas.config.reference"
    assert (DOCS / "CONFIG.md").read_text(encoding="utf-8") == reference.page(), remedy
    assert json.loads((DOCS / "config.schema.json").read_text(encoding="utf-8")) == reference.schema(), remedy


def test_every_setting_is_in_the_reference() -> None:
    page = reference.page()
    for key in fields():
        assert f"| `{key.split('.')[-1]}` |" in page
        assert f"| {describe(key)} |" in page


@functools.cache
def schema() -> Any:
    import jsonschema

    return jsonschema.Draft7Validator(reference.schema())


@pytest.mark.parametrize(
    "text",
    [
        MY_CONFIG,
        *(preset_path(name).read_text(encoding="utf-8") for name in preset_names()),
        "",
        "training:\n  # nothing\n",
        "training: {max_steps: 1e5, learning_rate: 3e-4, micro_batch_size: 4, epochs: null}",
        "training: {max_steps: 100_000, learning_rate: .5, keep_checkpoints: 2, micro_batch_size: auto}",
        "{seed: 0, device: mps, model: {vocab_size: null, bias: off}}",
    ],
)
def test_schema_accepts_what_the_loader_accepts(text: str, tmp_path: Path) -> None:
    assert config_of(text, tmp_path)
    schema().validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "modle: {num_layers: 3}",
        "training: {learning_rat: 1}",
        "model: 3",
        "training: {batch_size: 0}",
        "training: {epochs: 0}",
        "training: {micro_batch_size: 0}",
        "training: {batch_size: true}",
        "training: {learning_rate: fast}",
        "model: {dropout: 1}",
        "device: gpu",
    ],
)
def test_schema_refuses_what_the_loader_refuses(text: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path)
    assert not schema().is_valid(yaml.safe_load(text))


# Presets


PARAMETERS = {
    "nano": 1_088_256,
    "modern-nano": 951_168,
    "tiny": 40_789_632,
    "modern": 123_552_768,
    "small": 124_439_808,
    "default": 354_823_168,
    "large": 498_545_920,
    "xlarge": 498_545_920,
    "ultra": 497_562_880,
}


def closed_formula(model: ModelConfig) -> int:
    """GPT-2 with tied embeddings and biases: tables, blocks of 12 C² + 13 C, and the last norm. Qwen3: a table or two,
    in each block attention, an MLP of three matrices, two norms and those of queries and keys."""
    C, L, V, T = model.hidden_size, model.num_layers, model.vocabulary, model.max_seq_len
    if model.position == "rope":
        M, D = -(-8 * C // 3 // 64) * 64, C // model.num_heads
        return (1 if model.tie_embeddings else 2) * V * C + L * (4 * C * C + 3 * C * M + 2 * C + 2 * D) + C
    return V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_the_parameters_they_promise(name: str) -> None:
    model = resolve(read_yaml(preset_path(name))).model
    if name.endswith("nano"):
        assert model.vocab_size is None
        model = model.model_copy(update={"vocab_size": 2048})
    with torch.device("meta"):
        counted = AtlasLM(model).num_parameters()
    assert counted == closed_formula(model)
    assert counted == PARAMETERS[name]


def test_presets_are_the_files_that_the_documentation_names() -> None:
    assert set(preset_names()) == set(PARAMETERS)
    for name in preset_names():
        text = preset_path(name).read_text(encoding="utf-8")
        assert text.startswith("# yaml-language-server: $schema=../docs/config.schema.json\n")
        assert find_config(name) == preset_path(name)
    shapes = {name: resolve(read_yaml(preset_path(name))) for name in preset_names()}
    assert shapes["xlarge"].model == shapes["large"].model
    assert shapes["ultra"].model.model_copy(update={"max_seq_len": 1024}) == shapes["large"].model
    assert [name for name in shapes if shapes[name].training.gradient_checkpointing] == ["xlarge", "ultra"]
    optimizers = [shapes[name].training.optimizer for name in ("large", "xlarge", "ultra")]
    assert optimizers == ["adamw", "muon", "adafactor"]


def test_a_config_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_config.yaml").write_text(MY_CONFIG, encoding="utf-8")
    assert find_config("my_config.yaml") == Path("my_config.yaml")
    for wanted, message in {
        "smal": "smal: no such preset; did you mean small?",
        "my_confg.yaml": "my_confg.yaml: no such config file; did you mean my_config.yaml?",
        "configs/default.yaml": "to use the preset, give its name: --config default",
        "qqq.yaml": "give a file, or a preset (nano, modern-nano, tiny, modern, small, default, large, xlarge, ultra)",
    }.items():
        with pytest.raises(AtlasError) as caught:
            find_config(wanted)
        assert message in str(caught.value).replace("\\", "/")


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_devices_are_named_as_pytorch_names_them(name: str) -> None:
    assert resolve({"device": name}).device == name


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert choose_device("cuda") == torch.device("cuda")
    assert current == []
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert current == [1]  # what memory and names are asked of
    with pytest.raises(AtlasError, match=r"cuda:2: does not exist; this machine has cuda:0, cuda:1"):
        choose_device("cuda:2")
    for wrong in ("cuda:", "cuda:x", "cpu:0", "gpu"):
        with pytest.raises(AtlasError, match="is not one of auto, cpu, cuda, cuda:N, mps"):
            choose_device(wrong)
