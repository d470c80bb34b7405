"""The OpenAPI document against the server: schemathesis generates requests and checks the responses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from atlas.serving.api.body import Body
from atlas.serving.api.requests import ChatRequest, CompletionRequest
from atlas.serving.dispatcher import ServerSettings
from tests.served import random_model, served_model


@pytest.mark.parametrize("item", [0.5, None, {}, [], [0.5], "", -1, {"type": "text", "text": 7}])
@pytest.mark.parametrize("field", ["prompt", "prompt[0]", "stop", "messages", "content", "logit_bias"])
def test_the_first_wrong_item_ends_the_validation(item: object, field: str) -> None:
    """Each error needs a kilobyte. An error for each item would let a body of 1 MiB stop the server for seconds."""
    items, message = [item] * 1000, {"role": "user", "content": "a"}
    model: type[Body] = ChatRequest if field in ("messages", "content") else CompletionRequest
    body = {
        "prompt": {"prompt": items},
        "prompt[0]": {"prompt": [items]},
        "stop": {"stop": items},
        "messages": {"messages": items},
        "content": {"messages": [{**message, "content": items}]},
        "logit_bias": {"logit_bias": items},
    }[field]
    if field == "stop" and item == "":  # an empty string stops nothing
        assert CompletionRequest.model_validate(body).stops == ()
        return
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    assert error.value.error_count() < 8


@pytest.mark.slow
def test_every_response_is_one_that_the_document_declares(tmp_path: Path) -> None:
    """No undeclared status, no body of another shape, no 5xx, no invalid request accepted. (The server may refuse what
    the document allows: the document cannot express dependent fields or the length of the context.)"""
    with served_model(random_model(chat=True), settings=ServerSettings(max_tokens=32)) as (address, engine):
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
        options = ["--phases=examples,coverage,fuzzing", "--max-examples=25", "--seed=1", "--no-color"]
        options.append("--exclude-checks=positive_data_acceptance")
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert engine.num_running == engine.num_waiting == 0
