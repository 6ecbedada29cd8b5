"""What the sandbox's inner process does with a program: import what it may, compile, define, call, and send results as JSON.

Loaded by ``sandbox_child`` from its folder, not as a part of quantkit. It keeps no secrets: the program shares its memory.
"""

from __future__ import annotations

import os
import sys
import types
from _json import encode_basestring_ascii as quoted

TYPE_CHECKING = False  # type checkers know the name; ``typing`` would take longer to import than all else
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Job = dict[str, Any]


def listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALLOWED = listed(
    "__future__ abc array base64 binascii bisect calendar cmath collections contextlib copy csv dataclasses datetime decimal "
    "difflib enum fractions functools graphlib hashlib heapq io itertools json keyword math numbers operator pprint random re "
    "statistics string struct sys textwrap time types typing unicodedata warnings weakref zlib"
)
THREADED = listed("queue threading")
WAYS_OUT = listed(
    "_ctypes _posixsubprocess _socket asyncio ctypes fcntl mmap multiprocessing posix pty resource socket ssl subprocess"
)
LAZY = {"strptime": ["_strptime"], "singledispatch": ["typing", "weakref"], "singledispatchmethod": ["typing", "weakref"]}
LATE = frozenset(name for names in LAZY.values() for name in names)  # C code imports them on the program's behalf
FAMILIES = listed(
    "cpython ctypes fcntl gc glob mmap os pathlib pty resource shutil signal socket sqlite3 subprocess syslog tempfile"
)
EVENTS = listed("code.__new__ sys._current_exceptions sys._current_frames sys.addaudithook sys.setprofile sys.settrace")
SYS = listed(
    "byteorder exc_info exit float_info getrecursionlimit getsizeof hash_info int_info intern maxsize maxunicode "
    "stderr stdin stdout version version_info"
)
DEPTH, BITS = 64, 14_000  # of a result; of an integer (Python prints 4,300 digits)
RECURSION = 20_000
RECORDS = 3  # the descriptor that results leave through


def preload(job: Job) -> None:
    """Import those allowed modules that the source names, as none can be read from disk later."""
    marks = dict.fromkeys(map(ord, ",.;:()=\"'#@[]\\"), " ")
    words = set(job["source"].translate(marks).split())
    names = words & allowed_modules(job) | {name for word in words & LAZY.keys() for name in LAZY[word]}
    for name in sorted(names):
        __import__(name)


def allowed_modules(job: Job) -> frozenset[str]:
    return ALLOWED | THREADED if job["processes"] > 1 else ALLOWED


def steady_random(random: Any) -> None:
    """A generator that is given no seed has the seed 0. Called after the fork, as ``random`` seeds its own anew there."""
    seed = random.Random.seed

    def seeded(self: Any, a: Any = None, version: int = 2) -> None:
        seed(self, 0 if a is None else a, version)

    random.Random.seed = seeded
    random.seed = random._inst.seed
    random.seed()


def send(descriptor: int, data: bytes, write: Callable[[int, bytes], int] = os.write) -> None:
    while data:
        data = data[write(descriptor, data) :]


def start(job: Job, locked: bool) -> None:
    """Arm the hook and run the program; without any lock that holds in the kernel, only say so."""
    say = speaker(job["token"])
    if not locked:
        return say('["unlocked"]')
    if "random" in sys.modules:
        steady_random(sys.modules["random"])
    forbid = judge(say)
    if "hook" in job["layers"]:
        sys.addaudithook(hook(forbid))
    run(job, say, guard(allowed_modules(job), forbid))


def speaker(token: str) -> Callable[[str], None]:
    """Sends one record, a line of JSON behind the token."""
    return lambda text, send=send: send(RECORDS, f"{token}{text}\n".encode())  # type: ignore[misc]


def judge(say: Callable[[str], None], leave: Callable[[int], Any] = os._exit) -> Callable[[str], NoReturn]:
    """Ends the process with the verdict "forbidden"."""

    def forbid(what: str) -> NoReturn:
        say(f'["forbidden",{quoted(what[:200])}]')
        leave(0)
        raise SystemExit

    return forbid


