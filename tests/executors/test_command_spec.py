"""What a `Command` is made of: checked when it is made, kept as JSON, never a shell."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flowstead.executors import (
    BadOutput,
    Command,
    CommandFailed,
    CommandNotStarted,
    OutputTooLarge,
)
from flowstead.executors.command import escaped

FULL = Command(
    ["prog", "", "a b"],
    cwd="work",
    env={"A": "", "B": "x=y"},
    pass_env=["PATH"],
    stdin=None,
    result="lines",
    max_output=7,
    ok_codes=[0, 3, -13],
)


@pytest.mark.parametrize("command", [Command(["ls"]), Command(("ls", "-l")), FULL])
def test_a_command_survives_json(command: Command) -> None:
    stored = msgspec.json.encode(command)

    assert msgspec.json.decode(stored, type=Command) == command


def test_a_command_is_a_copy_of_what_it_was_made_of_and_cannot_be_changed() -> None:
    argv, env = ["ls"], {"A": "1"}
    command = Command(argv, env=env)

    argv.append("-l")
    env["A"] = "2"

    assert (command.argv, command.env) == (("ls",), {"A": "1"})
    with pytest.raises(AttributeError):
        command.cwd = "/"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Command(["ls"], "/")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"argv": "ls -l"}, "argv must be a sequence of strings, not str. There is no shell"),
        ({"argv": b"ls"}, "argv must be a sequence of strings, not bytes"),
        ({"argv": 7}, "argv must be a sequence of strings, not int"),
        ({"argv": ["ls", 7]}, "argv must be made of strings, not int"),
        ({"argv": []}, "must begin with the name of a program"),
        ({"argv": [""]}, "must begin with the name of a program"),
        ({"argv": ["ls", "a\0b"]}, "argv holds a NUL"),
        ({"argv": ["ls", "\ud800"]}, "argv holds a lone surrogate"),
        ({"cwd": ""}, "cwd must not be empty"),
        ({"cwd": 7}, "cwd must be made of strings"),
        ({"cwd": "a\0"}, "cwd holds a NUL"),
        ({"env": ["A=1"]}, "env must map strings to strings, not list"),
        ({"env": {"A": 1}}, "env must be made of strings, not int"),
        ({"env": {"A=B": "1"}}, "'A=B' cannot be the name"),
        ({"env": {"": "1"}}, "'' cannot be the name"),
        ({"env": {"A": "\0"}}, "env holds a NUL"),
        ({"pass_env": "PATH"}, "pass_env must be a sequence"),
        ({"pass_env": ["A=B"]}, "'A=B' cannot be the name"),
        ({"stdin": "yaml"}, 'stdin must be "json", "text" or None'),
        ({"result": "bytes"}, 'result must be "json", "text" or "lines"'),
        ({"max_output": 0}, "max_output must be a positive int"),
        ({"max_output": True}, "max_output must be a positive int"),
        ({"max_output": 1.5}, "max_output must be a positive int"),
        ({"ok_codes": []}, "ok_codes must be ints, one at least"),
        ({"ok_codes": [True]}, "ok_codes must be ints"),
        ({"ok_codes": "0"}, "ok_codes must be ints"),
    ],
)
def test_what_no_program_could_be_started_with_is_refused(
    given: dict[str, Any], problem: str
) -> None:
    fields = {"argv": ["ls"], **given}

    with pytest.raises((TypeError, ValueError)) as caught:
        Command(fields.pop("argv"), **fields)

    assert problem in str(caught.value)


def test_what_is_stored_is_checked_again_when_it_is_read() -> None:
    with pytest.raises(msgspec.ValidationError, match="NUL"):
        msgspec.json.decode(b'{"argv":["ls","a\\u0000b"]}', type=Command)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CommandFailed("a\x1b[2J", 3, ""), r"a\x1b[2J exited with status 3"),
        (CommandFailed("prog", -9, "tail"), "prog was ended by SIGKILL: tail"),
        (CommandFailed("/very" * 40, 1, ""), "…" + ("/very" * 40)[-79:] + " exited with status 1"),
        (CommandFailed("prog", 1, "x" * 400), "prog exited with status 1: …" + "x" * 300),
        (
            CommandFailed("prog", None, ""),
            "prog ended, but its exit status was taken by something else in this process",
        ),
        (CommandNotStarted("prog", "why."), "prog could not be started: why."),
        (OutputTooLarge("prog", 9), "prog wrote more than 9 bytes (max_output)"),
        (BadOutput("prog", "why"), "prog did not write JSON: why"),
    ],
)
def test_the_end_of_a_program_is_told_on_one_line(error: Exception, message: str) -> None:
    assert str(error) == message
    assert type(error)(*error.args).args == error.args


def test_what_would_move_a_terminal_is_spelt_out() -> None:
    text = "ü\n\r\t\x1b]0;title\x07\x9b2J\u202e\u2028\x00\ud800 end"

    line = escaped(text)

    assert line.isprintable()
    assert line.startswith("ü\\n\\r\\t\\x1b]0;title\\x07\\x9b2J\\u202e\\u2028\\x00\\ud800 end")
