"""Digests of a conversation's beginning, and who is remembered for it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from lloom_sidecar.client.affinity import (
    BLOCK_BYTES,
    MAX_HASHED_BYTES,
    MAX_LINKS,
    Conversation,
    Conversations,
    conversation_of,
)
from lloom_sidecar.peers.selection import Wanted
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.router_bench import CALL, peer

SYSTEM = {"role": "system", "content": "be kind"}
A, B = peer(1), peer(2)


def of(body: Any, **changes: Any) -> Conversation:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return conversation_of(replace(CALL, body=content, **changes))


def chat(*said: str, system: bool = True) -> Conversation:
    messages = [*([SYSTEM] if system else []), *({"role": "user", "content": one} for one in said)]
    return of({"model": "m", "messages": messages})


@pytest.mark.parametrize("system", [True, False])
def test_a_follow_up_continues_the_chain_and_has_the_same_key(system: bool) -> None:
    first, second = chat("hi", system=system), chat("hi", "yes", "and", system=system)
    assert second.chain[: len(first.chain)] == first.chain
    assert (first.key, len(second.chain)) == (second.key, 3 + system)
    assert first.key == first.chain[-1]


def test_what_differs_in_the_beginning_differs_in_all() -> None:
    ones = [
        chat("hi"),
        chat("ho"),
        chat("hi", system=False),
        of({"messages": [SYSTEM, {"role": "user", "content": "hi"}]}, model="n"),
        of({"messages": [SYSTEM, {"role": "user", "content": "hi"}]}, operation=pb.OPERATION_COMPLETIONS),
    ]
    assert len({one.key for one in ones}) == len(ones)
    assert chat("hi", "a").key == chat("hi", "b").key
    assert chat("hi", "a").chain[-1] != chat("hi", "b").chain[-1]


def test_one_system_prompt_does_not_bring_all_to_one_executor() -> None:
    book = Conversations()
    book.answered(chat("hi"), A)
    assert book.prefer(chat("ho"), Wanted("m")).warm is None


def test_a_plain_prompt_is_cut_into_blocks() -> None:
    prompt = "x" * BLOCK_BYTES * 3
    one, two = of({"prompt": prompt + "a"}), of({"prompt": prompt + "b" * BLOCK_BYTES})
    assert (len(one.chain), len(two.chain)) == (3, 4)
    assert one.chain == two.chain[:3]
    assert one.key == two.key == one.chain[0]
    assert of({"prompt": "short"}).key is None


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", {}, {"messages": []}, {"messages": [1]}, {"messages": "x"}, {"input": "x"}]
)
def test_what_is_no_conversation_has_no_key(body: Any) -> None:
    found = of(body)
    assert (found.chain, found.key) == ([], None)
    wanted = Wanted("m")
    book = Conversations()
    assert book.prefer(found, wanted) is wanted
    book.answered(found, A)
    assert len(book) == 0


def test_hashing_is_bounded() -> None:
    long = of({"messages": [{"role": "user", "content": "x" * (MAX_HASHED_BYTES // 4)}] * 10})
    assert len(long.chain) == 3
    many = of({"messages": [{"role": "user", "content": "x"}] * (2 * MAX_LINKS)})
    assert len(many.chain) == MAX_LINKS
    huge = of({"messages": [{"role": "user", "content": "x" * (2 * MAX_HASHED_BYTES)}]})
    assert huge.key is None


def test_the_longest_known_beginning_decides() -> None:
    book = Conversations()
    book.answered(chat("hi"), A)
    book.answered(chat("hi", "yes", "and"), B)
    assert book.prefer(chat("hi", "yes", "and", "so", "what"), Wanted("m")).warm == B
    assert book.prefer(chat("hi", "no"), Wanted("m")).warm == A
    assert book.prefer(chat("hi"), Wanted("m")).affinity_key == chat("hi").key


def test_the_ones_used_longest_ago_are_forgotten() -> None:
    book = Conversations(limit=2)
    for said in ("a", "b", "a", "c"):
        book.answered(chat(said), A)
    assert len(book) == 2
    assert [book.prefer(chat(said), Wanted("m")).warm for said in ("a", "b", "c")] == [A, None, A]


def test_the_cost_of_a_usual_body() -> None:
    """Guards the order of magnitude only: it is microseconds, and must not become milliseconds."""
    body = json.dumps({"messages": [SYSTEM, *[{"role": "user", "content": "word " * 100}] * 10]}).encode()
    call = replace(CALL, body=body)
    started = time.perf_counter()
    for _ in range(200):
        conversation_of(call)
    assert (time.perf_counter() - started) / 200 < 0.005
