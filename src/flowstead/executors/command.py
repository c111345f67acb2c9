"""Programs as children: an argument list, never a shell, in a session of its own, under a mark.

What is held, whatever the program does:

- Nothing of it is left when `CommandExecutor.run` is over. The leader's end is the end: what it left in its group
  is killed, and on Linux also what left the group (see `leftovers` for the one that gets away). A program that is
  to live on is not a child.
- A child that does not read its input, closes its output, writes without end or not in UTF-8, or leaves its output
  to a grandchild, neither hangs us nor fills our memory.
- Arguments and environment arrive byte by byte as given, in UTF-8. What it says reaches messages on one line, with
  control characters escaped.
- If our process dies, the program lives on; its child is marked as external, and the next attempt first ends what
  carries its mark.

It works on a loop in any thread and needs no child watcher. A host that reaps children it does not know
(`waitpid(-1)`, SIGCHLD ignored) takes our exit statuses away; the child then fails, and says so.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Final, Literal, TypeVar

import anyio
import anyio.lowlevel
import msgspec
from msgspec.structs import force_setattr

from flowstead.executors.leftovers import ATTEMPT_MARK, TASK_MARK, Hunt, wait_until_gone
from flowstead.executors.port import Call
from flowstead.executors.program import (
    Patience,
    Program,
    Started,
    how_it_ended,
    in_thread,
    start,
)
from flowstead.log import get_logger
from flowstead.model.flow import Json
from flowstead.rules.user_json import is_encodable

log = get_logger(__name__)

T = TypeVar("T")

_STDERR_KEPT: Final = 4096
_STDERR_TOLD: Final = 300
_LONGEST_NAME: Final = 80


class _Argv(msgspec.Struct, frozen=True):
    argv: Sequence[str]


class Command(_Argv, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A program to run as a child: `run=Command(["git", "fetch"], cwd="/srv/repo")`.

    It is stored with the child, in clear. A secret goes into the host's environment, and its name into `pass_env`.

    Attributes:
        argv: The program and its arguments. There is no shell: nothing is split, expanded or quoted.
        cwd: Where it runs, perhaps relative to the host's own working directory; there, if None.
        env: More environment variables, over those passed.
        pass_env: Names of the host's environment variables that it sees; no others. Beside these and `env` it
            gets FLOWSTEAD_TASK_ID and FLOWSTEAD_ATTEMPT, by which it is found again.
        stdin: What it reads: the child's input as a line of JSON, as it is ("text", for an input that is a string),
            or nothing.
        result: What its standard output is: JSON, or a text, or a list of its lines. In texts and lines, bytes
            that are not UTF-8 become U+FFFD, and that is logged; JSON that is not UTF-8 is an error.
        max_output: Most bytes of standard output; with more the child fails, once the program has ended.
        ok_codes: The exit statuses that count as success; negative ones stand for signals.

    Raises:
        TypeError: A field is of the wrong type; among others, if `argv` is a single string.
        ValueError: No program could be started with it.
    """

    cwd: str | None = None
    env: Mapping[str, str] | None = None
    pass_env: Sequence[str] = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
    stdin: Literal["json", "text"] | None = "json"
    result: Literal["json", "text", "lines"] = "text"
    max_output: int = 1024 * 1024
    ok_codes: Sequence[int] = (0,)

    @property
    def label(self) -> str:
        """The usual name of its step: the program, without its folder."""
        return posixpath.basename(self.argv[0]) or "command"

    def __post_init__(self) -> None:
        argv = _texts(self.argv, "argv", "There is no shell: give one string for each argument.")
        if not argv or not argv[0]:
            raise ValueError("Command.argv must begin with the name of a program.")
        names = _texts(self.pass_env, "pass_env", "Give a list of names.")
        env = None if self.env is None else _environment_of(self.env)
        for name in (*names, *(env or ())):
            if not name or "=" in name:
                raise ValueError(
                    f"Command: {name!r} cannot be the name of an environment variable."
                )
        if self.cwd is not None and not _text(self.cwd, "cwd"):
            raise ValueError("Command.cwd must not be empty.")
        if self.stdin not in ("json", "text", None):
            raise ValueError(f'Command.stdin must be "json", "text" or None, not {self.stdin!r}.')
        if self.result not in ("json", "text", "lines"):
            raise ValueError(
                f'Command.result must be "json", "text" or "lines", not {self.result!r}.'
            )
        if type(self.max_output) is not int or self.max_output < 1:
            raise ValueError(f"Command.max_output must be a positive int, not {self.max_output!r}.")
        codes = tuple(self.ok_codes)
        if not codes or not all(type(code) is int for code in codes):
            raise ValueError(f"Command.ok_codes must be ints, one at least, not {self.ok_codes!r}.")
        for field, value in (
            ("argv", argv),
            ("pass_env", names),
            ("env", env),
            ("ok_codes", codes),
        ):
            force_setattr(self, field, value)


