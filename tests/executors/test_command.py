"""Programs as children: what reaches them, what comes back, and that nothing of them stays behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from flowstead.executors import (
    BadOutput,
    Command,
    CommandExecutor,
    CommandFailed,
    CommandNotStarted,
    OutputTooLarge,
    end_leftovers,
    find_leftovers,
    leftovers,
    program,
)
from tests.executors.stage import Attempt, Host, is_alive, outcome, python, until, zombies

HOSTILE = [
    "",
    " ",
    "a b",
    "$(id)",
    "`id`",
    "; exit 9",
    "| cat",
    "*",
    "~",
    "--",
    "-c",
    "'",
    '"',
    "\\",
    "\n",
    "\r\n",
    "%s%n",
    "\x01\x1b[2J\x7f",
    "\x9b",
    "ü€😀",
    "\u202e",
    "\ufeff",
    "x" * 100_000,
]

SHOW_BYTES = """
import json, os, sys
argv = [os.fsencode(argument).hex() for argument in sys.argv[1:]]
env = {name.hex(): value.hex() for name, value in os.environb.items()}
json.dump([argv, env], sys.stdout)
"""


async def run(command: Command, given: Any = None, **more: Any) -> Any:
    return await CommandExecutor().run(Attempt(spec=command, input=given, **more).call)


def wait_for_end(pid: int) -> None:
    """Wait on the loop, which thereby misses everything until then."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


# ---- what reaches the program ---------------------------------------------------------------------


async def test_arguments_and_environment_arrive_byte_by_byte() -> None:
    env = {f"V{number}": text for number, text in enumerate(HOSTILE)} | {"ü ;$(id)": "x"}

    argv, seen = await run(
        Command(python(SHOW_BYTES, *HOSTILE), env=env, result="json", stdin=None)
    )

    assert [bytes.fromhex(argument) for argument in argv] == [text.encode() for text in HOSTILE]
    arrived = {bytes.fromhex(name): bytes.fromhex(value) for name, value in seen.items()}
    assert {name: arrived[name.encode()] for name in env} == {
        name: text.encode() for name, text in env.items()
    }


async def test_only_the_allowed_part_of_our_environment_is_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "secret")
    monkeypatch.setenv("WANTED", "")
    monkeypatch.setenv("CHANGED", "ours")
    monkeypatch.setenv("FLOWSTEAD_TASK_ID", "somebody else's")
    attempt = Attempt(
        attempt=4,
        spec=Command(
            ["env", "-0"],
            pass_env=["PATH", "WANTED", "CHANGED", "NOT_SET", "FLOWSTEAD_TASK_ID"],
            env={"CHANGED": "theirs", "FLOWSTEAD_ATTEMPT": "99"},
        ),
    )

    said = await CommandExecutor().run(attempt.call)

    assert sorted(said.rstrip("\0").split("\0")) == [
        "CHANGED=theirs",
        "FLOWSTEAD_ATTEMPT=4",
        f"FLOWSTEAD_TASK_ID={attempt.context.task_id}",
        f"PATH={os.environ['PATH']}",
        "WANTED=",
    ]


@pytest.mark.parametrize(
    ("stdin", "given", "read"),
    [
        ("json", {"ü": [1, None]}, '{"ü":[1,null]}\n'),
        ("json", None, "null\n"),
        ("text", "a\0\x1b\n", "a\0\x1b\n"),
        ("text", "", ""),
        (None, {"not": "given"}, ""),
    ],
)
async def test_the_input_is_what_the_program_reads(stdin: Any, given: Any, read: str) -> None:
    assert await run(Command(["cat"], stdin=stdin), given) == read


async def test_an_input_that_is_no_text_is_not_given_as_text() -> None:
    with pytest.raises(TypeError, match='stdin is "text", but the input is dict'):
        await run(Command(["cat"], stdin="text"), {})


async def test_it_runs_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)

    assert await run(Command(["pwd"], cwd=str(tmp_path), result="lines")) == [str(tmp_path)]
    assert await run(Command(["pwd"], cwd="sub", result="lines")) == [str(tmp_path / "sub")]
    assert await run(Command(["pwd"], result="lines")) == [str(tmp_path)]


