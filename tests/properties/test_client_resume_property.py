"""However often and wherever an answer is cut: the application gets the text that it would have got without."""

from __future__ import annotations

import itertools
import json
from typing import Any, cast

from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from lloom_sidecar.client.part import Part, Progress
from lloom_sidecar.client.resume import MAX_RESUMPTIONS, ResumedAnswer
from lloom_sidecar.errors import StreamLostError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange
from lloom_sidecar.peers.selection import Wanted
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.fake_model import first_stop, serve

LETTERS = 'ab"é\n'
DIGEST = b"d" * 32


class FakeSent:
    checkpoint = None


class FakeExchange:
    sent = FakeSent()

    def __init__(self, number: int) -> None:
        self.peer = PeerId.from_ed25519(bytes([number]) * 32)


def an_exchange(number: int) -> Exchange:
    return cast("Exchange", FakeExchange(number))


def a_call(operation: int, document: dict[str, Any]) -> Call:
    body = json.dumps({"model": "m", "stream": True, **document}).encode()
    return Call(bytes(16), operation, "m", body, 1000, idempotency_key=b"key")


class Shown:
    """What the application made of the bytes that it got."""

    def __init__(self, data: bytes) -> None:
        assert data.endswith(b"\n\n")
        self.text = ""
        self.finishes: list[str] = []
        self.roles: list[int] = []
        self.tops: set[tuple[Any, ...]] = set()
        self.usage: dict[str, int] | None = None
        self.dones = 0
        for number, one in enumerate(data.decode().split("\n\n")[:-1]):
            assert one.startswith("data: "), one
            if one == "data: [DONE]":
                self.dones += 1
                continue
            assert not self.dones
            chunk = json.loads(one[6:])
            self.tops.add(tuple(chunk[name] for name in ("id", "created", "model", "object")))
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                assert not self.finishes
                delta = choice.get("delta", {})
                self.text += delta.get("content") or choice.get("text") or ""
                if "role" in delta:
                    self.roles.append(number)
                if choice["finish_reason"]:
                    self.finishes.append(choice["finish_reason"])


def pieces_of(data: st.DataObject, whole: bytes) -> list[bytes]:
    places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    bounds = [0, *places, len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(bounds)]


def answered(
    data: st.DataObject, operation: int, document: dict[str, Any], tokens: list[str], stop_at: int | None
) -> tuple[bytes, int]:
    """(bytes that the application got, number of cuts)."""
    answer = ResumedAnswer(a_call(operation, document), Wanted("m"))
    out = b""
    cuts = 0
    while True:
        events: list[bytes] = []
        if stop_at is not None and cuts < MAX_RESUMPTIONS and data.draw(st.booleans(), label="shows all"):
            events = serve(tokens, answer.call.body, number=cuts, show_until=stop_at)
        is_cut = bool(events) or (cuts < MAX_RESUMPTIONS and data.draw(st.booleans(), label="cut"))
        events = events or serve(tokens, answer.call.body, number=cuts)
        exchange = an_exchange(cuts + 1)
        part = answer.begin_part(exchange, DIGEST)
        if is_cut:
            whole = b"".join(events)
            whole = whole[: data.draw(st.integers(len(events[0]) if not cuts else 0, len(whole)), label="at")]
            for piece in pieces_of(data, whole):
                out += part.feed(piece)
                if part.is_whole:
                    return out + part.release(), cuts
            if not out:
                continue  # the application has nothing: another executor begins anew, and nothing is resumed
            cuts += 1
            ending = answer.lose(StreamLostError("cut"), exchange, 0, 10.0)
            if ending:
                return out + ending, cuts
            continue
        for piece in pieces_of(data, b"".join(events)):
            out += part.feed(piece)
            if part.is_whole:
                break
        return out + part.release(), cuts


@st.composite
def stop_strings(draw: st.DrawFn) -> list[str]:
    found = draw(st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3, unique=True))
    # One inside another is a matter of each server's taste: which of the two ended the answer?
    assume(not any(a != b and a in b for a in found for b in found))
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.sampled_from([pb.OPERATION_CHAT, pb.OPERATION_COMPLETIONS]),
    st.lists(st.text(LETTERS, min_size=1, max_size=3), min_size=1, max_size=20),
    stop_strings(),
)
def test_the_text_ends_as_uncut(data: st.DataObject, operation: int, tokens: list[str], stops: list[str]) -> None:
    document: dict[str, Any] = {"stop": stops}
    if operation == pb.OPERATION_CHAT:
        document["messages"] = [{"role": "user", "content": "Q:"}]
    else:
        document["prompt"] = "Q:"
    whole = "".join(tokens)
    end = first_stop(whole, stops)
    stop_at = None
    if end is not None:
        stop_at = min(e for e in range(1, len(whole) + 1) if any(whole[:e].endswith(stop) for stop in stops))
    got, cuts = answered(data, operation, document, tokens, stop_at)
    event(f"cuts: {cuts}, stopped: {end is not None}")
    shown = Shown(got)
    assert shown.text == whole[:end]
    assert (shown.finishes, shown.dones) == (["stop"], 1)
    assert shown.tops <= {("id-0", 0, "real-0", next(iter(shown.tops))[3])}
    assert shown.roles == ([0] if operation == pb.OPERATION_CHAT else [])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.text(LETTERS, min_size=1, max_size=3), min_size=1, max_size=20), st.integers(1, 25))
def test_tokens_are_limited_and_counted_as_uncut(data: st.DataObject, tokens: list[str], limit: int) -> None:
    document = {
        "messages": [{"role": "user", "content": "Q:"}],
        "max_tokens": limit,
        "stream_options": {"include_usage": True},
    }
    got, _ = answered(data, pb.OPERATION_CHAT, document, tokens, None)
    shown = Shown(got)
    assert shown.text == "".join(tokens[:limit])
    assert (len(shown.finishes), shown.dones) == (1, 1)
    assert shown.finishes == ["length"] or limit >= len(tokens)
    if shown.usage is not None:
        assert shown.usage["completion_tokens"] == min(limit, len(tokens))
        assert shown.usage["total_tokens"] == shown.usage["prompt_tokens"] + shown.usage["completion_tokens"]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=12), stop_strings())
def test_an_answer_that_is_not_cut_passes_in_full(data: st.DataObject, tokens: list[str], stops: list[str]) -> None:
    events = serve(tokens, a_call(pb.OPERATION_CHAT, {"messages": [{"role": "user"}]}).body)
    whole = b"".join(events)
    part = Part(pb.OPERATION_CHAT, tuple(stops), Progress())
    out = b"".join(part.feed(piece) for piece in pieces_of(data, whole)) + part.release()
    assert Shown(out).text == "".join(tokens)
    if not stops:
        assert out == whole


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"data: ", b"\n\n", b'{"choices":[{"delta":{', b"[DONE]"])))
def test_garbage_never_fails(pieces: list[bytes]) -> None:
    part = Part(pb.OPERATION_CHAT, ("ab",), Progress("xa", "a", 1, {"id": "i"}))
    out = b"".join([*map(part.feed, pieces), part.release()])
    assert isinstance(out, bytes)
    assert isinstance(part.progress.text, str)
