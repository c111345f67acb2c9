"""Updates as webhooks, after the Standard Webhooks specification.

What is held, whoever chose the address and whoever answers:

- It connects only to an address that was judged (see `address`), while the certificate is checked against the
  name. Redirects are not followed. Proxies of the environment are not used: nobody could say where they connect.
- One attempt has one deadline, from the look-up of the name to the status line. The body of the answer is not
  asked for.
- The body is the same for each attempt of an update, the id too; the timestamp is that of the attempt.
- Secrets, the body, and of the address all but scheme, host and port stay out of messages and logs.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from calendar import timegm
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import formatdate, parsedate, parsedate_to_datetime
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import anyio
import anyio.to_thread
import msgspec
from msgspec.structs import replace

from flowstead.engine.clock import SystemClock
from flowstead.errors import Fatal, TaskSignal, Transient
from flowstead.model.update import Update, UpdateStatus
from flowstead.notifiers.address import Reach, address_of, may_reach, reach_of
from flowstead.notifiers.signature import ID, SIGNATURE, TIMESTAMP, read_secrets, sign, webhook_id

if TYPE_CHECKING:
    import httpx2

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

_LONGEST_WAIT: Final = 24 * 3600
_HOST: Final = re.compile(r"[0-9a-z_.-]{1,253}")
_HEADER_NAME: Final = re.compile(r"[0-9A-Za-z!#$%&'*+.^_`|~-]+")
_HEADER_VALUE: Final = re.compile(r"[\t -~]*")
_OURS: Final = {
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


class WebhookNotifier:
    """Sends each update as a signed POST to one address.

    The body is `{"type": "flow.<kind>", "timestamp": …, "data": {…}}`: when it happened, and the update by its wire
    names, without what only its sender keeps. The id is the update's `idempotency_key`, or its digest if that could
    not stand in a header. `verify_webhook` is the other end.

    Delivered is what is answered by a status of 2xx. `410 Gone` ends it for good; everything else is tried again,
    as the specification has it: a receiver that is misconfigured today is mended tomorrow, and the update is still
    there.

    The address is taken to be the host's own choice. A host that lets others choose should refuse them the
    loopback: whoever names it reaches what else listens there.

    Args:
        url: Where to; https, or http on the loopback.
        secrets: What to sign with, each `whsec_…` or raw bytes: the present one first, then those being phased out.
        timeout: Seconds for one whole attempt.
        allow_private: Whether the address may be on a private network, or on the loopback without being called so.
        headers: More headers, as for authorization.
        ssl_context: How certificates are checked, if not against those the machine trusts.
        resolve: Answers the addresses of a host at a port, if not the machine does.
        now: Epoch milliseconds, if not the time of day.

    Raises:
        ImportError: httpx2 is not installed; `flowstead[webhook]` brings it.
        TypeError: A secret is of the wrong type.
        ValueError: The address, a secret, a header or the timeout could never be used.
    """

    def __init__(
        self,
        url: str,
        secrets: Sequence[str | bytes],
        *,
        timeout: float = 10.0,
        allow_private: bool = False,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
        now: Callable[[], int] | None = None,
    ) -> None:
        self._http: Final[Any] = _httpx2()
        self._target: Final = _target(self._http, url, allow_private=allow_private)
        self._keys: Final = read_secrets(secrets)
        self._headers: Final = _extra_headers(headers or {})
        self._timeout: Final = _positive(timeout)
        self._ssl_context = ssl_context
        self._resolve: Final = resolve or _resolve
        self._now: Final = now or SystemClock().now

    def __repr__(self) -> str:
        return f"WebhookNotifier({self._target.origin!r}, …)"

    async def send(self, update: Update) -> None:
        """Send it, and return once the receiver has answered that it has it.

        Cancelling closes the connection; the receiver may have the update.

        Raises:
            Fatal: The receiver wants no more webhooks (410).
            Transient: It was not delivered, or nobody knows; `retry_after` if the receiver named a time.
        """
        try:
            with anyio.fail_after(self._timeout):
                answer = await self._post(webhook_id(update.idempotency_key), _body(update))
        except TimeoutError:
            raise self._failed(f"did not answer within {self._timeout:g} s.") from None
        if not 200 <= answer.status < 300:
            raise self._refused(answer)

    async def _post(self, id: str, body: bytes) -> _Answer:
        """Try the addresses in turn until one takes the connection; only then is anything sent."""
        headers = self._signed(id, body)
        addresses = await self._addresses()
        async with await self._transport() as transport, _Connections() as connections:
            problem = ""
            for address in addresses:
                request = self._request(address, headers, body)
                request.extensions |= {
                    "timeout": {"connect": self._timeout / len(addresses)},
                    "trace": connections.note,
                }
                try:
                    response = await transport.handle_async_request(request)
                except (self._http.ConnectError, self._http.ConnectTimeout) as error:
                    problem = f"could not be connected to: {_why(error)}"
                except self._http.HTTPError as error:
                    # Its own words may quote the receiver's, which may quote ours: they go no further.
                    problem = f"broke the connection off: {type(error).__name__}."
                    break
                else:
                    await response.aclose()
                    return _Answer(response.status_code, response.headers.get("retry-after", ""))
        raise self._failed(problem)

    def _signed(self, id: str, body: bytes) -> httpx2.Headers:
        seconds = self._now() // 1000
        headers: httpx2.Headers = self._http.Headers({"User-Agent": "flowstead"})
        headers.update(self._headers)
        headers.update(
            {
                "Host": self._target.host_header,
                "Connection": "close",
                "Content-Type": "application/json",
                ID: id,
                TIMESTAMP: str(seconds),
                SIGNATURE: " ".join(sign(id, seconds, body, self._keys)),
            }
        )
        return headers

    def _request(self, address: str, headers: httpx2.Headers, body: bytes) -> httpx2.Request:
        """The address stands in the place of the name; the name is what is asked for, and what must be proven."""
        request: httpx2.Request = self._http.Request(
            "POST",
            self._target.url.copy_with(host=address),
            headers=headers,
            content=body,
            extensions={"sni_hostname": self._target.host.rstrip(".")},
        )
        return request

    async def _addresses(self) -> Sequence[str]:
        """Look the name up once. One address that must not be reached rules the others out: something is wrong."""
        target = self._target
        if address_of(target.host) is not None:
            return [target.host]
        try:
            addresses = await self._resolve(target.host, target.port)
        except (OSError, UnicodeError) as error:
            raise self._failed(f"could not be looked up: {_why(error)}") from None
        if not addresses:
            raise self._failed("could not be looked up: it has no address.")
        if not all(may_reach(address, target.reach) for address in addresses):
            raise self._failed(f"has an address that is {_FORBIDDEN[target.reach]}.")
        return addresses

    async def _transport(self) -> httpx2.AsyncHTTPTransport:
        """A transport for one attempt. Not a client: clients log whole addresses, and follow the environment."""
        if self._ssl_context is None:
            if self._target.url.scheme == "https":
                # Reads all certificates the machine trusts, which takes a while.
                self._ssl_context = await anyio.to_thread.run_sync(self._http.create_ssl_context)
            else:
                self._ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        transport: httpx2.AsyncHTTPTransport = self._http.AsyncHTTPTransport(
            verify=self._ssl_context
        )
        return transport

    def _refused(self, answer: _Answer) -> TaskSignal:
        status = answer.status
        if status == 410:
            return Fatal(f"{self._who} wants no more webhooks: it answered 410.")
        if 300 <= status < 400:
            return self._failed(f"answered {status}; redirects are not followed.")
        wait = _retry_after(answer.retry_after, self._now())
        return self._failed(f"answered {status}.", retry_after=wait)

    def _failed(self, problem: str, *, retry_after: float | None = None) -> Transient:
        return Transient(f"{self._who} {problem}", retry_after=retry_after)

    @property
    def _who(self) -> str:
        return f"The webhook at {self._target.origin}"


class _Answer(NamedTuple):
    status: int
    retry_after: str


class _Target(NamedTuple):
    """Where webhooks go, taken apart by the one parser that also makes the request."""

    url: httpx2.URL
    host: str
    port: int
    reach: Reach

    @property
    def host_header(self) -> str:
        return self.url.netloc.decode()

    @property
    def origin(self) -> str:
        return f"{self.url.scheme}://{self.host_header}"


class _Connections:
    """The connections of one attempt, closed at its end in any case.

    The library leaves one open that is cancelled in the middle of its TLS handshake, and the loop keeps it for as
    long as the receiver likes.
    """

    def __init__(self) -> None:
        self._opened: list[Any] = []

    async def note(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self._opened.append(info["return_value"])

    async def __aenter__(self) -> _Connections:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            for connection in self._opened:
                await connection.aclose()


class _Envelope(msgspec.Struct, frozen=True):
    type: str
    timestamp: str
    data: Update


_FORBIDDEN: Final = {
    Reach.LOOPBACK: "not on the loopback",
    Reach.PUBLIC: "not public (allow_private lets it be on a private network)",
    Reach.PRIVATE_TOO: "neither public nor private",
}


def _httpx2() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise ImportError(
            "WebhookNotifier needs httpx2, which is not installed:"
            " python -m pip install 'flowstead[webhook]'."
        ) from error
    return httpx2


def _target(http: Any, url: str, *, allow_private: bool) -> _Target:
    """Take an address apart. What is wrong with it is said without saying it: it may hold a password."""
    try:
        parsed = http.URL(url)
    except http.InvalidURL:
        raise ValueError("The address of a webhook is not a URL.") from None
    if parsed.userinfo:
        raise ValueError(
            "The address of a webhook must not hold a user or a password; use headers for that."
        )
    host = parsed.raw_host.decode()
    if address_of(host) is None and not _HOST.fullmatch(host):
        raise ValueError("The address of a webhook names no host that could be looked up.")
    port = parsed.port if parsed.port is not None else 443 if parsed.scheme == "https" else 80
    if not 0 < port < 65536:
        raise ValueError(f"The address of a webhook has port {port}, which does not exist.")
    reach = reach_of(host, allow_private=allow_private)
    if parsed.scheme != "https" and not (parsed.scheme == "http" and reach is Reach.LOOPBACK):
        raise ValueError(
            "The address of a webhook must begin with https://, or with http:// on the loopback."
        )
    if address_of(host) is not None and not may_reach(host, reach):
        raise ValueError(f"The address of a webhook is {_FORBIDDEN[reach]}.")
    return _Target(parsed, host, port, reach)


def _extra_headers(given: Mapping[str, str]) -> dict[str, str]:
    for name, value in given.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError("A header of a webhook has a name that cannot be sent.")
        if name.lower() in _OURS or name.lower().startswith("webhook-"):
            raise ValueError(f"The header {name} of a webhook is not yours to set.")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"The header {name} of a webhook has a value that cannot be sent.")
    return dict(given)


def _positive(timeout: float) -> float:
    if not isfinite(timeout) or timeout <= 0:
        raise ValueError(f"WebhookNotifier: timeout must be positive, not {timeout!r}.")
    return timeout


def _body(update: Update) -> bytes:
    """The update as it happened: without what changes from attempt to attempt, and how earlier ones failed."""
    told = replace(
        update,
        status=UpdateStatus.PENDING,
        attempt=0,
        due_at=None,
        delivered_at=None,
        failure=None,
    )
    envelope = _Envelope(f"flow.{update.kind}", _iso(update.created_at), told)
    return msgspec.json.encode(envelope)


def _iso(instant: int) -> str:
    seconds, milliseconds = divmod(instant, 1000)
    moment = parsedate_to_datetime(formatdate(seconds, usegmt=True))
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{milliseconds:03d}Z"


def _retry_after(value: str, now: int) -> float | None:
    """The seconds to wait that a receiver named, within a day; None if it named none that can be read."""
    if value.isascii() and value.isdigit():
        return float(min(int(value[:12]), _LONGEST_WAIT))
    try:
        parsed = parsedate(value[:64])
        wait = None if parsed is None else timegm(parsed) - now / 1000
    except (ValueError, IndexError, OverflowError):
        return None
    return None if wait is None else min(max(wait, 0.0), float(_LONGEST_WAIT))


def _why(error: BaseException) -> str:
    """Why a connection failed, in the words of this machine; the nearest cause that has any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"{cause.verify_message}."
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed ({cause.reason})."
        if isinstance(cause, socket.gaierror):
            return f"{cause.strerror}."
        if isinstance(cause, OSError) and cause.errno is not None:
            return f"{os.strerror(cause.errno)}."
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}."


async def _resolve(host: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
