"""The official client, unmodified: against the embedded model, and against a backend that fails on request.

The embedded model's answers are poor, so nothing here looks at their text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.harness import Network, Node
from tests.harness.waiting import wait_until

pytest.importorskip("xllamacpp", reason="the extra `local` is not installed")

MODEL = "smollm2:135m"
MESSAGES = [openai.types.chat.ChatCompletionUserMessageParam(role="user", content="Name a colour.")]


@pytest.fixture(scope="module")
def real() -> Iterator[Network]:
    with Network(backend="builtin", executors=1) as network:
        yield network


@pytest.fixture(scope="module")
def scripted() -> Iterator[Network]:
    with Network(executors=1) as network:
        yield network


def client_of(node: Node) -> openai.OpenAI:
    # trust_env: a proxy of the machine's is not for loopback.
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{node.api}/v1", api_key="unused", max_retries=0, timeout=60, http_client=http)


@pytest.fixture(scope="module")
def client(real: Network) -> Iterator[openai.OpenAI]:
    with client_of(real.client) as client:
        yield client


@pytest.fixture(scope="module")
def scripted_client(scripted: Network) -> Iterator[openai.OpenAI]:
    with client_of(scripted.client) as client:
        yield client


# ---------------------------------------------------------------- a real model
def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == MODEL


def test_streamed_chat_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] in (
        ["length"],
        ["stop"],
    )
    (usage,) = [c.usage for c in chunks if c.usage is not None]
    assert 0 < usage.completion_tokens <= 8
    # The same question, not streamed, has the same answer: merging the chunks loses nothing.
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    assert whole.choices[0].message.content == text


def test_streamed_chat_without_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=6, temperature=0)
    assert answer.choices[0].text
    streamed = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == answer.choices[0].text


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["one", "two"])
    assert [one.index for one in answer.data] == [0, 1]
    sizes = {len(one.embedding) for one in answer.data}
    assert len(sizes) == 1
    assert sizes.pop() > 100
    assert all(isinstance(number, float) for number in answer.data[0].embedding[:5])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "lloom")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such-model")


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no/such-model", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.type == "invalid_request_error"


class BackendGauge:
    """What the embedded backend itself says of its work, asked behind everybody's back."""

    def __init__(self, network: Network) -> None:
        socket_path = network.executors[0].home / "run" / "model.sock"
        self._http = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket_path)), base_url="http://model")

    def working(self) -> int:
        for line in self._http.get("/metrics", timeout=20).text.splitlines():
            if line.startswith("llamacpp:requests_processing "):
                return int(float(line.split()[1]))
        raise AssertionError("the backend has no such metric")

    def __enter__(self) -> BackendGauge:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "unstreamed"])
def test_a_client_that_leaves_stops_the_backend(real: Network, streamed: bool) -> None:
    with BackendGauge(real) as gauge, client_of(real.client) as client:
        assert gauge.working() == 0
        # Nothing ends this but the client: the answer has no end of its own within the test's time.
        asked = {"max_tokens": 2000, "temperature": 0, "extra_body": {"ignore_eos": True}}
        if streamed:
            stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **asked)  # type: ignore[call-overload]
            for _, _ in zip(stream, range(3), strict=False):
                pass
            assert gauge.working() == 1
            left_at = time.monotonic()
            stream.close()
        else:
            left: list[float] = []

            def give_up() -> None:
                impatient = client.with_options(timeout=1.5)
                with pytest.raises(openai.APITimeoutError):
                    impatient.chat.completions.create(model=MODEL, messages=MESSAGES, **asked)  # type: ignore[call-overload]
                left.append(time.monotonic())

            asking = threading.Thread(target=give_up)
            asking.start()
            wait_until(lambda: gauge.working() == 1, "the backend to work", timeout_s=20)
            asking.join(20)
            (left_at,) = left
        wait_until(lambda: gauge.working() == 0, "the backend to stop")
        took_s = time.monotonic() - left_at
        print(f"stopped {took_s:.3f} s after the client had left")
        assert took_s < 1


# ---------------------------------------------------------------- a backend that fails on request
def test_an_answer_that_is_cut_is_an_error(scripted_client: openai.OpenAI) -> None:
    stream = scripted_client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "chunks=10 cut=4 delay_ms=5"}], stream=True
    )
    texts = []

    def read() -> None:
        for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
            assert chunk.choices[0].finish_reason is None

    with pytest.raises(openai.APIError, match="the backend failed"):
        read()
    # All that came before the cut has arrived.
    assert texts == [" w0", " w1", " w2", " w3"]


def test_an_unstreamed_answer_that_is_cut_is_an_error(scripted_client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        scripted_client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "chunks=10 cut=4"}]
        )
    assert caught.value.status_code == 502


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.InternalServerError),
        (403, openai.InternalServerError),
        (404, openai.InternalServerError),
        (409, openai.InternalServerError),
        (413, openai.APIStatusError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_a_backends_status_has_its_exception(
    scripted: Network, scripted_client: openai.OpenAI, status: int, error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        scripted_client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": f"status={status}"}]
        )
    print(f"{status}: {type(caught.value).__name__} {caught.value.status_code}")
    if status in (400, 413, 422):
        # These blame the request: they pass as the backend gave them.
        assert caught.value.status_code == status
        assert "scripted refusal" in caught.value.message
    else:
        # Not the application's fault: the 401 is about the executor's key, the 404 no word on the network's models.
        assert caught.value.status_code == (status if status in (429, 500, 503) else 502)
    assert scripted_client.models.retrieve("scripted").id == "scripted"


def test_a_body_that_cannot_be_used_is_a_bad_request(scripted_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        scripted_client.chat.completions.create(model="", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError):
        scripted_client.chat.completions.create(model="scripted", messages=MESSAGES, n=10**6)


def test_a_retry_is_the_clients_to_make_only_where_it_helps(scripted: Network) -> None:
    """Every executor was tried already, and ``x-should-retry: false`` says so: the client's own retries add nothing."""
    backend = scripted.backends[0]
    before = len(backend.requests())
    with client_of(scripted.client).with_options(max_retries=3) as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "status=500"}])
    assert len(backend.requests()) == before + 1


def test_the_asynchronous_client(scripted: Network) -> None:
    """It needs asyncio, which this suite does not run on: a thread of its own."""
    import asyncio  # noqa: TID251 - the client under test runs on it

    api = scripted.client.api

    async def ask() -> list[str | None]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{api}/v1", api_key="unused", http_client=http) as client:
            stream = await client.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": "chunks=3"}], stream=True
            )
            return [chunk.choices[0].delta.content async for chunk in stream]

    found: list[list[str | None]] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(ask())))
    thread.start()
    thread.join(30)
    assert found == [[" w0", " w1", " w2", None]]
