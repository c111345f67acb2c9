"""What comes to a flow from outside: signals, messages, votes."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET, Raw, UnsetType

from flowstead import arguments
from flowstead.answering import (
    NOT_FOUND_REPORT,
    VOTED_NOWHERE,
    answer_token,
    cast,
    encoded_or_raise,
    letter_draft,
    report_of_receipt,
    send,
    vote_by_token,
    vote_of,
)
from flowstead.engine.desk import Signal
from flowstead.model.code import Code
from flowstead.model.command import Command, Deliver, Tell
from flowstead.model.flow import FlowKey, Json
from flowstead.model.task import Outcome
from flowstead.model.wait import Letter, WaitKind, inbox_of
from flowstead.results import SignalReport, VoteReport, error_for
from flowstead.rules import wait_keys
from flowstead.verbs import ScopedVerbs


class SessionSignals(ScopedVerbs):
    """Signals, messages and votes for one session's flows."""

    _session_key: str

    # ---- signals ----------------------------------------------------------------------------------

    async def signal(
        self,
        *,
        payload: Json = None,
        id: str | None = None,
        flow_id: str | None = None,
        name: str | None = None,
        token: str | None = None,
        lifetime: float | UnsetType | None = UNSET,
        key: Mapping[str, Json] | None = None,
        **fields: Json,
    ) -> SignalReport:
        """Answer a wait: by its key, by flow and name, or by its token.

        By key it wakes every flow of this session that waits for exactly these fields, in the transaction that
        records it. One that wakes nobody is kept, and answers the next wait for them the moment that is opened,
        whoever has waited for them before. To a step of a flow it is kept until the step is opened, which happens
        once: then it is `late`, as it is for a token that was used and for a flow that has ended or is to be
        cancelled. By key only one that is not to be kept is ever late: where all that have waited have ended. One
        with an `id` counts once, restarts included. One that was kept and does not fit the shape that is
        asked for is put aside, and its id is free again. Cancelling the caller does not take the signal back.

        Args:
            payload: The answer, any JSON.
            id: The sender's own id for this signal.
            flow_id, name: The flow, and the step that waits there; without a name the flow's own wait.
            token: The wait's token.
            lifetime: Seconds that an early signal is kept; `Limits.signal_lifetime` unless given, None not to keep
                it. A token answers what is open, and keeps nothing.
            key, fields: What is answered: exactly the plain fields of the wait. `key` is for fields whose names are
                taken here.

        Raises:
            InvalidState, StateTooLarge: The payload, or the key, is nothing JSON can hold, or too much of it.
            MailboxFull: The flow has too much waiting, or `Limits.kept_signals` are kept. Nothing changed.
            CommitFailed: Certainly not written.
            OutcomeUnknown: Nobody knows; with an `id` it is safe to send again.
            ValueError, TypeError: It is not said what is answered, or an argument does not go with that.
        """
        self._core.enter()
        named = arguments.wait_fields(key, fields)
        if sum([named is not None, flow_id is not None, token is not None]) != 1:
            raise ValueError("say what is answered: a key, flow_id (and name), or token.")
        if name is not None and flow_id is None:
            raise ValueError("name is a step of flow_id; a field of that name goes into key={...}.")
        if token is not None and lifetime is not UNSET and lifetime is not None:
            raise ValueError("lifetime is for a signal that may come early; a token never does.")
        encoded = self._payload(payload, "payload")
        signal_id = None if id is None else arguments.identifier(id, "id")
        seconds = self._lifetime(lifetime)
        if token is not None:
            return await answer_token(
                self._core, token, encoded, signal_id, owner=self._session_key
            )
        if flow_id is not None:
            step = None if name is None else arguments.text(name, "name")
            return await self._signal_flow(flow_id, step, encoded, signal_id, seconds)
        assert named is not None
        most = self._core.engine.limits.wait_bytes
        encoded_or_raise(self._core, named, "key", max_bytes=most)
        signal = Signal(
            owner_key=self._session_key,
            wait_key=wait_keys.wait_key(self._session_key, named),
            payload=encoded,
            signal_id=signal_id,
            lifetime=seconds,
            actor=self._actor,
        )
        return report_of_receipt(await self._core.engine.desk.take_in(signal))

    async def _signal_flow(
        self,
        flow_id: str,
        step: str | None,
        payload: Raw,
        signal_id: str | None,
        lifetime: float | None,
    ) -> SignalReport:
        wanted = arguments.lookup(flow_id, "flow_id")
        if wanted is None:
            return NOT_FOUND_REPORT
        command: Command
        if step is None or lifetime is None:
            command = Deliver(task_id=step or "", payload=payload, signal_id=signal_id)
        else:
            inbox = inbox_of(WaitKind.SIGNAL, step)
            letter = Letter(inbox=inbox, expires_at=self._in(lifetime))
            command = Tell(draft=letter_draft(self._core, letter, payload, "signal"), step=step)
        key = FlowKey(self._session_key, wanted)
        return await send(self._core, key, command, signal_id, self._actor)

    # ---- messages ---------------------------------------------------------------------------------

    async def tell(
        self, flow_id: str, message: Json, *, inbox: str = "inbox", id: str | None = None
    ) -> SignalReport:
        """Tell a flow something: its controller takes it by `flow.receive`, in the order of the calls.

        It is for the flow, not for one wait: what nobody takes now, or comes too late for the wait that is open, is
        kept for the next.
        Durable when this answers; one with an `id` counts once. Cancelling the caller does not take it back.

        Raises:
            InvalidState, StateTooLarge, MailboxFull, CommitFailed, OutcomeUnknown: As for `signal`; also where
                `Limits.messages` have not been taken.
        """
        self._core.enter()
        payload = self._payload(message, "message")
        signal_id = None if id is None else arguments.identifier(id, "id")
        wanted = arguments.lookup(flow_id, "flow_id")
        if wanted is None:
            return NOT_FOUND_REPORT
        letter = Letter(inbox=inbox_of(WaitKind.MESSAGE, arguments.text(inbox, "inbox")))
        command = Tell(draft=letter_draft(self._core, letter, payload, "message"))
        return await send(
            self._core, FlowKey(self._session_key, wanted), command, signal_id, self._actor
        )

    async def ask(self, flow_id: str, message: Json, *, inbox: str = "inbox") -> Outcome:
        """Ask a flow something, and wait for what its controller replies: `Succeeded(result)`, or why not.

        Cancelling only stops the waiting: the message stays, and `wait_task` finds the reply by the id of its task.

        Raises:
            FlowNotFound: No such flow.
            NotAwaited: The flow has ended, or the message is not of the shape that was asked for.
            InvalidState, StateTooLarge, MailboxFull, CommitFailed, OutcomeUnknown: As for `tell`.
        """
        engine = self._core.enter()
        payload = self._payload(message, "message")
        wanted = arguments.lookup(flow_id, "flow_id")
        if wanted is None:
            raise error_for(Code.NOT_FOUND, "Flow not found.")
        named = inbox_of(WaitKind.MESSAGE, arguments.text(inbox, "inbox"))
        letter = Letter(inbox=named, wants_reply=True)
        draft = letter_draft(self._core, letter, payload, "message")
        key = FlowKey(self._session_key, wanted)
        reply = await engine.desk.send(
            key, Tell(draft=draft), self._actor, signal_id=None, wait_key=""
        )
        assert reply is not None
        if reply.refusal is not None:
            raise error_for(reply.refusal.code, reply.refusal.reason)
        return await self.wait_task(draft.task_id)

    # ---- votes ------------------------------------------------------------------------------------

    async def vote(
        self,
        decision: str,
        *,
        approver: str,
        digest: str,
        role: str | None = None,
        items: Json | UnsetType = UNSET,
        comment: str | None = None,
        flow_id: str | None = None,
        name: str | None = None,
        token: str | None = None,
    ) -> VoteReport:
        """Vote on an approval that a flow has asked for. Cancelling the caller does not take the vote back.

        Args:
            decision: `approve`, `reject`, or `edit` to approve other items than were shown. An edit puts its items
                in place of those shown and counts as an approval of them; what was said until then is void, and has
                to be said again about the new `digest`. Under four eyes it only asks for them.
            approver: Who votes. The host vouches for it: an approver counts once. Names of people and roles are
                compared exactly; what is not printable or not in Unicode normal form C is refused.
            digest: The hash of what the approver was shown; a vote about anything else does not count.
            role: In which role.
            items: The items as edited, for `edit`.
            comment: For the record.
            flow_id, name: The flow and the step that asks; or
            token: the token of the approval.

        Raises:
            InvalidState, StateTooLarge, MailboxFull, CommitFailed, OutcomeUnknown: As for `signal`.
            ValueError, TypeError: An argument makes no sense.
        """
        self._core.enter()
        vote = vote_of(self._core, decision, approver, digest, role, items, comment)
        if token is not None and flow_id is None and name is None:
            return await vote_by_token(self._core, token, vote, owner=self._session_key)
        if token is not None or flow_id is None or name is None:
            raise ValueError("say which approval: flow_id and name, or token.")
        wanted = arguments.lookup(flow_id, "flow_id")
        if wanted is None:
            return VOTED_NOWHERE
        step = arguments.text(name, "name")
        return await cast(self._core, FlowKey(self._session_key, wanted), step, vote, self._actor)

    # ---- small things -----------------------------------------------------------------------------

    def _payload(self, value: Json, name: str) -> Raw:
        return encoded_or_raise(self._core, value, name)

    def _lifetime(self, lifetime: float | UnsetType | None) -> float | None:
        if lifetime is UNSET:
            return self._core.engine.limits.signal_lifetime
        return arguments.seconds(lifetime, "lifetime")

    def _in(self, seconds: float) -> int:
        return self._core.engine.clock.now() + round(seconds * 1000)
