"""A receiver of webhooks on a real socket, and updates to send it."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from flowstead.model.update import Update, UpdateKind

CERTIFICATE: Final = Path(__file__).parent / "hooks.example.pem"
"""Of hooks.example, for a hundred years, with its key; trusted by nobody but these tests."""

SECRET: Final = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OLD_SECRET: Final = b"raw secrets are bytes, 32 of it."
NOW: Final = 1_790_000_000_123
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def an_update(**fields: Any) -> Update:
    """The end of a flow; of a customer, so that its text must not be seen by just anybody."""
    return Update(
        **{
            "idempotency_key": "flow-1:done",
            "kind": UpdateKind.DONE,
            "owner_key": "agent:main",
            "flow_id": "flow-1",
            "revision": 7,
            "flow_status": "succeeded",
            "goal": "refund Mrs Miller",
            "text": "Mrs Miller has her money.",
            "data": {"iban": "DE02120300000000202051"},
            "requester_origin": {"channel": "slack", "thread": "17"},
            "created_at": NOW - 5000,
            **fields,
        }
    )


def status(code: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {code} Said", "Content-Length: 0", *headers, "", ""]).encode()


class Request(NamedTuple):
    line: str
    headers: list[tuple[str, str]]
    body: bytes
    raw: bytes

    def header(self, name: str) -> str:
        """The one header of that name."""
        (value,) = [value for each, value in self.headers if each.lower() == name]
        return value


class Talk(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


Answer = Callable[[Request, Talk], Awaitable[None]]


async def until_gone(request: Request, talk: Talk) -> None:
    """Say nothing until the other side goes."""
    await talk.reader.read()


async def endless(request: Request, talk: Talk) -> None:
    """Say yes, and never stop talking."""
    talk.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        talk.writer.write(bytes(65536))
        await talk.writer.drain()


async def dribble(request: Request, talk: Talk) -> None:
    """Always say something, so that no single read is slow, and never the status."""
    while not talk.writer.is_closing():
        talk.writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await talk.writer.drain()
        await asyncio.sleep(0)


async def echo(request: Request, talk: Talk) -> None:
    """Answer the request with itself, headers and all; no HTTP."""
    talk.writer.write(b"".join(request.raw.splitlines()) + b"\r\n\r\n")


class Receiver:
    """Answers requests in turn, the last answer for ever; bytes as they are, functions by calling them."""

    def __init__(self, *answers: bytes | Answer, tls: bool = False) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.names: list[str | None] = []
        self._answers = list(answers) or [OK]
        self._tls = self._server_context() if tls else None
        self._moved = asyncio.Event()
        self._open = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.wait_until(lambda: self._open == 0)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks?token=s3same"

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._moved.clear()
            await self._moved.wait()

    async def wait_until_alone(self) -> None:
        await self.wait_until(lambda: self._open == 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open += 1
        self._moved.set()
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()
            self._open -= 1
            self._moved.set()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _read(reader)
        self.requests.append(request)
        self._moved.set()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, bytes):
            writer.write(answer)
            await writer.drain()
        else:
            await answer(request, Talk(reader, writer))

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        context.sni_callback = lambda _connection, name, _context: self.names.append(name)
        return context


def trusting_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(CERTIFICATE)
    return context


async def _read(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    line, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = [tuple(each.split(": ", 1)) for each in rest]
    (length,) = [int(value) for name, value in headers if name.lower() == "content-length"]
    body = await reader.readexactly(length)
    return Request(line, headers, body, head + body)  # type: ignore[arg-type]