@pytest.mark.parametrize(
    "code",
    ["import os; os.close(0); print('did not read')", "import os; os.read(0, 1); print('did not')"],
)
async def test_a_program_that_does_not_read_its_input_has_its_result_all_the_same(
    code: str,
) -> None:
    said = await run(Command(python(code), stdin="text", result="lines"), "x" * 3_000_000)

    assert said[0].startswith("did not")


async def test_input_and_output_of_any_size_pass_each_other() -> None:
    given = "0123456789abcdef" * 200_000

    said = await run(Command(["cat"], stdin="text", max_output=len(given)), given)

    assert said == given


# ---- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "written", "answer"),
    [
        ("text", "a\n\0\x1b[2J\r\n", "a\n\0\x1b[2J\r\n"),
        ("text", "", ""),
        ("lines", "a\n\nb\r\n", ["a", "", "b\r"]),
        ("lines", "a\nb", ["a", "b"]),
        ("lines", "", []),
        ("lines", "\n", [""]),
        ("json", ' {"a": [1, "\\u00fc"]}\n', {"a": [1, "ü"]}),
    ],
)
async def test_the_output_is_the_result(result: Any, written: str, answer: Any) -> None:
    assert await run(Command(["cat"], stdin="text", result=result), written) == answer


@pytest.mark.parametrize("written", ["", "nul", "[1", "[NaN]", "[" * 100_000, "\x1b[2J"])
async def test_what_is_no_json_is_not_taken_for_it(written: str) -> None:
    with pytest.raises(BadOutput, match="cat did not write JSON: ") as caught:
        await run(Command(["cat"], stdin="text", result="json"), written)

    assert str(caught.value).isprintable()


async def test_what_was_written_before_the_end_is_taken_although_the_loop_came_late() -> None:
    code = (
        "import fcntl, os\n"
        "size = fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)\n"
        "os.write(1, b'x' * size)\nos.write(2, b'y' * 1000)"
    )
    started = program.start(
        [arg.encode() for arg in python(code)], cwd=None, env={}, has_input=False
    )
    wait_for_end(started.process.pid)
    output: list[bytes] = []
    errors: list[bytes] = []

    late = program.Program(started, given=b"", on_output=output.append, on_errors=errors.append)
    late.close()

    assert late.reap() == 0
    assert b"".join(output) == b"x" * (1 << 20)
    assert b"".join(errors) == b"y" * 1000
    await late.ended


