"""Evaluate a model on tasks of lm-eval. You name a task of lm-eval, or a YAML file."""

from __future__ import annotations

import io
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.errors import AtlasError, did_you_mean
from atlas.inference.load import LoadedModel

if TYPE_CHECKING:
    from atlas.inference.harness import Track

_RESAMPLES = 1000
"""The number of bootstrap samples for the standard error of a metric that is not a mean. With this number, about two
digits of the standard error are correct."""

_DATA = (
    "lm-eval's own tasks download their data from huggingface.co; "
    "in your own YAML file, name the data under dataset_kwargs: data_files"
)
_TASK = "fix the file, name the folder of a group, or choose another task"


@dataclass(frozen=True)
class Score:
    """A metric of a task: the value, the standard error (None if lm-eval reports none), and the numbers of examples and
    of few-shot examples."""

    task: str
    metric: str
    value: float
    error: float | None
    examples: int
    shots: int


def evaluate_tasks(
    loaded: LoadedModel,
    names: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    *,
    batch_size: int = 8,
    track: Track = iter,
) -> list[Score]:
    """Return the scores of a model on tasks. `names` are lm-eval's names of tasks, YAML files, or folders of YAML
    files.

    `limit` is the largest number of examples of each task. `num_fewshot` replaces each task's number of few-shot
    examples. `track` may draw a progress bar while it iterates over the batches. Raises `AtlasError` if lm-eval is not
    installed, or if lm-eval does not know a task or cannot load a task.
    """
    try:
        from lm_eval import defaults, evaluator
    except ImportError:
        raise AtlasError('--tasks: needs lm-eval: pip install "atlas-llm[eval]"') from None
    from atlas.inference.harness import HarnessModel

    model = HarnessModel(loaded, batch_size=batch_size, track=track)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise lm-eval starts a process per core
    with _quietly():
        # With the seeds of lm-eval's own command, the questions and the few-shot examples are the same as in that
        # command.
        random.seed(defaults.DEFAULT_RANDOM_SEED)
        np.random.seed(defaults.DEFAULT_OTHER_SEED)
        tasks = _load(names)
        for name, task in tasks["tasks"].items():
            _prepare(name, task, num_fewshot)
            task.set_fewshot_seed(defaults.DEFAULT_OTHER_SEED)
        results = evaluator.evaluate(
            lm=model, task_dict=tasks, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False
        )
    return list(_scores(results))


@contextmanager
def _quietly() -> Iterator[None]:
    """A context that hides lm-eval's warnings. It also hides lm-eval's progress bars unless standard error is a
    terminal."""
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        yield


def _load(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Load the tasks and groups that `names` lists. Return them in the form that lm-eval's `evaluate` takes."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise even local files are reported to a server
    # lm-eval's own 14,000 tasks are included only if a name is not a path, since reading their files takes seconds.
    manager = TaskManager(include_defaults=not all(map(os.path.exists, names)))
    merged: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for name in names:
        if Path(name).is_dir():
            source = TaskManager(include_path=name, include_defaults=False)
            wanted = [*source.all_groups, *source.all_subtasks]
            if not wanted:
                raise AtlasError(f"--tasks {name}: contains no task; name a folder of lm-eval's YAML files")
        elif Path(name).is_file() or name in manager.all_tasks:
            source, wanted = manager, [name]
        else:
            hint = did_you_mean(name, manager.all_tasks, "`lm-eval ls tasks` lists them")
            raise AtlasError(f"--tasks {name}: is neither a task of lm-eval nor an existing file; {hint}")
        try:
            for part in wanted:
                if not any(part in entries for entries in merged.values()):  # a loaded group may contain it
                    found = source.load(part)
                    for kind, entries in merged.items():
                        entries.update(found.get(kind, {}))
        except Exception as error:  # a YAML file, and code that it names, can raise anything
            what, remedy = ("its data ", _DATA) if isinstance(error, OSError) else ("", _TASK)
            reason = f"{type(error).__name__}: {error}"
            raise AtlasError(f"--tasks {name}: {what}cannot be loaded ({reason}); {remedy}") from None
    return merged


def _prepare(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the number of few-shot examples of a task. Raises `AtlasError` if Atlas does not support the task."""
    refused = {
        "UNSAFE_CODE": "runs code that the model generates",
        "MULTIMODAL": "shows images or plays sounds",
    }
    for flag, reason in refused.items():
        if getattr(task, flag, False):
            raise AtlasError(f"--tasks {name}: {reason}, which Atlas does not support; choose another task")
    if (
        num_fewshot is not None and task.get_config("num_fewshot") != 0
    ):  # 0: the task does not allow few-shot examples
        task.set_config("num_fewshot", num_fewshot)


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the scores in lm-eval's results, whose keys are `metric,filter` and `metric_stderr,filter`."""
    for task, entries in results["results"].items():
        for key, value in entries.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = entries.get(f"{metric}_stderr,{kind}")
                yield Score(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    value=float(value),
                    error=float(error) if isinstance(error, float) else None,
                    examples=entries["sample_len"],
                    shots=results["n-shot"].get(task) or 0,
                )