class CommandError(Exception):
    """A program gave no result. `code` says in a word why."""

    code: str = "command_failed"


class CommandNotStarted(CommandError):
    """The program could not be started; nothing of it ran."""

    code = "not_started"

    def __init__(self, program: str, problem: str) -> None:
        super().__init__(program, problem)
        self.program = program
        self.problem = problem

    def __str__(self) -> str:
        return f"{_named(self.program)} could not be started: {self.problem}"


class CommandFailed(CommandError):
    """The program ended as it should not have.

    Attributes:
        program: The first of its arguments.
        returncode: Its exit status, negative for a signal; None if someone else in our process took it.
        stderr: The last 4 KiB of its standard error, with control characters escaped.
    """

    code = "exit_status"

    def __init__(self, program: str, returncode: int | None, stderr: str) -> None:
        super().__init__(program, returncode, stderr)
        self.program = program
        self.returncode = returncode
        self.stderr = stderr

    def __str__(self) -> str:
        ended = how_it_ended(self.returncode)
        if self.returncode is None:
            ended += ", but its exit status was taken by something else in this process"
        said = self.stderr
        if len(said) > _STDERR_TOLD:
            said = "…" + said[-_STDERR_TOLD:]
        return f"{_named(self.program)} {ended}" + (f": {said}" if said else "")


class OutputTooLarge(CommandError):
    """The program ended well, but wrote more than it was allowed to; none of it is kept."""

    code = "output_too_large"

    def __init__(self, program: str, max_output: int) -> None:
        super().__init__(program, max_output)
        self.program = program
        self.max_output = max_output

    def __str__(self) -> str:
        return f"{_named(self.program)} wrote more than {self.max_output} bytes (max_output)"


class BadOutput(CommandError):
    """The program ended well, but did not write the JSON it was to write."""

    code = "bad_output"

    def __init__(self, program: str, problem: str) -> None:
        super().__init__(program, problem)
        self.program = program
        self.problem = problem

    def __str__(self) -> str:
        return f"{_named(self.program)} did not write JSON: {self.problem}"


class CommandExecutor:
    """Runs programs. One that is cancelled gets SIGTERM, one that is killed SIGKILL, each with its whole group."""

    name: Final = "command"
    spec: Final = Command
    external: Final = True

    async def run(self, call: Call) -> Json:
        """Run the program to its end. Cancelling asks it to end, and waits until nothing of it is left.

        A program that had ended by itself before the cancellation came has its result.

        Raises:
            CommandError: It could not be started, or gave no result.
            TypeError: Its input is not what `stdin` says.
        """
        command = call.spec
        if not isinstance(command, Command):
            raise TypeError(f"the command executor runs a Command, not {type(command).__name__}.")
        patience = Patience()
        if call.interrupted:
            hunt = Hunt(call.context.task_id)
            while not await _thoroughly(hunt.pursue, patience):
                pass
            _tell_leftovers(call, hunt, "an interrupted attempt")
        _raise_if_stopped(call, patience)
        await anyio.lowlevel.checkpoint()
        given = _input_for(command, call.input)
        output = _Output(call, command.max_output)
        program = await _started(call, command, given or b"", output, patience)
        call.on_kill(program.kill)
        patience.insisted = program.kill
        await _wait_for_end(call, program, patience)
        returncode = await _leave_nothing(call, program, patience)
        _raise_if_cancelled(patience)
        return _result(command, returncode, output)


