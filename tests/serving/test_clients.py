"""Clients of OpenAI's API, unchanged except for their base URL. A client that is not installed is skipped.

`docs/CONTRIBUTING.md` has the commands that install the clients. The model is random: what it says has no meaning, but
JSON and calls of functions must be valid.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from atlas.inference.harness import HarnessModel
from atlas.inference.load import LoadedModel
from tests.served import random_model, served_model
from tests.serving.test_serving import post

QUESTION = "Where does the cat live?"
TALK = [{"role": "user", "content": QUESTION}]


class Place(BaseModel):
    """A place."""

    city: Literal["Oslo", "Rome"]
    size: int = Field(ge=1, le=9)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": Place.model_json_schema(),
    },
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(chat=True, max_seq_len=4096)


@pytest.fixture(scope="module")
def address(loaded: LoadedModel) -> Iterator[str]:
    with served_model(loaded) as (address, _):
        yield address


@pytest.fixture(scope="module")
def expected(address: str) -> str:
    """The answer to `TALK` of at most 12 tokens at temperature 0."""
    body = {"messages": TALK, "max_tokens": 12, "temperature": 0}
    return post(address, body, "/v1/chat/completions")[1]["choices"][0]["message"]["content"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients read these variables, and some send statistics."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def test_litellm(address: str, expected: str) -> None:
    litellm = pytest.importorskip("litellm")
    params = {"model": "openai/random", "api_base": f"{address}/v1", "messages": TALK}
    answer = litellm.completion(**params, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected
    chunks = litellm.completion(**params, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    answer = litellm.completion(**params, tools=[WEATHER], tool_choice="required")
    Place.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)
    vectors = litellm.embedding(model="openai/random", api_base=f"{address}/v1", input=["a", "b"])
    assert [len(each["embedding"]) for each in vectors.data] == [32, 32]


def test_langchain(address: str, expected: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(base_url=f"{address}/v1", model="random", temperature=0)
    assert chat.bind(max_tokens=12).invoke(QUESTION).content == expected
    assert "".join(chunk.content for chunk in chat.bind(max_tokens=12).stream(QUESTION)) == expected
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Place, method=method).invoke(QUESTION), Place)
    called = chat.bind_tools([Place], tool_choice="any").invoke(QUESTION)
    Place.model_validate(called.tool_calls[0]["args"])
    responses = langchain.ChatOpenAI(
        base_url=f"{address}/v1", model="random", temperature=0, use_responses_api=True
    )
    assert responses.bind(max_tokens=12).invoke(QUESTION).content[0]["text"] == expected
    embeddings = langchain.OpenAIEmbeddings(
        base_url=f"{address}/v1", model="random", check_embedding_ctx_length=False
    )
    assert [len(each) for each in embeddings.embed_documents(["a", "b"])] == [32, 32]


def test_llama_index(address: str, expected: str) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage

    model = like.OpenAILike(
        model="random",
        api_base=f"{address}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=12,
    )
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert model.chat(messages).message.content == expected
    assert "".join(chunk.delta for chunk in model.stream_chat(messages)) == expected


def test_pydantic_ai(address: str, expected: str) -> None:
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{address}/v1", api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("random", provider=provider)
        answer = Agent(model, model_settings={"temperature": 0, "max_tokens": 12}).run_sync(QUESTION)
        assert answer.output == expected
        assert isinstance(Agent(model, output_type=Place).run_sync(QUESTION).output, Place)
        assert isinstance(Agent(model, output_type=NativeOutput(Place)).run_sync(QUESTION).output, Place)


def test_instructor(address: str) -> None:
    instructor = pytest.importorskip("instructor")
    import openai

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{address}/v1"), mode=mode)
        answer = client.chat.completions.create(
            model="random", messages=TALK, response_model=Place, max_tokens=200
        )
        assert isinstance(answer, Place)


def test_openai_agents(address: str, expected: str) -> None:
    """The default of this client is the Responses API."""
    agents = pytest.importorskip("agents")
    import openai

    client = openai.AsyncOpenAI(base_url=f"{address}/v1")
    called: list[str] = []

    @agents.function_tool
    def weather(city: Literal["Oslo", "Rome"]) -> str:
        """The weather in a city."""
        called.append(city)
        return "Rain."

    async def ask(model: object, settings: object, **options: object) -> str:
        typed = agents.Agent(name="a", model=model, output_type=Place)
        assert isinstance((await agents.Runner.run(typed, QUESTION)).final_output, Place)
        agent = agents.Agent(name="a", model=model, tools=[weather], model_settings=settings, **options)
        return (await agents.Runner.run(agent, QUESTION)).final_output

    async def all_models() -> None:
        chat = agents.OpenAIChatCompletionsModel(model="random", openai_client=client)
        short = agents.ModelSettings(temperature=0, max_tokens=12)
        agent = agents.Agent(name="a", model=chat, model_settings=short)
        assert (await agents.Runner.run(agent, QUESTION)).final_output == expected
        must = agents.ModelSettings(temperature=0, max_tokens=60, tool_choice="required")
        assert len(await ask(chat, must)) > 5  # the answer after the result of the call
        # An answer that reaches its limit is an error in this client, so the call's result is the end here.
        responses = agents.OpenAIResponsesModel(model="random", openai_client=client)
        assert await ask(responses, must, tool_use_behavior="stop_on_first_tool") == "Rain."

    asyncio.run(all_models())
    assert [city in ("Oslo", "Rome") for city in called] == [True, True]


def test_llm(address: str, expected: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `llm` (https://llm.datasette.io), with the file that its documentation describes."""
    pytest.importorskip("llm")
    from click.testing import CliRunner
    from llm.cli import cli

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    settings = {
        "model_id": "atlas",
        "model_name": "random",
        "api_base": f"{address}/v1",
        "supports_schema": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([settings]))
    options = ["-m", "atlas", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    for more in ([], ["--no-stream"]):
        done = CliRunner().invoke(cli, [QUESTION, *options, *more])
        assert done.output.strip() == expected.strip()
    schema = json.dumps(Place.model_json_schema())
    done = CliRunner().invoke(cli, [QUESTION, "-m", "atlas", "--schema", schema])
    Place.model_validate_json(done.output)


def test_lm_eval(loaded: LoadedModel, address: str, expected: str) -> None:
    """`--model local-completions` scores texts, with the server's tokenizer; `local-chat-completions` answers."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    pairs = [
        ("The river", " runs past the old mill"),
        ("", "The river"),
        ("naïve 漢", "字 🙂"),
        ("A", " boat"),
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    client = LocalCompletionsAPI(base_url=f"{address}/v1/completions", model="random", batch_size=2)
    ours = HarnessModel(loaded, batch_size=1).loglikelihood(requests)
    told = client.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in told] == pytest.approx([value for value, _ in ours], abs=1e-3)
    assert [greedy for _, greedy in told] == [greedy for _, greedy in ours]
    chat = LocalChatCompletion(base_url=f"{address}/v1/chat/completions", model="random")
    talk = JsonChatStr(json.dumps(TALK))
    options = {"until": [], "max_gen_toks": 12, "temperature": 0}
    assert chat.generate_until([Instance("generate_until", {}, (talk, options), 0)], disable_tqdm=True) == [
        expected
    ]


NODE = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[1] + "/v1", apiKey: "none" });
const messages = [{ role: "user", content: process.argv[2] }];
const short = { model: "random", max_tokens: 12, temperature: 0 };
(async () => {
  const chat = (await client.chat.completions.create({ ...short, messages })).choices[0].message.content;
  let streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...short, messages, stream: true })) {
    streamed += chunk.choices[0].delta.content ?? "";
  }
  const limit = { max_tokens: undefined, max_output_tokens: 12 };
  const response = await client.responses.create({ ...short, ...limit, input: messages });
  const text = (await client.completions.create({ ...short, prompt: "The river" })).choices[0].text;
  const tools = [JSON.parse(process.argv[3])];
  const called = await client.chat.completions.create({ model: "random", messages, tools, tool_choice: "required" });
  const vector = (await client.embeddings.create({ model: "random", input: "a" })).data[0].embedding;
  const call = called.choices[0].message.tool_calls[0].function.arguments;
  console.log(JSON.stringify({ chat, streamed, response: response.output_text, text, call, size: vector.length }));
})();
"""


def test_openai_node(address: str, expected: str) -> None:
    node = shutil.which("node")
    if (
        node is None
        or subprocess.run([node, "-e", 'require.resolve("openai")'], capture_output=True).returncode
    ):
        pytest.skip("node or its package openai is not installed")
    command = [node, "-e", NODE, address, QUESTION, json.dumps(WEATHER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["chat"] == told["streamed"] == told["response"] == expected
    body = {"prompt": "The river", "max_tokens": 12, "temperature": 0}
    assert told["text"] == post(address, body)[1]["choices"][0]["text"]
    Place.model_validate_json(told["call"])
    assert told["size"] == 32
