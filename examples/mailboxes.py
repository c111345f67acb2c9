"""Read mail from wherever it lies, and tell by plain rules what it asks for. Nothing here knows of flows."""

from __future__ import annotations

import email
import hashlib
import mailbox
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from email.message import EmailMessage
from email.policy import default
from email.utils import parseaddr
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

MESSAGE_SUFFIXES = {".eml", ".txt"}
BULK_HEADERS = ("List-Id", "List-Unsubscribe", "List-Post", "List-Help")
ROBOTS = re.compile(r"no-?reply|mailer.daemon|postmaster|newsletter|notification|bounce", re.I)
BUSINESS = re.compile(
    r"\b(invoice|contract|agreement|quote|proposal|purchase order|payment|renewal|signature"
    r"|angebot|rechnung|vertrag|firing|outage|incident)\b",
    re.I,
)
PERSONAL = re.compile(
    r"\b(mum|mom|dad|birthday|dinner|love|school|doctor|appointment|holiday|weekend)\b", re.I
)


class Mail(NamedTuple):
    """What the rules look at."""

    sender: str
    subject: str
    bulk: str
    is_automatic: bool
    is_reply: bool
    has_invitation: bool
    text: str

    @property
    def about(self) -> str:
        """One line for people."""
        return self.subject or (f"from {self.sender}" if self.sender else "nothing readable")


def classify(mail: Mail) -> tuple[str, str]:
    """The route of a message, and why: the first rule that fits decides."""
    name, address = parseaddr(mail.sender)
    if mail.bulk:
        return "later", f"sent to many ({mail.bulk})"
    if found := BUSINESS.search(mail.subject):
        return "business", f"the subject says {found[0].lower()!r}"
    if mail.is_automatic or ROBOTS.search(mail.sender):
        return "later", "written by a machine"
    if mail.has_invitation:
        return "personal", "an invitation"
    if found := PERSONAL.search(mail.subject) or PERSONAL.search(mail.text):
        return "personal", f"says {found[0].lower()!r}"
    if found := BUSINESS.search(mail.text):
        return "business", f"says {found[0].lower()!r}"
    if mail.is_reply and address:
        return "personal", "somebody answers you"
    if len(name.split()) > 1:
        return "personal", "a person wrote to you"
    return "later", "nothing in it presses"


def parse(raw: bytes) -> Mail:
    """What can be learned from a message. A broken one has less to say; it never raises."""
    message = email.message_from_bytes(raw, policy=default)
    precedence = _header(message, "Precedence").lower()
    bulk = [name for name in BULK_HEADERS if name in message]
    if precedence in {"bulk", "list", "junk"}:
        bulk.append(f"Precedence: {precedence}")
    subject = _header(message, "Subject")
    return Mail(
        sender=_header(message, "From"),
        subject=subject,
        bulk=bulk[0] if bulk else "",
        is_automatic=_header(message, "Auto-Submitted").lower() not in {"", "no"},
        is_reply="In-Reply-To" in message or subject.lower().startswith("re:"),
        has_invitation=any(p.get_content_type() == "text/calendar" for p in message.walk()),
        text=_text(message)[:2000],
    )


@contextmanager
def open_mailboxes(paths: Iterable[Path]) -> Iterator[dict[str, Callable[[], bytes]]]:
    """Every message of these mailboxes, under a key made from its bytes.

    The key is the same wherever the message lies, so moving mail about makes no message new, and a message
    that lies there twice is one message. Bytes are read when asked for, and not kept.
    """
    with ExitStack() as stack:
        found = {}
        for path in paths:
            for read in _readers(path, stack):
                found[hashlib.sha256(read()).hexdigest()[:16]] = read
        yield found


def default_mailboxes() -> list[Path]:
    """The mailbox beside this file and, where Python came with its own tests, the mail it is tested on."""
    here = Path(__file__).with_name("inbox.mbox")
    tests = find_spec("test") and find_spec("test.test_email")
    shipped = [
        Path(folder, "data") for folder in (tests and tests.submodule_search_locations) or ()
    ]
    return [here, *(folder for folder in shipped if folder.is_dir())]


def _readers(path: Path, stack: ExitStack) -> Iterator[Callable[[], bytes]]:
    is_maildir = (path / "cur").is_dir() and (path / "new").is_dir()
    if path.is_dir() and not is_maildir:
        files = sorted(file for file in path.iterdir() if file.suffix in MESSAGE_SUFFIXES)
        yield from (file.read_bytes for file in files)
        return
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(5)
        if start and start != b"From ":  # not an mbox, so one message
            yield path.read_bytes
            return
    box = mailbox.Maildir(path, create=False) if is_maildir else mailbox.mbox(path, create=False)
    stack.enter_context(closing(box))
    yield from (partial(box.get_bytes, number) for number in sorted(box.keys()))


def _header(message: EmailMessage, name: str) -> str:
    try:
        value = str(message.get(name, ""))
    except Exception:  # a header so broken that the parser trips over it
        return ""
    return " ".join(value.encode(errors="replace").decode().split())


def _text(message: EmailMessage) -> str:
    try:
        body = message.get_body(("plain", "html"))
        content = "" if body is None else body.get_content()
    except Exception:  # an unknown charset, a part that is not what it says it is
        return ""
    return re.sub(r"<[^>]*>", " ", content) if isinstance(content, str) else ""