class _Output:
    """What is kept of a program's output, however much it writes."""

    def __init__(self, call: Call, most: int) -> None:
        self._touch = call.touch
        self._most = most
        self.kept = bytearray()
        self.errors = bytearray()
        self.is_too_large = False

    def take(self, piece: bytes) -> None:
        self._touch()
        room = self._most - len(self.kept)
        self.kept += piece[:room]
        self.is_too_large |= len(piece) > room

    def take_errors(self, piece: bytes) -> None:
        self._touch()
        self.errors += piece
        del self.errors[:-_STDERR_KEPT]


async def _started(
    call: Call, command: Command, given: bytes, output: _Output, patience: Patience
) -> Program:
    """Start the program. Cancelling waits until it has started, so that it can be stopped."""
    begin = partial(
        start,
        [argument.encode() for argument in command.argv],
        cwd=command.cwd,
        env=_environment_for(command, call.context.task_id, call.context.attempt),
        has_input=command.stdin is not None,
    )
    try:
        started: Started = await patience.wait(in_thread(begin))
    except OSError as error:
        _raise_if_stopped(call, patience)
        raise CommandNotStarted(command.argv[0], _why_not_started(command, error)) from error
    return Program(started, given=given, on_output=output.take, on_errors=output.take_errors)


async def _wait_for_end(call: Call, program: Program, patience: Patience) -> None:
    """Wait for the leader's end: ask for it when the child is stopped, force it when the loop is at its end."""
    stop = program.ask_to_end
    if patience.cancelled is not None:
        stop = program.kill
    elif call.is_stopped() and not program.ended.done():
        # It was asked to stop while the program was started; that may have passed unheard.
        patience.cancelled = _stopped()
    else:
        try:
            await asyncio.wait([program.ended])
        except asyncio.CancelledError as error:
            if not program.ended.done():
                patience.cancelled = error
                stop = program.ask_to_end if _is_asked_to_stop(call) else program.kill
    if not program.ended.done():
        stop()
        await patience.wait(program.ended)


def _is_asked_to_stop(call: Call) -> bool:
    """Whether a cancellation came of a scope; if not, it is one that comes but once, as from `asyncio.run`."""
    return call.is_stopped() or anyio.current_effective_deadline() == -inf


async def _leave_nothing(call: Call, program: Program, patience: Patience) -> int | None:
    """End whatever the leader left behind, close the pipes, and only then let go of its number."""
    hunt = Hunt(call.context.task_id, attempt=call.context.attempt, leader=program.leader)
    if program.leader is None:
        program.kill()
    else:
        if patience.cancelled is not None:
            await _thoroughly(hunt.linger, patience)
        while not await _thoroughly(hunt.pursue, patience):
            pass
    program.close()
    returncode = program.reap()
    if program.leader is None:
        await _thoroughly(partial(wait_until_gone, program.pid), patience)
    elif not hunt.is_group_gone():
        # Killed unseen by the last look, while it forked: it may still be on its way out.
        while not await _thoroughly(hunt.pursue, patience):
            pass
    _tell_leftovers(call, hunt, "its leader")
    return returncode


async def _thoroughly(work: Callable[[], T], patience: Patience) -> T:
    """Do what must not be left undone: in a thread, or here if there are no more."""
    try:
        done = in_thread(work)
    except RuntimeError:
        return work()
    return await patience.wait(done)


