"""The part of a controller's face that stands still: waits, timers, approvals, messages, and word to the owner.

Each is a step, so each has a name that must be the same when the controller is run again. What is recorded answers
at once. While a controller stands in one its flow is `waiting`; after `Limits.park_seconds` the controller leaves
memory, and is run again from the top when it is woken.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from flowstead import arguments
from flowstead.decision import Ballot, Decision, Message
from flowstead.errors import WrongShape
from flowstead.model.approval import Rules, Verdict, VoteKind
from flowstead.model.command import EndReport, Notify, TaskDraft
from flowstead.model.flow import Failure, Flow, Json
from flowstead.model.task import Cancelled, Succeeded, Task, TimedOut, outcome_of
from flowstead.model.wait import OnTimeout, Wait, WaitKind, inbox_of
from flowstead.results import raise_refusal
from flowstead.rules import approvals, shapes, wait_keys
from flowstead.rules.digests import DigestTime
from flowstead.standing import Standing
from flowstead.step import Completed, Step, distinct, result_of
from flowstead.steps import Begun, Steps
from flowstead.store import codec

_NOTICE: Final = "notice"
_LONGEST_NOTICE: Final = 4096
_REASONS: Final = 10
"""Rejections that the reason of a decision names; all are in its votes."""


class WaitStep(Step):
    """A wait that is open while its controller goes on. Made by `FlowContext.open_wait` and its kin.

    `token` answers it from outside, without knowing the flow: put it into a link. `digest` is what a vote must
    name. `result()` answers, and raises, as what waits at once does: `wait`, `sleep` or `approve`.
    """

    def __init__(
        self,
        steps: Steps,
        standing: Standing,
        name: str,
        begun: Begun,
        read: Callable[[Task], Any],
    ) -> None:
        super().__init__(steps, name, begun)
        self._standing, self._reader, wait = standing, read, begun.wait
        self.token = None if wait is None else wait.token
        approval = None if wait is None else wait.approval
        self.digest = None if approval is None else approval.digest

    async def ended(self) -> Task:
        """The child as it ended; the flow waits for it. Cancelling only stops the waiting."""
        if not self._is_known:
            [begun] = await self._standing.stand([self.task_id])
            self._end = begun.end
        return await super().ended()

    def _read(self, task: Task) -> Any:
        return self._reader(task)


class FlowWaits:
    """What a controller can wait for, and whom it can tell."""

    _steps: Steps
    _standing: Standing
    _digest_time: DigestTime
    _questions: defaultdict[str, deque[str]]
    """The steps of questions that were asked beside, by what they ask, until `approve` waits for them."""

    @property
    def flow(self) -> Flow:
        """The flow as this controller last knew it."""
        raise NotImplementedError

    # ---- signals ----------------------------------------------------------------------------------

    async def wait(
        self,
        name: str,
        *,
        timeout: float | None = None,
        on_timeout: str = "fail",
        remind: Sequence[float] = (),
        prompt: str | None = None,
        schema: Any = None,
        key: Mapping[str, Json] | None = None,
        **fields: Json,
    ) -> Any:
        """Wait for an answer from outside, and return its payload.

        The flow is `waiting` until `flows.signal(**fields)` names exactly these fields, or a signal is addressed to
        this flow and `name`, or the wait's token is used. A signal that came early answers at once.

        Args:
            name: The step's name in this flow.
            timeout: Seconds until `on_timeout` happens; no deadline unless given.
            on_timeout: `fail` raises `ChildTimedOut`, `resume` answers None, `block` blocks the flow and waits on.
            remind: Seconds before the deadline at which the owner is reminded.
            prompt: What is asked, for people.
            schema: A JSON Schema, or a type, that an answer must fit; of a type an instance is returned. A wrong
                answer is refused with the path, and the wait stays open. Dates, UUIDs and other texts that a type
                reads are checked like that; the `format`s of a JSON Schema of yours are not. Needs the extra
                `schema`.
            key, fields: What a signal must name: plain JSON values.

        Raises:
            ChildTimedOut: Nobody answered in time.
            ChildCancelled: Somebody withdrew the wait.
            CancelPending: A cancel is requested.
            StateTooLarge: The key or the schema is over `Limits.wait_bytes`.
            WrongShape: The type takes less than its schema says (`__post_init__`, the length of bytes, …), and the
                answer is nothing for it. The wait is over, and has that answer.

        Cancelling the caller leaves the wait open: the same step finds it again. Give `timeout` rather than putting
        `asyncio.timeout` around it: a controller that has left memory forgets that.
        """
        draft = self._signal_draft(name, timeout, on_timeout, remind, prompt, schema, key, fields)
        return _answer(await self._stand_in(draft), on_timeout, schema)

    async def open_wait(
        self,
        name: str,
        *,
        timeout: float | None = None,
        on_timeout: str = "fail",
        remind: Sequence[float] = (),
        prompt: str | None = None,
        schema: Any = None,
        key: Mapping[str, Json] | None = None,
        **fields: Json,
    ) -> WaitStep:
        """Open a wait and go on: to send its `token` to somebody, or to `select` over several.

        Arguments as for `wait`, whose answer is that of the step's `result()`.

        Cancelling the caller after acceptance leaves the wait open.

        Raises:
            CancelPending: A cancel is requested, and the wait is new.
        """
        draft = self._signal_draft(name, timeout, on_timeout, remind, prompt, schema, key, fields)
        return await self._open(draft, partial(_answer, on_timeout=on_timeout, schema=schema))

    # ---- time -------------------------------------------------------------------------------------

    async def sleep(
        self, name: str, seconds: float | None = None, *, wake_at: int | None = None
    ) -> None:
        """Stand still for so many seconds, or until an instant (epoch ms): durably, once, late rather than never.

        `await flow.sleep("cool down", 60)`: like every step it has a name.

        Cancelling the caller leaves the timer running; the same step finds it again.

        Raises:
            CancelPending: A cancel is requested.
        """
        result_of(await self._stand_in(self._timer_draft(name, seconds, wake_at)))

    async def start_timer(
        self, name: str, seconds: float | None = None, *, wake_at: int | None = None
    ) -> WaitStep:
        """Start a timer and go on: to `select` over it. Cancelling the caller leaves it running."""
        return await self._open(self._timer_draft(name, seconds, wake_at), result_of)

    # ---- several ----------------------------------------------------------------------------------

    async def select(self, *steps: Step) -> Step:
        """Wait until the first of these steps ends, however it ends; withdraw the others, and return it.

        Steps are signals (`open_wait`), timers (`start_timer`), approvals (`ask_approval`) and children (`start`).
        A controller that is run again is given the same one. `await step.outcome()` or `step.result()` of it says
        how it ended. Waits, and children that have not begun, are withdrawn together with its end: an answer that
        comes afterwards is for the next wait. Children that run are stopped.

        Cancelling only stops the waiting; as long as none has ended, nothing is withdrawn.

        Raises:
            ValueError: There is nothing to select from.
            TypeError: Something is no step, but perhaps the coroutine of one: `await` it first.
            CancelPending: A cancel is requested.
        """
        among = distinct(steps)
        if not among:
            raise ValueError("select needs at least one step.")
        await self._standing.stand([step.task_id for step in among], withdraw=True)
        winner = await anext(Completed(among))
        # Those that nobody had begun are withdrawn already, where the first was seen to end.
        for loser in reversed(among):
            if loser != winner:
                await loser.cancel()
        return winner

    # ---- approvals --------------------------------------------------------------------------------

    async def approve(
        self,
        prompt: str,
        items: Json = None,
        *,
        name: str | None = None,
        roles: Sequence[str] | Mapping[str, int] = (),
        approvers: Sequence[str] = (),
        quorum: int | None = None,
        veto: bool | Sequence[str] = True,
        requested_by: str | None = None,
        four_eyes: bool = False,
        expires: float | None = None,
        remind: Sequence[float] = (),
        schema: Any = None,
    ) -> Decision:
        """Ask people to decide about exactly these items, and return what they decided. A refusal is a value.

        The votes (`flows.vote`) are bound to a hash of what was shown, to this step, and to this flow as this
        controller knows it: once somebody else changes the flow, or if he has already, the answer is `stale`. What
        was approved is used by passing the decision on: `flow.run(pay, decision.items, approval=decision)`.

        A vote may be an edit: then its items are what is decided about, it counts as an approval of them, and the
        others have to vote again. So where two people must agree on what is done, say `quorum=2` or `four_eyes`.

        Args:
            prompt: The question, for people.
            items: What is decided about, as JSON: best the very input of the step that will do it.
            name: The step's name in this flow; `approval` with `#2` and so on for later calls unless given.
            roles: Who may vote, in any mixture: two of one role are two. As a mapping, how many approvals of each
                role are needed.
            approvers: The closed list of those who may vote, where there is one.
            quorum: How many must approve; unless given, as many as `roles` ask for, or one.
            veto: Whose rejection ends it: everybody's, nobody's, or that of these roles.
            requested_by: Who wants it done; may not vote where `four_eyes`.
            four_eyes: Nobody approves what he has asked for himself: `requested_by` has no vote, and an edit is no
                approval; its items need the `quorum` of others, and their editor has no other vote on them.
            expires: Seconds until the question, and an approval that was not used, are void.
            remind: Seconds before that at which the owner is reminded.
            schema: What edited items must fit, as for `wait`.

        Raises:
            ValueError, TypeError: Rules that can never be met, or make no sense, or a name that is not printable or
                not in Unicode normal form C.
            CancelPending: A cancel is requested.

        Cancelling the caller leaves the question open: the same step finds it again.
        """
        draft = self._approval_draft(
            prompt, items, name, roles, approvers, quorum, veto, requested_by, four_eyes,
            expires, remind, schema, beside=False,
        )  # fmt: skip
        return _decision(await self._stand_in(draft), draft)

    async def ask_approval(
        self,
        prompt: str,
        items: Json = None,
        *,
        name: str | None = None,
        roles: Sequence[str] | Mapping[str, int] = (),
        approvers: Sequence[str] = (),
        quorum: int | None = None,
        veto: bool | Sequence[str] = True,
        requested_by: str | None = None,
        four_eyes: bool = False,
        expires: float | None = None,
        remind: Sequence[float] = (),
        schema: Any = None,
    ) -> WaitStep:
        """Ask for an approval and go on: to send its `token` and `digest` to the voters.

        Arguments as for `approve`. `result()` of the step answers what they decided, as does `approve`, called
        with the same.

        Cancelling the caller after acceptance leaves the question open.
        """
        draft = self._approval_draft(
            prompt, items, name, roles, approvers, quorum, veto, requested_by, four_eyes,
            expires, remind, schema, beside=True,
        )  # fmt: skip
        return await self._open(draft, partial(_decision, draft=draft))

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
        told = _answer(task, on_timeout, None)
        if told is None:
            return None
        body = _as_shape(task, told["body"], schema)
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

    # ---- making and taking steps ------------------------------------------------------------------

    async def _stand_in(self, draft: TaskDraft) -> Task:
        """Wait for one step that runs nothing."""
        assert draft.run_id is not None
        [begun] = await self._standing.stand([draft.run_id], [draft])
        return await Step(self._steps, draft.run_id, begun).ended()

    async def _open(self, draft: TaskDraft, read: Callable[[Task], Any]) -> WaitStep:
        assert draft.run_id is not None
        [begun] = await self._steps.begin([draft])
        return WaitStep(self._steps, self._standing, draft.run_id, begun, read)

    def _signal_draft(
        self,
        name: str,
        timeout: float | None,
        on_timeout: str,
        remind: Sequence[float],
        prompt: str | None,
        schema: Any,
        key: Mapping[str, Json] | None,
        fields: Mapping[str, Json],
    ) -> TaskDraft:
        step = arguments.text(name, "name")
        named = arguments.wait_fields(key, fields)
        wait = self._wait(WaitKind.SIGNAL, timeout, on_timeout, remind, prompt, schema, named)
        wait = msgspec.structs.replace(wait, inbox=inbox_of(WaitKind.SIGNAL, step))
        return self._steps.plain_draft(WaitKind.SIGNAL, step, wait=wait)

    def _timer_draft(self, name: str, seconds: float | None, wake_at: int | None) -> TaskDraft:
        step = arguments.text(name, "name")
        if (seconds is None) == (wake_at is None):
            raise ValueError("give either seconds or wake_at.")
        at = arguments.instant(wake_at, "wake_at")
        if at is None:
            wait = arguments.duration(seconds, "seconds")
            at = self._steps.engine.clock.now() + round(wait * 1000)
        timer = Wait(kind=WaitKind.TIMER, deadline_at=at)
        return self._steps.plain_draft(WaitKind.TIMER, step, wait=timer)

    def _wait(
        self,
        kind: WaitKind,
        timeout: float | None,
        on_timeout: str,
        remind: Sequence[float],
        prompt: str | None,
        schema: Any,
        key: dict[str, Json] | None = None,
    ) -> Wait:
        engine = self._steps.engine
        most = engine.limits.wait_bytes
        seconds = arguments.seconds(timeout, "timeout")
        now = engine.clock.now()
        deadline = None if seconds is None else now + round(seconds * 1000)
        return Wait(
            kind=kind,
            key=UNSET if key is None else self._steps.encode_or_raise(key, "key", max_bytes=most),
            wait_key=None if key is None else wait_keys.wait_key(self._steps.key.owner_key, key),
            token=engine.ids.token(),
            prompt=arguments.optional_text(prompt, "prompt"),
            schema=UNSET
            if schema is None
            else self._steps.encode_or_raise(shapes.schema_of(schema), "schema", max_bytes=most),
            deadline_at=deadline,
            on_timeout=arguments.choice(on_timeout, OnTimeout, "on_timeout"),
            remind_at=arguments.reminders(remind, deadline, now),
        )

    def _approval_draft(
        self,
        prompt: str,
        items: Json,
        name: str | None,
        roles: Sequence[str] | Mapping[str, int],
        approvers: Sequence[str],
        quorum: int | None,
        veto: bool | Sequence[str],
        requested_by: str | None,
        four_eyes: bool,
        expires: float | None,
        remind: Sequence[float],
        schema: Any,
        *,
        beside: bool,
    ) -> TaskDraft:
        wait = self._wait(WaitKind.APPROVAL, expires, "fail", remind, prompt, schema)
        rules = Rules(
            quorum=_quorum(quorum, roles),
            roles=arguments.names(roles, "roles"),
            role_quorum=arguments.quorums(roles, "roles"),
            approvers=arguments.names(approvers, "approvers"),
            veto=_veto(veto),
            requested_by=arguments.optional_identity(requested_by, "requested_by"),
            four_eyes=arguments.flag(four_eyes, "four_eyes"),
        )
        encoded = self._steps.encode_or_raise(items, "items")
        shown = arguments.text(prompt, "prompt")
        flow_id = self._steps.key.flow_id
        question = approvals.shown_digest(encoded, rules, prompt=shown, flow_id=flow_id, step="")
        step = self._question_step(name, question, beside=beside)
        approval = approvals.open_approval(
            encoded,
            rules,
            prompt=shown,
            flow_id=flow_id,
            step=step,
            revision=self.flow.revision,
        )
        wait = msgspec.structs.replace(
            wait, inbox=inbox_of(WaitKind.APPROVAL, step), approval=approval
        )
        return self._steps.plain_draft(WaitKind.APPROVAL, step, wait=wait)

    def _question_step(self, name: str | None, question: str, *, beside: bool) -> str:
        """The step's name; without one, `approve` waits for what was asked beside already."""
        asked = self._questions[question]
        if name is None and asked and not beside:
            return asked.popleft()
        step = self._steps.name(name, "approval")
        if name is None and beside:
            asked.append(step)
        return step