def hook(forbid: Callable[[str], NoReturn]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook. It holds its own copies of all that it uses, as the program may replace built-in functions."""

    def audit(
        event: str, arguments: tuple[Any, ...], families: Any = FAMILIES, events: Any = EVENTS, ways_out: Any = WAYS_OUT,
        kind: Any = type, text: Any = str, number: Any = int, missing: Any = ImportError,
    ) -> None:  # fmt: skip
        if event == "import":
            name = arguments[0]
            if name.partition(".")[0] in ways_out:
                forbid(f"import {name}")
            raise missing(f"{name} is not on the list of modules")
        if event == "open":
            path = arguments[0]
            if kind(path) is number or (kind(path) is text and path[:1] != "/" and ".." not in path):
                return
            forbid(f"open {path!r}" if kind(path) is text else event)
        if event in events or event.partition(".")[0] in families:
            forbid(event)

    return audit


def guard(allowed: frozenset[str], forbid: Callable[[str], NoReturn]) -> dict[str, Any]:
    """The program's built-in functions: the usual ones, with an ``__import__`` that knows the list."""
    real, small = __import__, small_sys()

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        root = name.partition(".")[0] if type(name) is str and not level else ""
        if root in WAYS_OUT:
            forbid(f"import {name}")
        if root not in allowed and name not in LATE:
            raise ImportError(f"{root or 'what was asked for'} is not on the list of modules")
        return small if name == "sys" else real(name, {}, None, fromlist, 0)

    own = vars(sys.modules["builtins"]).copy()
    own["__import__"] = imported
    return own


def small_sys() -> types.ModuleType:
    """What programs want of ``sys``, without its way to all loaded modules."""
    small, real = types.ModuleType("sys"), sys.setrecursionlimit
    for name in SYS:
        setattr(small, name, getattr(sys, name))
    small.setrecursionlimit = lambda count: real(min(count, RECURSION))  # type: ignore[attr-defined]
    small.argv = ["program"]  # type: ignore[attr-defined]
    return small


def run(job: Job, say: Callable[[str], None], builtins: dict[str, Any]) -> None:
    """Compile, define and call, with a record of each step."""
    module, flush, leave = types.ModuleType("program"), sys.stdout.flush, os._exit
    sys.modules["program"] = module  # dataclasses look a class's module up there
    module.__dict__["__builtins__"] = builtins
    spare = [bytearray(4 << 20)]  # freed when memory runs out, so that this can still be said

    def failed(index: int, error: BaseException, status: str = "") -> None:
        if isinstance(error, MemoryError):
            spare.clear()
        status = status or status_of(error)
        say(f'["failed",{index},{quoted(status)},{quoted(described(error))}]')

    try:
        code = compile(job["source"], "<program>", "exec", dont_inherit=True)
    except BaseException as error:
        return failed(-1, error, "syntax")
    say('["parsed"]')
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        return failed(-1, error)
    say('["defined"]')
    room = job["value_bytes"]
    for index, (function, arguments) in enumerate(job["calls"]):
        left = [room]
        try:
            if function not in module.__dict__:
                raise NameError(f"the program has no {function}")
            text = encoded(module.__dict__[function](*arguments), left)
        except BaseException as error:
            failed(index, error)
        else:
            room = left[0]
            say(f'["value",{index},{text}]')
    try:
        flush()
    except BaseException as error:
        return failed(-1, error)
    say('["done"]')
    leave(0)


class TooLarge(Exception):
    """A value that is not sent back."""


def status_of(error: BaseException) -> str:
    for kind, status in ((ImportError, "import"), (MemoryError, "memory"), (TooLarge, "output")):
        if isinstance(error, kind):
            return status
    return "runtime"


def described(error: BaseException) -> str:
    """The error's type, text and line of the program."""
    try:
        line, step = 0, error.__traceback__
        while step:
            line = step.tb_lineno if step.tb_frame.f_code.co_filename == "<program>" else line
            step = step.tb_next
        error.__traceback__ = None
        return f"{type(error).__name__}: {error}"[:300] + (f" (line {line})" if line else "")
    except BaseException:
        return "an error without a text"


def encoded(value: Any, left: list[int], depth: int = 0) -> str:
    """JSON of plain data; subclasses count as what they are made of, tuples as lists. left: bytes that may still be used.

    Uses none of the value's own methods. Raises TooLarge (so do cycles) and TypeError.
    """
    kind = type(value)
    text = "" if issubclass(kind, list | tuple | dict) else scalar(value, kind, left[0])
    left[0] -= len(text) + 2
    if left[0] < 0 or depth > DEPTH:
        raise TooLarge("the results are too large, too deep or cyclic")
    if text:
        return text
    if issubclass(kind, dict):
        return f"{{{','.join([f'{key_of(key, left)}:{encoded(item, left, depth + 1)}' for key, item in dict.items(value)])}}}"
    items = list.__iter__(value) if issubclass(kind, list) else tuple.__iter__(value)
    return f"[{','.join([encoded(item, left, depth + 1) for item in items])}]"


def scalar(value: Any, kind: type, room: int) -> str:
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]
    if issubclass(kind, float):
        text = float.__repr__(value)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if issubclass(kind, int):
        if int.bit_length(value) > BITS:
            raise TooLarge("an integer is too large")
        return int.__repr__(value)
    if issubclass(kind, str):
        if str.__len__(value) > room:
            raise TooLarge("a text is too large")
        return quoted(value)
    raise TypeError(f"a value of type {kind.__name__} came back: only plain data counts")


def key_of(key: Any, left: list[int]) -> str:
    kind = type(key)
    if kind is bool or not issubclass(kind, int | str):
        raise TypeError("a dictionary with keys other than texts and integers came back: only plain data counts")
    text = scalar(key, kind, left[0])
    left[0] -= len(text) + 2
    return text if issubclass(kind, str) else f'"{text}"'
