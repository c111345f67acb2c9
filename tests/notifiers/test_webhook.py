"""Webhooks that leave: signed, to the address that was judged, and never saying more than they must."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import standardwebhooks

from flowstead.errors import Fatal, TaskSignal, Transient
from flowstead.model.update import UpdateKind, UpdateStatus
from flowstead.notifiers import WebhookNotifier, verify_webhook
from tests.notifiers.stage import (
    NOW,
    OLD_SECRET,
    SECRET,
    Receiver,
    an_update,
    dribble,
    echo,
    endless,
    status,
    trusting_context,
    until_gone,
)

TELLTALE = [
    "s3same",
    "hooks?",
    "whsec_",
    SECRET.removeprefix("whsec_"),
    "hunter2",
    "Miller",
    "IBAN",
    "v1,",
]
"""Parts of what must not be told: the address's path and query, secrets, passwords, the body, signatures."""


def a_notifier(
    url: str, secrets: Sequence[str | bytes] = (SECRET,), **options: Any
) -> WebhookNotifier:
    return WebhookNotifier(url, secrets, **{"now": lambda: NOW, **options})


class Names:
    """A resolver that is told what to answer, the last answer for ever, and remembers what it was asked."""

    def __init__(self, *answers: list[str] | Exception) -> None:
        self.asked: list[tuple[str, int]] = []
        self._answers = list(answers)

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def failure(notifier: WebhookNotifier, **fields: Any) -> TaskSignal:
    with pytest.raises((Transient, Fatal)) as raised:
        await notifier.send(an_update(**fields))
    told = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    assert not [part for part in TELLTALE if part.lower() in told.lower()]
    assert str(raised.value).startswith("The webhook at http")
    assert str(raised.value).endswith(".")
    return raised.value