def _quorum(quorum: int | None, roles: Sequence[str] | Mapping[str, int]) -> int:
    needed = arguments.optional_count(quorum, "quorum")
    return needed or sum(arguments.quorums(roles, "roles").values()) or 1


def _veto(veto: bool | Sequence[str]) -> tuple[str, ...]:
    if isinstance(veto, bool):
        return (approvals.EVERYBODY,) if veto else ()
    return arguments.names(veto, "veto")


def _answer(task: Task, on_timeout: str, schema: Any) -> Any:
    if isinstance(outcome_of(task), TimedOut) and on_timeout == OnTimeout.RESUME:
        return None
    return _as_shape(task, result_of(task), schema)


def _as_shape(task: Task, value: Json, schema: Any) -> Any:
    """The answer as an instance of the type that was asked for.

    Raises:
        WrongShape: The type asks for more than its schema can say.
    """
    if schema is None or isinstance(schema, Mapping):
        return value
    try:
        return msgspec.convert(value, schema, str_keys=True)
    except msgspec.ValidationError:
        pass
    try:
        # To a schema 1.0 is an integer.
        return msgspec.convert(_whole(value), schema, str_keys=True)
    except msgspec.ValidationError as error:
        failure = Failure(kind="wrong_shape", code="WrongShape", message=str(error))
        raise WrongShape(task.task_id, task.run_id, failure) from error


