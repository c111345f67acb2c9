"""A disk that fails on request: a SQLite VFS around the real one, in nothing but ctypes.

Everything SQLite asks of the database file, its log and its journal goes through a `Disk`, which counts it,
writes it down if told to, and lets it fail, tear, lie, wait or kill the process:

    with Disk() as disk:
        store = SqliteStore(path, connect=disk.connect)
        fault = disk.fail("sync", "wal", code="EIO", at=3)
        ...
        assert fault.fired == 1

The VFS opens files through the real one and then puts its own table of methods into them; locks, shared memory
and the rest stay those of the real VFS. The `-shm` file is made below this floor and never seen here.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import itertools
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["any", "open", "read", "write", "truncate", "sync", "close", "delete"]
Role: TypeAlias = Literal["any", "db", "wal", "journal", "other"]

OK = 0
IOERR = 10
SHORT_READ = 522
IO_ERRORS = {
    "open": 14,
    "read": 266,
    "write": 778,
    "truncate": 1546,
    "sync": 1034,
    "close": 4106,
    "delete": 2570,
}
CODES = {"ENOSPC": 13, "EMFILE": 14, "EACCES": 14, "EROFS": 8, "EBUSY": 5, "ENOMEM": 7}

_OPEN_CREATE = 0x4
_ROLES: dict[int, Role] = {0x100: "db", 0x800: "journal", 0x80000: "wal"}
_ALIVE: list[Any] = []
"""What SQLite holds pointers to. It may call at any time until the process ends, so nothing is let go."""


def _find_sqlite() -> ctypes.CDLL:
    """The very library that Python's own `sqlite3` module runs on, reached through that module."""
    try:
        library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
        library.sqlite3_vfs_find.restype = c_void_p
        library.sqlite3_vfs_find.argtypes = [c_char_p]
        library.sqlite3_vfs_register.argtypes = [c_void_p, c_int]
        library.sqlite3_vfs_unregister.argtypes = [c_void_p]
        library.sqlite3_libversion.restype = c_char_p
    except (OSError, AttributeError) as error:
        raise ImportError(
            "The disk tests need a Python whose sqlite3 module shows its SQLite (a shared libsqlite3);"
            f" this one keeps it to itself: {error}"
        ) from error
    found = library.sqlite3_libversion().decode()
    if found != sqlite3.sqlite_version:
        raise ImportError(f"Found SQLite {found}, but Python runs on {sqlite3.sqlite_version}.")
    return library


_SQLITE = _find_sqlite()

_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int)
_Close = CFUNCTYPE(c_int, c_void_p)
_Read = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Write = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Truncate = CFUNCTYPE(c_int, c_void_p, c_int64)
_Sync = CFUNCTYPE(c_int, c_void_p, c_int)


class _Vfs(ctypes.Structure):
    """sqlite3_vfs, with those methods typed that are replaced here."""

    _fields_ = (
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", _Open),
        ("xDelete", _Delete),
        *((f"x{number}", c_void_p) for number in range(14)),
    )


class _Methods(ctypes.Structure):
    """sqlite3_io_methods as of its second version; the third adds memory maps, which would go past us."""

    _fields_ = (
        ("iVersion", c_int),
        ("xClose", _Close),
        ("xRead", _Read),
        ("xWrite", _Write),
        ("xTruncate", _Truncate),
        ("xSync", _Sync),
        *((f"x{number}", c_void_p) for number in range(11)),
    )