def silent_port() -> socket.socket:
    """A port that is taken, so that nobody else takes it, and does not listen."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken


# ---- what arrives ---------------------------------------------------------------------------------


async def test_an_update_arrives_as_one_signed_post() -> None:
    async with Receiver() as receiver:
        await a_notifier(receiver.url).send(an_update())

    (request,) = receiver.requests
    assert request.line == "POST /hooks?token=s3same HTTP/1.1"
    assert request.header("host") == f"127.0.0.1:{receiver.port}"
    assert request.header("content-type") == "application/json"
    assert request.header("connection") == "close"
    assert request.header("webhook-id") == "flow-1:done"
    assert request.header("webhook-timestamp") == str(NOW // 1000)
    assert verify_webhook(request.headers, request.body, [SECRET], now=NOW) == "flow-1:done"


async def test_the_library_of_the_specification_lets_it_in() -> None:
    async with Receiver() as receiver:
        await WebhookNotifier(receiver.url, [SECRET]).send(an_update())

    (request,) = receiver.requests
    told = standardwebhooks.Webhook(SECRET).verify(request.body, dict(request.headers))
    assert told["type"] == "flow.done"


async def test_the_body_says_what_happened_when_and_the_update_by_its_wire_names() -> None:
    async with Receiver() as receiver:
        await a_notifier(receiver.url).send(an_update(current_step="pay", bucket=None))

    told = json.loads(receiver.requests[0].body)
    happened = datetime.fromtimestamp((NOW - 5000) / 1000, UTC)
    assert told == {
        "type": "flow.done",
        "timestamp": happened.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": {
            "idempotencyKey": "flow-1:done",
            "kind": "done",
            "ownerKey": "agent:main",
            "flowId": "flow-1",
            "revision": 7,
            "flowStatus": "succeeded",
            "goal": "refund Mrs Miller",
            "currentStep": "pay",
            "text": "Mrs Miller has her money.",
            "data": {"iban": "DE02120300000000202051"},
            "requesterOrigin": {"channel": "slack", "thread": "17"},
            "createdAt": NOW - 5000,
        },
    }


@pytest.mark.parametrize("kind", UpdateKind)
async def test_the_type_names_the_kind_of_update(kind: UpdateKind) -> None:
    async with Receiver() as receiver:
        await a_notifier(receiver.url).send(an_update(kind=kind, items=[{"flowId": "flow-1"}]))

    told = json.loads(receiver.requests[0].body)
    assert (told["type"], told["data"]["items"]) == (f"flow.{kind}", [{"flowId": "flow-1"}])


async def test_every_attempt_has_the_same_id_and_body_and_a_timestamp_of_its_own() -> None:
    instants = iter([NOW, NOW + 90_000])
    later = {"status": UpdateStatus.PENDING, "attempt": 2, "due_at": NOW, "failure": "hunter2"}

    async with Receiver() as receiver:
        notifier = a_notifier(receiver.url, now=lambda: next(instants))
        await notifier.send(an_update(attempt=1))
        await notifier.send(an_update(**later))

    first, second = receiver.requests
    assert (first.body, first.header("webhook-id")) == (second.body, second.header("webhook-id"))
    assert int(second.header("webhook-timestamp")) - int(first.header("webhook-timestamp")) == 90
    assert first.header("webhook-signature") != second.header("webhook-signature")


async def test_while_secrets_are_exchanged_it_is_signed_with_each() -> None:
    async with Receiver() as receiver:
        await a_notifier(receiver.url, [SECRET, OLD_SECRET]).send(an_update())

    (request,) = receiver.requests
    assert len(request.header("webhook-signature").split(" ")) == 2
    for secret in (SECRET, OLD_SECRET):
        assert verify_webhook(request.headers, request.body, [secret], now=NOW)


async def test_a_key_with_a_line_break_adds_no_header() -> None:
    async with Receiver() as receiver:
        await a_notifier(receiver.url).send(an_update(idempotency_key="a\r\nX-Admin: yes"))

    (request,) = receiver.requests
    assert request.header("webhook-id").startswith("sha256_")
    assert "x-admin" not in [name.lower() for name, _ in request.headers]
    assert json.loads(request.body)["data"]["idempotencyKey"] == "a\r\nX-Admin: yes"


async def test_headers_of_the_host_arrive_beside_ours() -> None:
    async with Receiver() as receiver:
        notifier = a_notifier(
            receiver.url, headers={"Authorization": "Bearer hunter2", "user-agent": "host"}
        )
        await notifier.send(an_update())

    assert receiver.requests[0].header("authorization") == "Bearer hunter2"
    assert receiver.requests[0].header("user-agent") == "host"
    assert "hunter2" not in repr(notifier)
    assert "s3same" not in repr(notifier)


# ---- what is answered -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
async def test_any_status_of_success_means_delivered(code: int) -> None:
    async with Receiver(status(code)) as receiver:
        await a_notifier(receiver.url).send(an_update())

    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "code", [300, 400, 401, 403, 404, 408, 409, 413, 422, 425, 429, 500, 502, 503, 504, 599]
)
async def test_any_other_status_is_tried_again(code: int) -> None:
    async with Receiver(status(code)) as receiver:
        failed = await failure(a_notifier(receiver.url))

    assert isinstance(failed, Transient)
    assert failed.retry_after is None
    assert f"answered {code}" in str(failed)
    assert len(receiver.requests) == 1


async def test_a_receiver_that_wants_no_more_is_not_asked_again() -> None:
    async with Receiver(status(410, "Retry-After: 5")) as receiver:
        failed = await failure(a_notifier(receiver.url))

    assert isinstance(failed, Fatal)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(code: int) -> None:
    async with (
        Receiver() as elsewhere,
        Receiver(status(code, f"Location: {elsewhere.url}")) as receiver,
    ):
        failed = await failure(a_notifier(receiver.url))

        assert isinstance(failed, Transient)
        assert "redirects are not followed" in str(failed)
        assert (len(receiver.requests), elsewhere.connections) == (1, 0)


WAITS = {
    "120": 120.0,
    "0": 0.0,
    "99999999999999999999999999": 86400.0,
    "Mon, 21 Sep 2026 14:14:00 GMT": 39.877,
    "Monday, 21-Sep-26 14:14:00 GMT": 39.877,
    "Sun, 20 Sep 2026 14:14:00 GMT": 0.0,
    "Wed, 21 Oct 2099 07:28:00 GMT": 86400.0,
    "": None,
    "-1": None,
    "1.5": None,
    "soon": None,
    "²": None,
    "Mon, 99 Foo 2026 99:99:99 GMT": None,
    "Mon, 21 Sep 99999999999999999999 14:14:00 GMT": None,
    "," * 10_000: None,
}


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize(("said", "wait"), WAITS.items(), ids=[name[:40] for name in WAITS])
async def test_the_time_a_receiver_names_is_passed_on_within_a_day(
    code: int, said: str, wait: float | None
) -> None:
    answer = status(code, "Retry-After: @").replace(b"@", said.encode("latin-1", "replace"))

    async with Receiver(answer) as receiver:
        failed = await failure(a_notifier(receiver.url))

    assert isinstance(failed, Transient)
    assert failed.retry_after == pytest.approx(wait)


async def test_an_answer_that_never_ends_is_not_read() -> None:
    async with Receiver(endless) as receiver:
        await a_notifier(receiver.url).send(an_update())

        await receiver.wait_until_alone()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 100,
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        echo,
    ],
    ids=["nothing", "zeros", "half", "no status", "too many headers", "echo"],
)
async def test_an_answer_that_is_no_http_is_tried_again_and_not_quoted(answer: Any) -> None:
    async with Receiver(answer) as receiver:
        failed = await failure(a_notifier(receiver.url))

    assert isinstance(failed, Transient)
    assert "broke the connection off" in str(failed)


# ---- time, and being stopped ----------------------------------------------------------------------


@pytest.mark.parametrize("answer", [until_gone, dribble], ids=["silent", "dribbling"])
async def test_one_deadline_ends_the_attempt_whatever_the_receiver_does(answer: Any) -> None:
    async with Receiver(answer) as receiver:
        failed = await failure(a_notifier(receiver.url, timeout=1.5))

        await receiver.wait_until_alone()

    assert isinstance(failed, Transient)
    assert "did not answer within 1.5 s" in str(failed)
    assert len(receiver.requests) == 1


async def test_looking_the_name_up_counts_towards_the_deadline() -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    notifier = a_notifier("https://hooks.example/", resolve=never, timeout=0.05)

    assert "did not answer within 0.05 s" in str(await failure(notifier))


async def test_cancelling_closes_the_connection() -> None:
    async with Receiver(until_gone) as receiver:
        sending = asyncio.create_task(a_notifier(receiver.url).send(an_update()))
        await receiver.wait_until(lambda: len(receiver.requests) == 1)

        sending.cancel()

        with pytest.raises(asyncio.CancelledError):
            await sending
        await receiver.wait_until_alone()


async def test_cancelling_in_the_middle_of_a_handshake_closes_the_connection() -> None:
    async with Receiver() as receiver:
        notifier = a_notifier(f"https://127.0.0.1:{receiver.port}/")
        sending = asyncio.create_task(notifier.send(an_update()))
        await receiver.wait_until(lambda: receiver.connections == 1)

        sending.cancel()

        with pytest.raises(asyncio.CancelledError):
            await sending
        await receiver.wait_until_alone()


async def test_a_receiver_that_is_not_there_is_tried_again() -> None:
    with silent_port() as taken:
        failed = await failure(a_notifier(f"http://127.0.0.1:{taken.getsockname()[1]}/"))

    assert isinstance(failed, Transient)
    assert "could not be connected to: Connection refused" in str(failed)


async def test_one_notifier_sends_many_at_once() -> None:
    async with Receiver() as receiver:
        notifier = a_notifier(receiver.url)
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(notifier.send(an_update(idempotency_key=f"flow-{number}:done")))

    arrived = {request.header("webhook-id") for request in receiver.requests}
    assert arrived == {f"flow-{number}:done" for number in range(20)}


# ---- where it goes --------------------------------------------------------------------------------


async def test_it_connects_to_the_address_looked_up_while_the_name_is_asked_for_and_proven() -> (
    None
):
    names = Names(["127.0.0.1"])

    async with Receiver(tls=True) as receiver:
        notifier = a_notifier(
            f"https://hooks.example:{receiver.port}/in",
            resolve=names,
            allow_private=True,
            ssl_context=trusting_context(),
        )
        await notifier.send(an_update())

    assert names.asked == [("hooks.example", receiver.port)]
    assert receiver.names == ["hooks.example"]
    assert receiver.requests[0].header("host") == f"hooks.example:{receiver.port}"


async def test_a_receiver_that_cannot_prove_the_name_is_told_nothing() -> None:
    async with Receiver(tls=True) as receiver:
        notifier = a_notifier(
            f"https://other.example:{receiver.port}/",
            resolve=Names(["127.0.0.1"]),
            allow_private=True,
            ssl_context=trusting_context(),
        )
        failed = await failure(notifier)

    assert isinstance(failed, Transient)
    assert "not valid for 'other.example'" in str(failed)
    assert (receiver.connections, receiver.requests) == (0, [])


async def test_a_certificate_that_the_machine_does_not_trust_is_refused() -> None:
    async with Receiver(tls=True) as receiver:
        notifier = a_notifier(
            f"https://hooks.example:{receiver.port}/",
            resolve=Names(["127.0.0.1"]),
            allow_private=True,
        )
        failed = await failure(notifier)

    assert "certificate" in str(failed)
    assert receiver.requests == []


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["8.8.8.8", "127.0.0.1"]],
    ids=str,
)
async def test_a_name_of_the_senders_own_network_is_not_connected_to(addresses: list[str]) -> None:
    async with Receiver(tls=True) as receiver:
        notifier = a_notifier(f"https://hooks.example:{receiver.port}/", resolve=Names(addresses))
        failed = await failure(notifier)

    assert isinstance(failed, Transient)
    assert "not public" in str(failed)
    assert receiver.connections == 0


async def test_what_a_name_stands_for_is_judged_at_each_send_and_looked_up_once() -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])

    async with Receiver() as receiver:
        notifier = a_notifier(f"http://localhost:{receiver.port}/", resolve=names)
        await notifier.send(an_update())
        failed = await failure(notifier)

    assert "not on the loopback" in str(failed)
    assert len(names.asked) == 2
    assert len(receiver.requests) == 1


async def test_the_next_address_is_tried_if_one_takes_no_connection() -> None:
    async with Receiver() as receiver:
        names = Names(["::1", "127.0.0.1"])
        await a_notifier(f"http://localhost:{receiver.port}/", resolve=names).send(an_update())

    assert len(receiver.requests) == 1


async def test_an_address_that_keeps_us_waiting_leaves_time_for_the_next() -> None:
    async with Receiver(until_gone) as receiver:
        names = Names(["127.0.0.1", "127.0.0.1"])
        notifier = a_notifier(f"https://localhost:{receiver.port}/", resolve=names, timeout=2)
        await failure(notifier)

    assert receiver.connections == 2


async def test_an_address_that_took_the_update_is_the_last_one_tried() -> None:
    async with Receiver(b"") as receiver:
        names = Names(["127.0.0.1", "127.0.0.1"])
        await failure(a_notifier(f"http://localhost:{receiver.port}/", resolve=names))

    assert receiver.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        [],
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        TimeoutError(),
        UnicodeError("label too long"),
    ],
    ids=["none", "unknown", "timeout", "odd"],
)
async def test_a_name_that_cannot_be_looked_up_is_tried_again(answer: Any) -> None:
    failed = await failure(a_notifier("https://hooks.example/", resolve=Names(answer)))

    assert isinstance(failed, Transient)
    assert "could not be looked up" in str(failed)


async def test_the_machine_looks_names_up_if_nobody_else_does() -> None:
    async with Receiver() as receiver:
        await a_notifier(f"http://localhost:{receiver.port}/").send(an_update())

    assert receiver.requests[0].header("host") == f"localhost:{receiver.port}"


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Receiver() as proxy, Receiver() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        await a_notifier(receiver.url).send(an_update())

    assert (proxy.connections, receiver.connections) == (0, 1)


# ---- what is told ---------------------------------------------------------------------------------


async def test_no_log_of_any_library_tells_what_must_not_be_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)

    async with Receiver(status(302, "Location: /x"), status(500)) as receiver:
        notifier = a_notifier(receiver.url, headers={"Authorization": "hunter2"})
        await failure(notifier)
        await failure(notifier)

    assert any(record.name.startswith("httpcore2") for record in caplog.records), "vacuous"
    told = caplog.text.lower()
    assert not [part for part in TELLTALE if part.lower() in told]


# ---- what cannot be made --------------------------------------------------------------------------

UNUSABLE = {
    "plain http": "http://example.com/hunter2",
    "plain http to a private address": "http://10.0.0.1/hunter2",
    "no scheme": "example.com/hunter2",
    "scheme left open": "//example.com/hunter2",
    "another scheme": "ftp://example.com/hunter2",
    "a file": "file:///etc/hunter2",
    "user and password": "https://user:hunter2@example.com/",
    "user": "https://hunter2@example.com/",
    "password with a slash": "https://user:hunter2/x@example.com/",
    "no host": "https:///hunter2",
    "port too high": "https://example.com:99999/hunter2",
    "port zero": "https://example.com:0/hunter2",
    "line break": "https://example.com/\r\nhunter2",
    "host with a space": "https://hunter2 x/",
    "host with a NUL": "https://127.0.0.1%00.example/hunter2",
    "host of one network card": "https://[fe80::1%25eth0]/hunter2",
    "private": "https://10.0.0.1/hunter2",
    "keys of a cloud machine": "https://169.254.169.254/hunter2",
    "unspecified": "https://0.0.0.0/hunter2",
    "private in disguise": "https://[::ffff:10.0.0.1]/hunter2",
    "empty": "",
}


@pytest.mark.parametrize("url", UNUSABLE.values(), ids=UNUSABLE)
def test_an_address_that_must_not_be_used_is_an_error_that_does_not_tell_it(url: str) -> None:
    with pytest.raises(ValueError, match="address of a webhook") as refused:
        a_notifier(url)

    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "url", ["https://169.254.169.254/", "http://10.0.0.1/", "http://a.example/"]
)
def test_allowing_private_networks_allows_nothing_else(url: str) -> None:
    a_notifier("https://10.0.0.1/", allow_private=True)

    with pytest.raises(ValueError, match="address of a webhook"):
        a_notifier(url, allow_private=True)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "hunter2"},
        {"content-length": "0"},
        {"Transfer-Encoding": "chunked"},
        {"Webhook-Id": "hunter2"},
        {"webhook-anything": "hunter2"},
        {"X": "a\r\nhunter2: b"},
        {"X": "hunter2ä"},
        {"X y": "hunter2"},
        {"": "hunter2"},
        {"X": 7},
    ],
    ids=str,
)
def test_a_header_that_must_not_be_set_is_an_error_that_does_not_tell_its_value(
    headers: Any,
) -> None:
    with pytest.raises(ValueError, match="header") as refused:
        a_notifier("https://example.com/", headers=headers)

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_an_error(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        a_notifier("https://example.com/", timeout=timeout)


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)

    with pytest.raises(ImportError, match=r"flowstead\[webhook\]"):
        a_notifier("https://example.com/")


def test_nobody_pays_for_the_library_who_sends_no_webhooks() -> None:
    program = "import sys, flowstead, flowstead.notifiers; sys.exit('httpx2' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
