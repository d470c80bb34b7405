"""How much memory loading needs, measured in a separate process, in multiples of the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atlas.inference.load import load_model
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.validate import read_plain
from tests.runs import layer, same_bits, trained

REPOSITORY = Path(__file__).parents[3]

MEASURE = """
import json, sys
from pathlib import Path
import torch

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def measured(work, warm_up):
    "Bytes above the start: the most while `work` ran, and what is left while its result is held."
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status("VmRSS")
    held = work()
    return status("VmHWM") - before, status("VmRSS") - before

def trainer(config):
    import yaml
    from atlas.training.launch import start_run
    from atlas.training.resume import Request, choose_start
    return start_run(choose_start(Request(yaml.safe_load(Path(config).read_text()), resume="auto")))

def model(checkpoint):
    from atlas.inference import load
    load._LARGE = 0
    return load.load_model(checkpoint, tokenizer="tests.toy:tokenizer")

if __name__ == "__main__":
    small, large = sys.argv[2:]
    work = globals()[sys.argv[1]]
    print(json.dumps(measured(lambda: work(large), lambda: work(small))))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs: `small`, for warming up, and `large`, with 11 million parameters."""
    import yaml

    folder = tmp_path_factory.mktemp("loading")
    (folder / "text.txt").write_text("Some words of a text. " * 300, encoding="utf-8")
    for name, size in (("small", 16), ("large", 480)):
        sizes = {"model__hidden_size": size, "model__num_layers": 4, "model__max_seq_len": 8}
        explicit = layer(
            folder / name, folder / "text.txt", **sizes, training__max_steps=2, training__batch_size=1
        )
        trained(explicit)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(explicit), encoding="utf-8")
    return folder


def measure(work: str, folder: Path, name: str) -> tuple[float, float]:
    """The peak and what stays, in multiples of the large model's weights."""
    small, large = (folder / name.format(size) for size in ("small", "large"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, work, small, large],
        # Freed memory is returned immediately, so that what remains is what is held.
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    weights = load_checkpoint(folder / "large" / "atlas_step_2.pt")["model_state_dict"]
    one = sum(tensor.nbytes for tensor in weights.values())
    assert one > 40e6
    peak, left = json.loads(done.stdout)
    return peak / one, left / one


linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="measured by means of Linux's /proc"
)


@linux
def test_inference_holds_the_weights_once_and_never_reads_the_optimizer(runs: Path) -> None:
    peak, left = measure("model", runs, "{}/atlas_step_2.pt")
    assert 0.9 < left < 1.3
    assert peak < 1.5


@pytest.mark.slow
@linux
def test_resuming_peaks_at_what_training_holds_and_one_copy(runs: Path) -> None:
    """Training holds weights and two moments, 3 times the weights. The peak is that plus a copy of the weights."""
    peak, left = measure("trainer", runs, "{}.yaml")
    assert 2.9 < left < 3.4
    assert peak < 4.5


def test_keys_that_are_left_out_are_not_there(runs: Path) -> None:
    path = runs / "small" / "atlas_step_2.pt"
    weights = load_checkpoint(path)["model_state_dict"]
    part = read_plain(path, remedy="", without=("optimizer_state_dict",))
    assert "optimizer_state_dict" not in part
    assert same_bits(part["model_state_dict"], weights)


def test_a_loaded_model_can_be_trained_and_has_its_own_tensors(runs: Path) -> None:
    """Its weights are the file's tensors: equal, fp32, contiguous, none on the meta device, none shared."""
    loaded = load_model(runs / "small" / "atlas_step_2.pt", tokenizer="tests.toy:tokenizer")
    saved = load_checkpoint(loaded.path)["model_state_dict"]
    tensors = loaded.model.state_dict()
    assert tensors.keys() == saved.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved[name])
        assert (tensor.dtype, tensor.device.type, tensor.is_contiguous()) == (torch.float32, "cpu", True)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())
    loss = loaded.model(torch.zeros(1, 4, dtype=torch.long)).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.model.parameters())