def _tell_leftovers(call: Call, hunt: Hunt, survived: str) -> None:
    if hunt.ended or hunt.refused:
        log.warning(
            "command.leftovers",
            flow_id=call.context.flow_id,
            task_id=call.context.task_id,
            survived=survived,
            count=len(hunt.ended),
            pids=sorted(hunt.ended),
            not_ours_to_kill=sorted(hunt.refused),
        )


def _raise_if_cancelled(patience: Patience) -> None:
    if patience.cancelled is not None:
        raise patience.cancelled


def _raise_if_stopped(call: Call, patience: Patience) -> None:
    """Heard or not: what is shielded may outlast the moments in which a cancellation is delivered."""
    _raise_if_cancelled(patience)
    if call.is_stopped():
        raise _stopped()


def _stopped() -> asyncio.CancelledError:
    return asyncio.CancelledError("the child was asked to stop")


def _result(command: Command, returncode: int | None, output: _Output) -> Json:
    program = command.argv[0]
    if returncode not in command.ok_codes:
        said = output.errors.decode(errors="replace").strip()
        raise CommandFailed(program, returncode, escaped(said))
    if output.is_too_large:
        raise OutputTooLarge(program, command.max_output)
    if command.result == "json":
        return _json(program, bytes(output.kept))
    text = output.kept.decode(errors="replace")
    if "\ufffd" in text and text.encode() != output.kept:
        log.info("command.output_not_utf8", program=_named(program))
    if command.result == "text":
        return text
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _json(program: str, written: bytes) -> Json:
    try:
        return msgspec.json.decode(written)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadOutput(program, escaped(str(error))) from None


def _input_for(command: Command, given: Json) -> bytes | None:
    if command.stdin is None:
        return None
    if command.stdin == "json":
        return msgspec.json.encode(given) + b"\n"
    if not isinstance(given, str):
        raise TypeError(f'Command.stdin is "text", but the input is {type(given).__name__}.')
    return given.encode()


def _environment_for(command: Command, task_id: str, attempt: int) -> dict[bytes, bytes]:
    host = os.environb
    passed = {name.encode() for name in command.pass_env} & host.keys()
    env = {name: host[name] for name in passed}
    env |= {name.encode(): value.encode() for name, value in (command.env or {}).items()}
    env[TASK_MARK.encode()] = task_id.encode()
    env[ATTEMPT_MARK.encode()] = str(attempt).encode()
    return env


def _why_not_started(command: Command, error: OSError) -> str:
    if command.cwd is not None and not os.path.isdir(command.cwd):
        return f"the working directory {escaped(command.cwd)} does not exist."
    if isinstance(error, FileNotFoundError):
        if os.path.dirname(command.argv[0]):
            return "there is no such program, or the interpreter it names is missing."
        return "there is no program of that name on its PATH."
    return f"{error.strerror or error}."


def escaped(text: str) -> str:
    """Text on one line that does nothing to a terminal: what does not print is spelt out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _named(program: str) -> str:
    name = escaped(program)
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _texts(given: Any, field: str, hint: str) -> tuple[str, ...]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(
            f"Command.{field} must be a sequence of strings, not {type(given).__name__}. {hint}"
        )
    return tuple(_text(item, field) for item in given)


def _text(given: Any, field: str) -> str:
    if not isinstance(given, str):
        raise TypeError(f"Command.{field} must be made of strings, not {type(given).__name__}.")
    if "\0" in given:
        raise ValueError(f"Command.{field} holds a NUL character, which no program can be given.")
    if not is_encodable(given):
        raise ValueError(f"Command.{field} holds a lone surrogate, which cannot be stored.")
    return given


def _environment_of(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise TypeError(f"Command.env must map strings to strings, not {type(given).__name__}.")
    return {_text(name, "env"): _text(value, "env") for name, value in given.items()}