def _whole(value: Json) -> Json:
    """The same with integers for whole floats."""
    if isinstance(value, dict):
        return {name: _whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _decision(task: Task, draft: TaskDraft) -> Decision:
    """What is on record, if it is about what is asked now."""
    name = task.run_id or task.task_id
    outcome = outcome_of(task)
    if isinstance(outcome, Cancelled):
        return Decision(name=name, verdict=Verdict.WITHDRAWN, reason="The question was withdrawn.")
    told = result_of(task)
    assert draft.wait is not None and draft.wait.approval is not None
    verdict = Verdict(told["verdict"])
    votes = msgspec.convert(told["votes"], type=list[Ballot])
    reason = _why(verdict, votes)
    if told["asked"] != draft.wait.approval.digest:
        verdict = Verdict.STALE
        reason = "What is asked now is not what was decided on."
    return Decision(
        name=name,
        verdict=verdict,
        items=told["items"],
        digest=told["digest"],
        votes=votes,
        reason=reason,
    )


def _why(verdict: Verdict, votes: Sequence[Ballot]) -> str:
    """Why an approval was not given, as it is on record."""
    match verdict:
        case Verdict.APPROVED:
            return ""
        case Verdict.EXPIRED:
            return "Its time was over before it was decided."
        case Verdict.STALE:
            return "The flow was changed after it was asked."
    against = [vote for vote in votes if vote.kind == VoteKind.REJECT]
    if not against:
        return "It cannot be approved any more."
    said = [
        f"{vote.approver}: {vote.comment}" if vote.comment else vote.approver for vote in against
    ]
    return f"Rejected by {'; '.join(said[:_REASONS])}."
