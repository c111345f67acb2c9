"""The part of a controller's face that talks: messages to its flow, and word to the owner."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from flowstead import arguments
from flowstead.decision import Message
from flowstead.flow_waits import FlowWaits, answer_of, as_shape
from flowstead.model.command import EndReport, Notify
from flowstead.model.flow import Json
from flowstead.model.task import Succeeded
from flowstead.model.wait import WaitKind, inbox_of
from flowstead.results import raise_refusal
from flowstead.rules.digests import DigestTime
from flowstead.store import codec

_NOTICE: Final = "notice"
_LONGEST_NOTICE: Final = 4096


class FlowMessages(FlowWaits):
    """Whom a controller can listen to, and whom it can tell."""

    _digest_time: DigestTime

    # ---- messages ---------------------------------------------------------------------------------

    async def receive(
        self,
        inbox: str = "inbox",
        *,
        name: str | None = None,
        timeout: float | None = None,
        on_timeout: str = "fail",
        schema: Any = None,
    ) -> Message | None:
        """Take the next message that was told to this flow, or asked of it: in the order in which they came.

        Args:
            inbox: Which messages; what `flows.tell` and `flows.ask` name.
            name: The step's name; `receive:inbox` with `#2` and so on for later calls unless given.
            timeout, on_timeout, schema: As for `wait`. A message that does not fit is refused to its sender; one
                that came before this was asked is put aside as failed.

        Returns:
            The message; None after a time-out with `on_timeout="resume"`.

        Raises:
            ChildTimedOut, ChildCancelled, CancelPending, WrongShape: As for `wait`.

        Cancelling the caller loses no message: the same step finds it again.
        """
        wait = self._wait(WaitKind.MESSAGE, timeout, on_timeout, (), None, schema)
        step = self._steps.name(name, f"receive:{inbox}")
        named = inbox_of(WaitKind.MESSAGE, arguments.text(inbox, "inbox"))
        wait = msgspec.structs.replace(wait, inbox=named)
        draft = self._steps.plain_draft(WaitKind.MESSAGE, step, wait=wait)
        task = await self._stand_in(draft)
        told = answer_of(task, on_timeout, None)
        if told is None:
            return None
        body = as_shape(task, told["body"], schema)
        return Message(id=told["id"], body=body, wants_reply=told["wantsReply"])

    async def reply(self, message: Message, value: Json = None) -> None:
        """Answer somebody who asked. Answering twice, or one who only told, changes nothing.

        Cancelling the caller after acceptance does not take the answer back.
        """
        if message.id is None or not message.wants_reply:
            return
        result = self._steps.encode_or_raise(value, "value")
        answered = await self._steps.ask(
            EndReport(task_id=message.id, outcome=Succeeded(), result=result)
        )
        if answered.refusal is not None:
            raise_refusal(answered.refusal)

    # ---- telling the owner ------------------------------------------------------------------------

    async def notify(
        self, text: str, data: Json | UnsetType = UNSET, *, name: str | None = None
    ) -> None:
        """Tell the owner something now, through the runtime's notifier: once for each name of the step.

        On record when this returns, and sent from there until it is delivered or visibly given up; a `silent` flow
        tells nobody. Cancelling the caller after acceptance does not take it back.

        Args:
            text: One sentence or a few, for people.
            data: JSON for programs.
            name: The step's name; `notify` with `#2` and so on for later calls unless given.
        """
        await self._notify(text, data, self._steps.name(name, "notify"), None)

    async def later(
        self,
        text: str,
        data: Json | UnsetType = UNSET,
        *,
        bucket: str = "digest",
        name: str | None = None,
    ) -> None:
        """Put something by for the owner's next digest: what was put by for one owner and bucket goes out as one
        message, at the digest time of the runtime, or as several if it is more than `Limits.digest_items` or
        `digest_bytes`. Cancelling the caller after acceptance does not take it back.

        Args:
            text, data: As for `notify`.
            bucket: Which digest.
            name: The step's name; `later` with `#2` and so on for later calls unless given.
        """
        await self._notify(
            text, data, self._steps.name(name, "later"), arguments.text(bucket, "bucket")
        )

    async def _notify(
        self, text: str, data: Json | UnsetType, step: str, bucket: str | None
    ) -> None:
        told = arguments.text(text, "text", longest=_LONGEST_NOTICE)
        now = self._steps.engine.clock.now()
        command = Notify(
            draft=self._steps.plain_draft(_NOTICE, step),
            text=told,
            data=UNSET if data is UNSET else self._steps.encode_or_raise(data, "data"),
            bucket=bucket,
            due_at=None if bucket is None else self._digest_time.next_after(now),
        )
        reply = await self._steps.ask(command)
        if reply.refusal is not None:
            raise_refusal(reply.refusal, None if reply.doc is None else codec.read_flow(reply.doc))
