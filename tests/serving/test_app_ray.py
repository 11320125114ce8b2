"""The whole product: the `openai` client, HTTP, Ray Serve, the engine and two stage processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam
from pydantic import BaseModel

from actors.request import GenerateRequest
from actors.stats import EngineStats
from sharding.batch import SamplingParams
from sharding.gguf.reader import GGUFFile
from tests.served import CONTEXT, Served
from tests.stages import local_engine, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is the capital of France?"}
]


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    """The client that everybody has, unchanged."""
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def pages_in_use(stats: EngineStats) -> int:
    """By the engine's books."""
    return stats.pages - stats.pages_free


def test_the_stages_are_two_processes_with_all_layers_between_them(served: Served) -> None:
    stages = served.deployment.stats().stages
    assert [stage.stage for stage in stages] == [0, 1]
    assert stages[0].layers[0] == 0
    assert stages[0].layers[1] == stages[1].layers[0]
    assert stages[1].layers[1] == 30


def test_a_chat_answer(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(
        model=served.model, messages=QUESTION, temperature=0, max_tokens=24
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI, served: Served) -> None:
    whole = client.chat.completions.create(
        model=served.model, messages=QUESTION, seed=5, max_tokens=24
    )
    stream = client.chat.completions.create(
        model=served.model, messages=QUESTION, seed=5, max_tokens=24, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_second_question_about_a_text_reads_only_the_question(
    client: openai.OpenAI, served: Served
) -> None:
    text = "In those days the ship lay in the harbour, and nobody asked whose it was. " * 20
    usages = []
    for question in ("Whose was the ship?", "Where did it lie?"):
        answer = client.completions.create(
            model=served.model, prompt=text + question, temperature=0, max_tokens=4
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        usages.append(
            (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens)
        )
    (_, first), (tokens, second) = usages
    assert first == 0
    assert tokens - 32 < (second or 0) < tokens


def test_metrics_tell_of_both_stages_and_of_what_was_asked(served: Served) -> None:
    body = {"prompt": "One two three", "max_tokens": 8, "ignore_eos": True}
    assert httpx.post(served.url + "/v1/completions", json=body).status_code == 200
    page = httpx.get(served.url + "/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert lines['longspan_engine_state{state="ready"}'] == "1.0"
    assert float(lines['longspan_requests_total{outcome="length"}']) >= 1
    assert float(lines["longspan_generated_tokens_total"]) >= 8
    assert float(lines['longspan_stage_busy_seconds_total{stage="1"}']) > 0
    assert 'layers="18-29"' in page


def test_an_answer_of_a_form_and_a_call_of_a_tool(client: openai.OpenAI, served: Served) -> None:
    class Capital(BaseModel):
        country: str
        city: str
        inhabitants: int

    parsed = client.chat.completions.parse(
        model=served.model, messages=QUESTION, response_format=Capital, temperature=0
    )
    capital = parsed.choices[0].message.parsed
    assert capital is not None and capital.city == "Paris"
    city: dict[str, object] = {"city": {"type": "string"}}
    schema: dict[str, object] = {"type": "object", "properties": city, "required": ["city"]}
    tool: ChatCompletionFunctionToolParam = {
        "type": "function",
        "function": {"name": "get_weather", "description": "Of a city.", "parameters": schema},
    }
    answer = client.chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_sixteen_streams_at_once_get_what_each_gets_alone(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model=served.model,
            prompt="Count: " + "one two three " * (1 + number % 5),
            temperature=0.8,
            seed=number,
            max_tokens=12 + number,
            stream=True,
        )
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def both() -> tuple[list[str], list[str]]:
        url = served.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(16)))
            return together[::5], [await ask(client, number) for number in range(0, 16, 5)]

    together, alone = asyncio.run(both())
    assert together == alone
    assert all(together)


def test_scores_choices_and_echo_through_all_layers(client: openai.OpenAI, served: Served) -> None:
    answer = client.completions.create(
        model=served.model, prompt="The sky is", max_tokens=3, n=2, echo=True, logprobs=2, seed=1
    )
    choices = answer.model_dump()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice in choices:
        assert choice["text"].startswith("The sky is")
        first, *rest = choice["logprobs"]["token_logprobs"]
        assert first is None, "nothing comes before the first token"
        assert len(rest) >= 3
        assert all(logprob <= 0 for logprob in rest)


def test_an_answer_may_be_larger_than_a_message_of_grpc(served: Served) -> None:
    """4 MiB by default: a long prompt's log-probabilities are more."""
    (word,) = httpx.post(
        served.url + "/tokenize", json={"prompt": " understanding", "add_special_tokens": False}
    ).json()["tokens"]
    count = (5 << 20) // len(" understanding")
    answer = httpx.post(served.url + "/detokenize", json={"tokens": [word] * count}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["prompt"] == " understanding" * count


def test_two_ray_stages_give_the_bits_of_one_stage_in_this_process(
    client: openai.OpenAI, served: Served, smollm2: GGUFFile
) -> None:
    """Log-probabilities that were computed in two processes and sent as JSON are equal, not
    close."""
    prompt = list(range(1000, 1040))
    answer = client.completions.create(
        model=served.model, prompt=prompt, temperature=0, max_tokens=8, logprobs=0
    )
    with closing(local_engine(smollm2, stages=1)) as engine:
        asked = SamplingParams(temperature=0.0, logprobs=0)
        events = list(engine.generate(GenerateRequest("one", prompt, 8, asked)))
    expected = [choice.logprob for event in events for choice in event.tokens]
    assert answer.model_dump()["choices"][0]["logprobs"]["token_logprobs"] == expected


def test_a_prompt_over_the_context_is_refused_with_both_numbers(
    client: openai.OpenAI, served: Served
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=served.model, prompt=[5] * (CONTEXT + 10), max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    assert str(CONTEXT) in str(refused.value)
    assert str(CONTEXT + 10) in str(refused.value)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        client.completions.create(model="gpt-5", prompt="x", max_tokens=1)


def test_a_client_that_hangs_up_frees_its_pages(served: Served) -> None:
    body = {"model": served.model, "prompt": "Tell me", "max_tokens": 900, "stream": True}
    body["ignore_eos"] = True
    with (
        httpx.Client(timeout=60) as http,
        http.stream("POST", served.url + "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        assert pages_in_use(served.deployment.stats()) > 0
    wait_until(lambda: pages_in_use(served.deployment.stats()) == 0, 10)
    # The books of both stages, after the step that carries the closing.
    wait_until(lambda: [s.pages_used for s in served.deployment.stats().stages] == [0, 0], 10)


def test_a_stage_that_stops_without_dying_is_replaced(served: Served) -> None:
    """A stopped process keeps its sockets open: only asking it tells. The request waits, and is
    answered by the stage that comes in its place."""
    body = {"model": served.model, "prompt": "Tell me", "max_tokens": 4, "temperature": 0}
    whole = httpx.post(served.url + "/v1/completions", json=body, timeout=60).json()
    stopped = served.deployment.pids()[1][1]
    os.kill(stopped, signal.SIGSTOP)
    again = httpx.post(served.url + "/v1/completions", json=body, timeout=60)
    assert again.status_code == 200
    assert again.json()["choices"] == whole["choices"]
    assert httpx.get(served.url + "/health/ready").status_code == 200
    wait_until(lambda: is_gone(stopped), 10)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, also if nobody noticed yet."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def stage_processes() -> set[int]:
    """Those that are a stage, or wait to become one; not what an earlier test stopped."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            runs = "State:\tT" not in (folder / "status").read_text()
            if runs and (folder / "cmdline").read_bytes().startswith(b"ray::StageActor"):
                found.add(int(folder.name))
    return found


def test_what_replaces_a_stage_waits_already(served: Served) -> None:
    """To start a process takes longer than all the rest of a repair."""
    _, stages = served.deployment.pids()
    wait_until(lambda: bool(stage_processes() - set(stages)), 60)
    waiting, epoch = stage_processes() - set(stages), served.deployment.stats().epoch
    os.kill(stages[1], signal.SIGKILL)
    wait_until(lambda: served.deployment.stats().epoch > epoch, 60)
    kept, replaced = served.deployment.pids()[1]
    assert kept == stages[0]
    assert replaced in waiting


def sse_lines(response: httpx.Response) -> Iterator[str]:
    """A stream's data, without its comments."""
    lines = (line for line in response.iter_lines() if line.startswith("data: "))
    return (line.removeprefix("data: ") for line in lines)


WORDS = {"guided_regex": "([a-z]{2,9}, ){100}"}


@pytest.mark.parametrize(
    ("who", "form"), [("first stage", {}), ("last stage", WORDS), ("engine", WORDS)]
)
def test_a_killed_process_costs_its_users_nothing_but_time(
    served: Served, who: str, form: dict[str, str]
) -> None:
    """Their streams fall silent and go on, to the last token as if nothing had been, whether or not
    they must keep to a form."""
    engine, stages = served.deployment.pids()
    pid = {"first stage": stages[0], "last stage": stages[1], "engine": engine}[who]
    body = {"model": served.model, "prompt": "Tell me", "max_tokens": 150, "seed": 3}
    body |= {"ignore_eos": True, "repetition_penalty": 1.1, **form}
    whole = httpx.post(served.url + "/v1/completions", json=body, timeout=60).json()
    with (
        httpx.Client(timeout=60) as http,
        http.stream("POST", served.url + "/v1/completions", json=body | {"stream": True}) as told,
    ):
        lines = sse_lines(told)
        pieces = [next(lines)]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: http.get(served.url + "/health").status_code == 503, 10)
        pieces += lines
    assert pieces.pop() == "[DONE]"
    text = "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces)
    assert text == whole["choices"][0]["text"]
    assert httpx.get(served.url + "/health/ready").status_code == 200
    wait_until(lambda: pages_in_use(served.deployment.stats()) == 0, 10)