async def test_what_is_not_utf8_is_marked_in_texts_and_told_and_refused_in_json(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flowstead")
    latin = ["printf", r'"\374"']
    true = ["printf", "\ufffd"]

    assert await run(Command(true)) == "\ufffd"
    assert not caplog.records
    assert await run(Command(latin)) == '"\ufffd"'
    assert [record.message for record in caplog.records] == ["command.output_not_utf8"]
    with pytest.raises(BadOutput):
        await run(Command(latin, result="json"))


async def test_a_bad_exit_is_told_with_the_end_of_what_was_said() -> None:
    code = r"printf 'one\ntwo \033]0;x\007\377' >&2; exit 3"

    with pytest.raises(CommandFailed) as caught:
        await run(Command(["sh", "-c", code]))

    error = caught.value
    assert (error.program, error.returncode) == ("sh", 3)
    assert error.stderr == "one\\ntwo \\x1b]0;x\\x07\N{REPLACEMENT CHARACTER}"
    assert str(error) == f"sh exited with status 3: {error.stderr}"


async def test_statuses_and_signals_may_count_as_success() -> None:
    assert await run(Command(["sh", "-c", "echo x; exit 3"], ok_codes=[0, 3])) == "x\n"
    assert await run(Command(["sh", "-c", "kill -PIPE $$"], ok_codes=[-13])) == ""
    with pytest.raises(CommandFailed, match="exited with status 0"):
        await run(Command(["true"], ok_codes=[1]))
    with pytest.raises(CommandFailed, match="sh was ended by SIGKILL"):
        await run(Command(["sh", "-c", "kill -KILL $$"]))


async def test_of_a_flood_of_errors_the_end_is_kept_and_each_piece_is_a_sign_of_life() -> None:
    code = "import os\nfor n in range(100): os.write(2, b'%05d' % n * 20000)\nraise SystemExit(1)"
    attempt = Attempt(spec=Command(python(code)))

    with pytest.raises(CommandFailed) as caught:
        await CommandExecutor().run(attempt.call)

    assert caught.value.stderr.endswith("00099" * 800)
    assert len(caught.value.stderr) == 4096
    assert attempt.touches > 100


async def test_output_over_the_cap_is_an_error_and_is_read_to_its_end_without_being_kept() -> None:
    code = "import os, sys\nfor _ in range(200): os.write(1, b'x' * 65536)\nos.write(2, b'through')"
    attempt = Attempt(spec=Command(python(code + "\nsys.exit(int(sys.argv[1]))", "0")))

    with pytest.raises(OutputTooLarge, match="wrote more than 1048576 bytes"):
        await CommandExecutor().run(attempt.call)
    with pytest.raises(CommandFailed, match="through"):
        await run(Command(python(code + "\nsys.exit(int(sys.argv[1]))", "5")))

    assert await run(Command(["printf", "1234"], max_output=4)) == "1234"
    with pytest.raises(OutputTooLarge):
        await run(Command(["printf", "12345"], max_output=4))
    assert attempt.touches >= 200


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (Command(["no-such-program"]), "there is no program of that name on its PATH."),
        (Command(["/no/such"]), "there is no such program, or the interpreter it names is"),
        (Command(["ls"], pass_env=[], env={"PATH": "/no"}), "there is no program of that name"),
        (Command(["ls"], cwd="/no\x1b/such"), "the working directory /no\\x1b/such does not exist"),
        (Command(["/"]), "Permission denied."),
        (Command(["ls", *["x" * 100_000] * 50]), "Argument list too long."),
    ],
)
async def test_what_cannot_be_started_says_why(command: Command, problem: str) -> None:
    with pytest.raises(CommandNotStarted) as caught:
        await run(command)

    assert problem in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_status_that_somebody_else_took_is_told() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(CommandFailed, match="its exit status was taken by something else"):
            await run(Command(["true"]))
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_only_commands_are_run() -> None:
    with pytest.raises(TypeError, match="runs a Command, not list"):
        await CommandExecutor().run(Attempt(spec=["ls"]).call)


# ---- stopping -------------------------------------------------------------------------------------

