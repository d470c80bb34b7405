"""Record the machine and its versions. Without a CUDA device, this part fails, and no other part runs."""

from __future__ import annotations

import platform

from gpu.figures import Figures, Setup

LIMIT = 25


def machine(setup: Setup, figures: Figures) -> None:
    import torch
    from results import version

    if setup.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "this PyTorch sees no CUDA device: check nvidia-smi, or try the script on a CPU with --rehearse"
        )
    versions = {name: version(name) for name in ("torch", "triton", "numpy", "transformers")}
    gpu = {}
    if setup.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "free_bytes": free,
            "total_bytes": total,
            "cuda": torch.version.cuda,
        }
    figures.add("machine", **gpu, **versions, python=platform.python_version(), cores=torch.get_num_threads())


JOBS = {"machine": machine}