@dataclass(frozen=True, slots=True)
class Operation:
    """Something SQLite asked of the disk."""

    kind: str
    file: str
    offset: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a disk's journal: what was really done to a file, or a mark.

    Kinds are `create`, `write`, `truncate`, `sync`, `delete` and `mark`. `inode` tells files of the same name
    apart; `directory` says that a sync or delete made the names in the directory durable, too. A file that was
    there before is created with its content as `data`.
    """

    kind: str
    file: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    directory: bool = False
    note: Any = None


@dataclass
class Fault:
    """What shall go wrong with which operations. See `Disk.fail`."""

    kind: Kind
    file: Role
    at: int | None = None
    after: int = 0
    times: int | None = None
    code: str | int | None = None
    done: bool = False
    torn: int | None = None
    short: int | None = None
    flip: int | None = None
    lie: bool = False
    kill: Literal["before", "after"] | None = None
    delay: Callable[[], object] | None = None
    seen: int = 0
    """How many operations of this kind and file there were."""
    fired: int = 0
    """How many of them were struck."""

    def strikes(self, operation: Operation) -> bool:
        """Count an operation, and say whether this one is to be struck."""
        if self.kind not in ("any", operation.kind) or self.file not in ("any", operation.file):
            return False
        self.seen += 1
        due = self.seen == self.at if self.at is not None else self.seen > self.after
        if not due or self.fired == self.times:
            return False
        self.fired += 1
        return True

    @property
    def is_harmless(self) -> bool:
        """Whether the operation is carried out, and its true result reported."""
        return self.code is None and self.torn is None and self.short is None and not self.lie

    def error(self, kind: str) -> int:
        """The SQLite error this fault shows for an operation of that kind."""
        if isinstance(self.code, int):
            return self.code
        return IO_ERRORS[kind] if self.code in (None, "EIO") else CODES[self.code]


@dataclass
class _File:
    """A file SQLite has open."""

    role: Role
    path: str
    inode: int
    real: _Methods
    syncs_directory: bool


class Disk:
    """A VFS of its own name, from `with` to the end of it."""

    def __init__(self, name: str = "disk") -> None:
        self.name = f"{name}-{next(_NUMBERS)}"
        self.operations: list[Operation] = []
        """Everything that was asked, in order; those that failed as well."""
        self.journal: list[Record] = []
        """What was done to the files, in order, while `recording`."""
        self.recording = False
        self.errors: list[BaseException] = []
        """What this module itself got wrong; raised at the end of the `with`."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}
        self._inodes: dict[str, int] = {}
        self._tables: dict[int, tuple[_Methods, _Methods]] = {}
        self._real_address: int = _SQLITE.sqlite3_vfs_find(None)
        self._real = _Vfs.from_address(self._real_address)
        self._vfs = _Vfs.from_buffer_copy(self._real)
        self._vfs.zName = self.name.encode()
        self._vfs.xOpen = _Open(self._guard(self._open))
        self._vfs.xDelete = _Delete(self._guard(self._delete))
        _ALIVE.append(self)

    def __enter__(self) -> Disk:
        assert _SQLITE.sqlite3_vfs_register(ctypes.byref(self._vfs), 0) == OK
        return self

    def __exit__(self, *exc_info: object) -> None:
        _SQLITE.sqlite3_vfs_unregister(ctypes.byref(self._vfs))
        if self.errors:
            raise AssertionError(f"the disk itself is broken: {self.errors}") from self.errors[0]

    def connect(self, database: str | os.PathLike[str], **options: Any) -> sqlite3.Connection:
        """Connect like `sqlite3.connect`, through this disk."""
        if not options.pop("uri", False):
            database = Path(database).absolute().as_uri() + "?mode=rwc"
        connection: sqlite3.Connection = sqlite3.connect(
            f"{database}&vfs={self.name}", uri=True, **options
        )
        return connection

    # ---- what a test says -------------------------------------------------------------------------

    def fail(
        self,
        kind: Kind,
        file: Role = "any",
        *,
        at: int | None = None,
        after: int = 0,
        times: int | None = None,
        code: str | int | None = None,
        done: bool = False,
        torn: int | None = None,
        short: int | None = None,
        flip: int | None = None,
        lie: bool = False,
        kill: Literal["before", "after"] | None = None,
        delay: Callable[[], object] | None = None,
    ) -> Fault:
        """Arm a fault. Of several that match an operation, the first one armed strikes.

        Which operations, of those of this kind on this file from now on:
            at: The one of this number, from 1.
            after: All but the first that many.
            times: No more than that many.

        What happens to them; without any of these they are refused with an I/O error and not carried out:
            code: They are refused with this error: "EIO", "ENOSPC", "EMFILE", "EROFS", "EBUSY", or SQLite's number.
            done: They are carried out first, and reported as failed all the same.
            torn: Only that many bytes of a write reach the file, and it is reported as failed.
            short: A read yields that many bytes, and zeros after them, as at the end of the file.
            flip: This bit of what is read, or written, is turned over. Nobody is told.
            lie: They are reported as done, and are not.
            kill: The process is killed, -9, before or after; with `torn`, after the torn part.
            delay: This is called first, on SQLite's thread; then they go on as usual.
        """
        assert code is None or isinstance(code, int) or code in ("EIO", *CODES), code
        given = (torn, short, flip, kill, delay)
        if code is None and not lie and all(each is None for each in given):
            code = "EIO"
        fault = Fault(kind, file, at, after, times, code, done, torn, short, flip, lie, kill, delay)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Let nothing fail any more."""
        with self._lock:
            self._faults.clear()

    def count(self, kind: Kind = "any", file: Role = "any") -> int:
        """Count the operations of a kind on a file."""
        with self._lock:
            return sum(
                kind in ("any", each.kind) and file in ("any", each.file)
                for each in self.operations
            )

    def mark(self, note: Any) -> None:
        """Put a note into the journal, after everything done so far."""
        self._record(Record("mark", note=note))

    # ---- what SQLite calls ------------------------------------------------------------------------

    def _guard(self, function: Callable[..., int]) -> Callable[..., int]:
        """Nothing may be raised into C."""

        def call(*args: Any) -> int:
            try:
                return function(*args)
            except BaseException as error:
                self.errors.append(error)
                return IOERR

        return call

    def _begin(self, operation: Operation) -> Fault | None:
        """Count an operation; wait or die if that is asked for; answer with the fault that strikes it."""
        with self._lock:
            self.operations.append(operation)
            struck = [fault for fault in self._faults if fault.strikes(operation)][:1]
        for fault in struck:
            if fault.delay is not None:
                fault.delay()
            if fault.kill == "before" and fault.torn is None:
                _die()
            return fault
        return None

    def _record(self, record: Record) -> None:
        with self._lock:
            if self.recording:
                self.journal.append(record)

    def _run(
        self, operation: Operation, do: Callable[[], int], record: Record | None = None
    ) -> int:
        """Carry out an operation that knows nothing between done and not done."""
        fault = self._begin(operation)
        if fault is not None and fault.lie:
            return OK
        if fault is not None and not (fault.is_harmless or fault.done):
            return fault.error(operation.kind)
        result = do()
        if result == OK and record is not None:
            self._record(record)
        if fault is None:
            return result
        if fault.kill is not None:
            _die()
        return result if fault.is_harmless else fault.error(operation.kind)

    def _open(self, vfs: int, name: int | None, address: int, flags: int, out: int | None) -> int:
        path = os.fsdecode(ctypes.string_at(name)) if name else ""
        role: Role = next((_ROLES[bit] for bit in _ROLES if flags & bit), "other")
        methods = c_void_p.from_address(address)
        methods.value = None

        there = self._content(path)

        def do() -> int:
            return int(self._real.xOpen(self._real_address, name, address, flags, out))

        result = self._run(Operation("open", role), do)
        if methods.value is None:
            return result
        real, ours = self._table(methods.value)
        syncs_directory = role in ("wal", "journal") and bool(flags & _OPEN_CREATE)
        self._files[address] = _File(
            role, path, self._inode(role, path, there), real, syncs_directory
        )
        methods.value = ctypes.addressof(ours)
        return result

    def _content(self, path: str) -> bytes:
        """What is in a file that is about to be opened for the first time."""
        # Never later: to close a file that SQLite has open is to lose SQLite's locks on it.
        if not self.recording or path in self._inodes or not os.path.exists(path):
            return b""
        return Path(path).read_bytes()

    def _inode(self, role: Role, path: str, there: bytes) -> int:
        with self._lock:
            known = self._inodes.get(path)
            if known is None or not path:
                known = self._inodes[path] = next(_NUMBERS)
                if self.recording:
                    self.journal.append(Record("create", role, known, data=there))
            return known

    def _table(self, address: int) -> tuple[_Methods, _Methods]:
        """The real methods at an address, and ours for files that have these."""
        with self._lock:
            if address not in self._tables:
                real = _Methods.from_address(address)
                ours = _Methods.from_buffer_copy(real)
                ours.iVersion = min(real.iVersion, 2)
                ours.xClose = _Close(self._guard(self._close))
                ours.xRead = _Read(self._guard(self._read))
                ours.xWrite = _Write(self._guard(self._write))
                ours.xTruncate = _Truncate(self._guard(self._truncate))
                ours.xSync = _Sync(self._guard(self._sync))
                self._tables[address] = (real, ours)
            return self._tables[address]

    def _close(self, address: int) -> int:
        file = self._files.pop(address)
        fault = self._begin(Operation("close", file.role))
        # A handle that is refused its end would be kept for ever, so it is closed in any case.
        result: int = file.real.xClose(address)
        if fault is not None and fault.kill is not None:
            _die()
        return result if fault is None or fault.is_harmless else fault.error("close")

    def _read(self, address: int, buffer: int, size: int, offset: int) -> int:
        file = self._files[address]
        fault = self._begin(Operation("read", file.role, offset, size))
        if fault is not None and fault.code is not None and not fault.done:
            return fault.error("read")
        result: int = file.real.xRead(address, buffer, size, offset)
        if fault is None:
            return result
        if fault.kill is not None:
            _die()
        if fault.flip is not None:
            where = fault.flip // 8 % size
            ctypes.c_ubyte.from_address(buffer + where).value ^= 1 << fault.flip % 8
        if fault.short is not None and fault.short < size:
            ctypes.memset(buffer + fault.short, 0, size - fault.short)
            return SHORT_READ
        return fault.error("read") if fault.code is not None else result

    def _write(self, address: int, buffer: int, size: int, offset: int) -> int:
        file = self._files[address]
        fault = self._begin(Operation("write", file.role, offset, size))
        if fault is None:
            return self._put(address, file, ctypes.string_at(buffer, size), offset)
        if fault.lie:
            return OK
        data = bytearray(ctypes.string_at(buffer, size))
        result = OK
        if fault.flip is not None:
            data[fault.flip // 8 % size] ^= 1 << fault.flip % 8
        if fault.torn is not None:
            del data[fault.torn :]
        if fault.is_harmless or fault.done or fault.torn is not None:
            result = self._put(address, file, bytes(data), offset)
        if fault.kill is not None:
            _die()
        return result if fault.is_harmless else fault.error("write")

    def _put(self, address: int, file: _File, data: bytes, offset: int) -> int:
        result: int = file.real.xWrite(address, data, len(data), offset)
        if result == OK:
            self._record(Record("write", file.role, file.inode, offset, data))
        return result

    def _truncate(self, address: int, size: int) -> int:
        file = self._files[address]
        return self._run(
            Operation("truncate", file.role, size),
            lambda: file.real.xTruncate(address, size),
            Record("truncate", file.role, file.inode, size),
        )

    def _sync(self, address: int, flags: int) -> int:
        file = self._files[address]

        def do() -> int:
            result: int = file.real.xSync(address, flags)
            file.syncs_directory = file.syncs_directory and result != OK
            return result

        record = Record("sync", file.role, file.inode, directory=file.syncs_directory)
        return self._run(Operation("sync", file.role), do, record)

    def _delete(self, vfs: int, name: bytes, directory: int) -> int:
        path = os.fsdecode(name)
        role: Role = next((r for r in _ROLES.values() if path.endswith("-" + r)), "other")
        inode = self._inodes.get(path, 0)
        result = self._run(
            Operation("delete", role),
            lambda: self._real.xDelete(self._real_address, name, directory),
            Record("delete", role, inode, directory=bool(directory)),
        )
        if not os.path.exists(path):
            self._inodes.pop(path, None)
        return result


_NUMBERS = itertools.count(1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