OBEYS = "import signal, sys\nprint(flush=True)\nsignal.pause()"
CLEANS_UP = """
import pathlib, signal, sys
def stop(*_):
    pathlib.Path(sys.argv[1]).write_text("clean")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print(flush=True)
while True: signal.pause()
"""
IGNORES = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child: print(child, flush=True)
while True: signal.pause()
"""


class Stopping:
    """A program that runs, to be stopped."""

    def __init__(self, code: str, *args: str, **given: Any) -> None:
        self.attempt = Attempt(spec=Command(python(code, *args), stdin=None), **given)
        self.scope = anyio.CancelScope()
        self.task: asyncio.Task[None]

    async def begin(self) -> list[int]:
        """Start it and wait for its first word; answers the numbers of all its processes."""
        self.task = asyncio.create_task(self.run())
        with anyio.fail_after(60):
            await self.attempt.alive.wait()
        pids = find_leftovers(self.attempt.context.task_id)
        assert pids, "vacuous: nothing runs"
        return pids

    async def run(self) -> None:
        with self.scope:
            await CommandExecutor().run(self.attempt.call)


async def test_cancelling_asks_the_program_to_end_and_waits_until_it_has(tmp_path: Path) -> None:
    stopping = Stopping(CLEANS_UP, str(tmp_path / "said"))
    pids = await stopping.begin()

    stopping.scope.cancel()
    await stopping.task

    assert stopping.scope.cancelled_caught
    assert (tmp_path / "said").read_text() == "clean"
    assert not any(map(is_alive, pids))


async def test_a_program_that_will_not_end_is_waited_for_until_it_is_killed() -> None:
    stopping = Stopping(IGNORES)
    await stopping.begin()
    await until(lambda: len(find_leftovers(stopping.attempt.context.task_id)) == 2, "it has forked")
    pids = find_leftovers(stopping.attempt.context.task_id)

    stopping.scope.cancel()
    await anyio.wait_all_tasks_blocked()
    stopping.scope.cancel()
    await anyio.wait_all_tasks_blocked()
    was_waiting = not stopping.task.done() and all(map(is_alive, pids))
    stopping.attempt.kill()
    await outcome(stopping.task)

    assert was_waiting
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("was_asked", [False, True])
async def test_a_loop_at_its_end_does_not_wait_for_a_program_that_will_not(was_asked: bool) -> None:
    stopping = Stopping(IGNORES)
    pids = await stopping.begin()
    if was_asked:
        stopping.scope.cancel()
        await anyio.wait_all_tasks_blocked()

    stopping.task.cancel()
    error = await outcome(stopping.task)

    assert was_asked or isinstance(error, asyncio.CancelledError)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("is_native", [False, True])
async def test_a_program_cancelled_while_it_starts_ends(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = Stopping(OBEYS)
    is_starting, may_start = threading.Event(), threading.Event()

    def start(*args: Any, **more: Any) -> program.Started:
        is_starting.set()
        assert may_start.wait(20)
        return program.start(*args, **more)

    monkeypatch.setattr("flowstead.executors.command.start", start)
    stopping.task = asyncio.create_task(stopping.run())
    assert await anyio.to_thread.run_sync(is_starting.wait, 20)

    if is_native:
        stopping.task.cancel()
    else:
        stopping.scope.cancel()
    await anyio.wait_all_tasks_blocked()
    was_waiting = not stopping.task.done()
    may_start.set()
    error = await outcome(stopping.task)

    assert was_waiting

    assert stopping.scope.cancelled_caught != is_native
    assert isinstance(error, asyncio.CancelledError) == is_native
    assert stopping.attempt.kills, "vacuous: it was cancelled before it started"
    assert find_leftovers(stopping.attempt.context.task_id) == []


async def test_nothing_is_started_once_it_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "started"

    with anyio.CancelScope() as scope:
        scope.cancel()
        await run(Command(["touch", str(path)]))

    assert scope.cancelled_caught
    assert not path.exists()


async def test_a_stopped_program_wakes_up_to_end() -> None:
    stopping = Stopping(OBEYS)
    pids = await stopping.begin()
    os.kill(pids[0], signal.SIGSTOP)

    stopping.scope.cancel()
    await stopping.task

    assert not any(map(is_alive, pids))


async def test_killing_without_asking_is_told_as_a_kill_and_is_harmless_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping = Stopping(IGNORES)
    await stopping.begin()

    stopping.attempt.kill()
    error = await outcome(stopping.task)
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: signalled.append(group))
    stopping.attempt.kill()

    assert isinstance(error, CommandFailed)
    assert error.returncode == -signal.SIGKILL
    # Its number may be somebody else's by now.
    assert signalled == []


# ---- what is left behind --------------------------------------------------------------------------

IN_GROUP = "sleep 1000 & echo $!"
DAEMON = """
import os, signal
heard, said = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid(), flush=True)
        os.write(said, b"x")
        while True: signal.pause()
    os._exit(0)
os.wait()
os.read(heard, 1)
"""
HOPS = """
import os, pathlib, sys
heard, said = os.pipe()
if os.fork():
    os.read(heard, 1)
    print("hops")
else:
    for hop in range(20000):
        if os.fork(): os._exit(0)
        if hop == 100: os.write(said, b"x")
    pathlib.Path(sys.argv[1]).touch()
"""
GETS_AWAY = """
import os, sys
heard, said = os.pipe()
child = os.fork()
if not child:
    os.setsid()
    os.execve(sys.executable, [sys.executable, "-S", "-c", "import signal; signal.pause()"], {})
os.close(said)
os.read(heard, 1)                               # until its exec has closed the other end
print(child)
"""


@pytest.mark.parametrize(
    "argv", [["sh", "-c", IN_GROUP], python(DAEMON)], ids=["in the group", "out of the session"]
)
async def test_what_a_program_that_ended_well_leaves_behind_is_killed_and_told(
    argv: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    attempt = Attempt(spec=Command(argv))

    said = await CommandExecutor().run(attempt.call)

    [pid] = map(int, said.split())
    assert not is_alive(pid)
    [record] = caplog.records
    assert record.message == "command.leftovers"
    assert (record.pids, record.count) == ([pid], 1)  # type: ignore[attr-defined]
    assert record.task_id == attempt.context.task_id  # type: ignore[attr-defined]


async def test_one_that_keeps_changing_its_number_does_not_outrun_us(tmp_path: Path) -> None:
    attempt = Attempt(spec=Command(python(HOPS, str(tmp_path / "through"))))

    assert await CommandExecutor().run(attempt.call) == "hops\n"

    assert find_leftovers(attempt.context.task_id) == []
    assert not (tmp_path / "through").exists()


async def test_one_that_gets_away_with_our_pipes_does_not_hold_us_up() -> None:
    pid = int(await run(Command(python(GETS_AWAY))))

    was_alive = is_alive(pid)
    os.kill(pid, signal.SIGKILL)

    assert was_alive


async def test_what_another_attempt_started_is_not_ours_to_end() -> None:
    ours = Stopping(OBEYS)
    [our_pid] = await ours.begin()
    theirs = Stopping(OBEYS, task_id=ours.attempt.context.task_id, attempt=2)
    [their_pid] = set(await theirs.begin()) - {our_pid}

    ours.scope.cancel()
    await ours.task

    assert (is_alive(our_pid), is_alive(their_pid)) == (False, True)
    theirs.scope.cancel()
    await theirs.task


@pytest.mark.parametrize("without", ["handles", "proc"])
async def test_without_the_help_of_linux_the_group_is_ended_all_the_same(
    without: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(pid: int) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    if without == "proc":
        monkeypatch.setattr(leftovers, "_PROC", str(tmp_path))

    pid = int(await run(Command(["sh", "-c", IN_GROUP])))
    with pytest.raises(CommandFailed, match="status 3"):
        await run(Command(["sh", "-c", "exit 3"]))

    assert not is_alive(pid)


async def test_without_threads_to_be_had_what_runs_is_still_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping = Stopping(IGNORES)
    pids = await stopping.begin()

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    stopping.attempt.kill()
    error = await outcome(stopping.task)
    not_started = await outcome(run(Command(["true"])))

    assert isinstance(error, CommandFailed)
    assert isinstance(not_started, RuntimeError)
    assert not any(map(is_alive, pids))


async def test_a_program_that_cannot_be_watched_is_ended_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: program.Program) -> None:
        raise RuntimeError("no more of anything")

    monkeypatch.setattr(program.Program, "_notice_end", refuse)
    attempt = Attempt(spec=Command(["sleep", "1000"]))
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(RuntimeError, match="no more of anything"):
        await CommandExecutor().run(attempt.call)

    assert find_leftovers(attempt.context.task_id) == []
    assert set(os.listdir("/proc/self/fd")) == before


async def test_orphans_that_become_our_children_are_reaped() -> None:
    with Host("inherits") as host:
        said = await anyio.to_thread.run_sync(host.says)

    assert said == "4 [] []"


async def test_two_hundred_commands_leave_no_handle_no_zombie_and_no_thread() -> None:
    await run(Command(["true"]))
    handles = len(os.listdir("/proc/self/fd"))
    ends: list[Any] = []

    async def several(number: int) -> None:
        for turn in range(20):
            command = [
                Command(["true"]),
                Command(["sh", "-c", "exit 1"]),
                Command(["no-such-program"]),
                Command(["sh", "-c", "sleep 1000 & echo"], max_output=1),
            ][(number + turn) % 4]
            ends.append(await outcome(run(command, "x" * 1000)))

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(several, number)

    kinds = [type(end).__name__ for end in ends]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "str": 100,
        "CommandFailed": 50,
        "CommandNotStarted": 50,
    }
    assert zombies() == []
    assert psutil.Process().children() == []
    assert len(os.listdir("/proc/self/fd")) == handles
    await until(
        lambda: all(t.name != "flowstead command" for t in threading.enumerate()), "no threads"
    )


def test_a_loop_in_another_thread_runs_programs_as_well() -> None:
    results: list[Any] = []

    def work() -> None:
        results.append(asyncio.run(run(Command(["cat"], result="json"), {"a": 1})))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)

    assert results == [{"a": 1}]


# ---- after our own death --------------------------------------------------------------------------


async def _left_by_the_dead(task_id: str, path: Path) -> list[int]:
    """Have a host run a program and die of kill -9; answers the processes that live on."""

    def lines() -> list[str]:
        return path.read_text().split() if path.exists() else []

    with Host("command", task_id, str(path)) as host:
        await until(lambda: len(lines()) == 3, "all are up")
        host.kill()
    pids = [int(line) for line in lines()]
    assert all(map(is_alive, pids)), "vacuous: they died with their host"
    return pids


@pytest.mark.crash
async def test_leftovers_of_a_dead_process_are_found_by_their_mark_and_ended(
    tmp_path: Path,
) -> None:
    task_id = Attempt().context.task_id
    pids = await _left_by_the_dead(task_id, tmp_path / "pids")

    found = find_leftovers(task_id)
    others = find_leftovers(task_id + "0")
    ended = await anyio.to_thread.run_sync(end_leftovers, task_id)

    assert found == sorted(pids)
    assert others == []
    assert ended == sorted(pids)
    assert not any(map(is_alive, pids))
    assert end_leftovers(task_id) == []


@pytest.mark.crash
async def test_an_interrupted_child_first_ends_what_its_earlier_attempt_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = Attempt().context.task_id
    pids = await _left_by_the_dead(task_id, tmp_path / "pids")
    # Who reaps them, and when, is up to the system.
    look = (
        "import os, sys\n"
        "for path in filter(os.path.exists, [f'/proc/{pid}/stat' for pid in sys.argv[1:]]):\n"
        "    print(open(path).read().rpartition(') ')[2][0])"
    )
    attempt = Attempt(
        task_id=task_id,
        attempt=2,
        interrupted=True,
        spec=Command(python(look, *map(str, pids)), stdin=None, result="lines"),
    )

    seen = await CommandExecutor().run(attempt.call)

    assert set(seen) <= {"Z"}
    [record] = caplog.records
    assert record.message == "command.leftovers"
    assert record.pids == sorted(pids)  # type: ignore[attr-defined]


@pytest.mark.crash
@pytest.mark.parametrize("is_native", [False, True])
async def test_an_interrupted_child_that_is_cancelled_ends_leftovers_and_starts_nothing(
    is_native: bool, tmp_path: Path
) -> None:
    task_id = Attempt().context.task_id
    pids = await _left_by_the_dead(task_id, tmp_path / "pids")
    started = tmp_path / "started"
    attempt = Attempt(
        task_id=task_id,
        attempt=2,
        interrupted=True,
        spec=Command(["touch", str(started)], stdin=None),
    )
    scope = anyio.CancelScope()

    async def work() -> None:
        with scope:
            if not is_native:
                scope.cancel()
            await CommandExecutor().run(attempt.call)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    if is_native:
        task.cancel()
    error = await outcome(task)

    assert isinstance(error, asyncio.CancelledError) == is_native
    assert scope.cancelled_caught != is_native
    assert not any(map(is_alive, pids))
    assert not started.exists()


# ---- whom we signal -------------------------------------------------------------------------------


async def test_a_process_of_the_same_number_but_another_start_is_not_signalled() -> None:
    stopping = Stopping(OBEYS)
    [pid] = await stopping.begin()
    seen = leftovers.look_at(pid)
    assert seen is not None

    missed = leftovers.kill_exactly(seen._replace(started=seen.started - 1))
    was_alive = is_alive(pid)
    hit = leftovers.kill_exactly(seen)
    await outcome(stopping.task)

    assert (missed, was_alive, hit) == (False, True, True)
    assert not leftovers.kill_exactly(seen)
    assert not is_alive(pid)


async def test_whom_we_may_not_kill_is_given_up_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = Stopping(OBEYS)
    [pid] = await stopping.begin()
    task_id = stopping.attempt.context.task_id

    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(signal, "pidfd_send_signal", refuse)
        attempt = Attempt(task_id=task_id, interrupted=True, spec=Command(["true"]), attempt=2)
        await CommandExecutor().run(attempt.call)

    assert is_alive(pid)
    [record] = caplog.records
    assert record.not_ours_to_kill == [pid]  # type: ignore[attr-defined]
    stopping.scope.cancel()
    await stopping.task


def test_a_marked_process_is_ourselves_never(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = psutil.Process().environ()
    name, value = next((n, v) for n, v in environment.items() if n and v)
    hunt = leftovers.Hunt("whatever")
    monkeypatch.setattr(hunt, "_marks", [f"\0{name}={value}\0".encode()])

    assert os.getpid() not in [seen.pid for seen in hunt.find()]
