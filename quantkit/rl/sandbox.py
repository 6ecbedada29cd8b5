"""Runs Python code that a model wrote, and brings back what its functions returned.

Three processes. This one knows the expected values and compares; they never leave it. A harness (``sandbox_child``) counts
the time, kills, and reports with a nonce. Below it the program runs, with none of the harness's descriptors; the nonce is
read only after that process has split off. Results come back as JSON of plain data, of limited size and depth.

What holds a program in, from the outside: a user of its own if we are root; namespaces (user, process, network, IPC), which
also die as a whole; rlimits; no new privileges and no capabilities; a filter of system calls that lets it compute and write
to the descriptors it has, fails all else (opening a file, even stat), and kills it for fork, exec, socket, kill or ptrace.
Within Python, a list of modules and an audit hook give early and clear verdicts; a skilled program gets around those two,
and none of the safety rests on them as long as the filter is there. Allowed modules are loaded beforehand, if the source
names them.

What it is not: a virtual machine. It trusts the kernel; a flaw in the few system calls that are left, or in the processor,
is a way out. The program shares a process with the code that calls it, so it may claim any result and any step it did not
do: that is worth no more than returning the value, for which it needs to know it. A good program may be too slow on a busy
machine, and one that asks for the time can give different results; hash order, random numbers and, where the kernel permits
it, addresses are the same in each run.

Where namespaces are not permitted (many containers) ``Outcome.isolated`` is False: then the filter alone forbids sockets and
processes. Where the filter is missing (neither x86-64 nor arm64) namespaces and the hook remain. With neither, nothing runs.
"""

from __future__ import annotations

import ctypes
import json
import marshal
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import RewardError

Status = Literal["ok", "syntax", "import", "runtime", "timeout", "memory", "output", "killed", "forbidden"]
Reached = Literal["nothing", "parsed", "defined", "called"]

LAYERS = ("namespaces", "filter", "hook")
CHILD = Path(__file__).with_name("sandbox_child.py")
# Isolated mode (-I) would ignore PYTHONHASHSEED; the rest of what it does is -s, -P and an empty environment.
OPTIONS = ("-s", "-P", "-S", "-B", "-W", "ignore")
VALUE_BYTES = 1_048_576  # of all results of a program, as JSON
GRACE_S = 30.0  # for the harness to start and to answer on a busy machine, beyond the wall limit that it keeps itself
LEAST = {"cpu_s": 1, "memory_mib": 64, "output_bytes": 0, "file_bytes": 0, "processes": 1, "open_files": 4}
SAME_ADDRESSES = 0x0040000  # ADDR_NO_RANDOMIZE of personality(2)


@dataclass(frozen=True)
class Limits:
    """wall_s, cpu_s: seconds, of definitions and all calls together. memory_mib: of address space, Python's own included.

    output_bytes: of standard output and error together. file_bytes: of one file, where files can be written at all (the
    filter forbids it). processes: 1 forbids threads too; more permits threads, where namespaces are. Raises RewardError.
    """

    wall_s: float = 5.0
    cpu_s: int = 2
    memory_mib: int = 512
    output_bytes: int = 65_536
    file_bytes: int = 1_048_576
    processes: int = 1
    open_files: int = 16

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise RewardError(f"the limit {name} is {value!r}", hint=f"give a whole number of at least {least}")
        if not 0 < self.wall_s < 3600:
            raise RewardError(f"the limit wall_s is {self.wall_s!r}", hint="give seconds, more than 0 and less than 3600")


DEFAULT = Limits()


@dataclass(frozen=True)
class Call:
    """function(*arguments). arguments: plain JSON data."""

    function: str
    arguments: list[Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    status: the first thing that went wrong, in words in ``detail``. values: one for each call, None where ``ran`` is False.
    reached: how far it came; "called" if no call failed. printed: standard output and error. seconds: wall time.
    isolated: whether it ran in namespaces of its own.
    """

    status: Status
    values: list[Any | None]
    printed: str
    seconds: float
    isolated: bool
    detail: str
    ran: list[bool] = field(default_factory=list)
    reached: Reached = "nothing"


@dataclass(frozen=True)
class Report:
    """What the harness says. why: "timeout", "cpu", "output" or "-"; status: of wait(2); cpu_s: of the program."""

    isolated: bool
    why: str
    status: int
    cpu_s: float
    seconds: float
    printed: bytes
    records: bytes


def run_code(source: str, calls: Sequence[Call] = (), limits: Limits = DEFAULT, *, _layers: Sequence[str] = LAYERS) -> Outcome:
    """Define what ``source`` says, then call its functions one after the other; an error in one call does not stop the next.

    The program's ``__name__`` is not "__main__". Safe to call from several threads at once. Raises RewardError for arguments
    that are no plain data, and where programs cannot be locked in; never because of what the program does.
    """
    if sys.platform != "linux" or not sys.executable:
        raise RewardError("code can be run on Linux only, by a Python that knows its own path", hint="leave the code reward out")
    token, nonce = secrets.token_hex(16), secrets.token_hex(16)
    job = {item.name: getattr(limits, item.name) for item in fields(limits)}
    job |= {"source": source, "calls": [(call.function, _plain(call)) for call in calls], "layers": list(_layers)}
    job |= {"token": token, "parent": os.getpid(), "value_bytes": VALUE_BYTES}
    data = marshal.dumps(job)
    folder = tempfile.mkdtemp(prefix="quantkit-run-")
    try:
        report = _ask(len(data).to_bytes(8, "little") + data, nonce, folder, limits.wall_s + GRACE_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _outcome(report, _records(report.records, token), limits, len(job["calls"]))


def _plain(call: Call) -> Any:
    try:
        return json.loads(json.dumps(call.arguments))
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(
            f"the arguments of {call.function} are no plain data ({error})", hint="give what JSON can hold"
        ) from None


def _ask(job: bytes, nonce: str, folder: str, seconds: float) -> Report:
    """Start the harness, hand it the job and then the nonce, and read its answer."""
    with _same_addresses():
        process = subprocess.Popen(
            [sys.executable, *OPTIONS, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=folder, env={"PYTHONHASHSEED": "0"}, start_new_session=True, umask=0o077,
        )  # fmt: skip
    try:
        answer, complaint = process.communicate(job + nonce.encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RewardError(f"the sandbox did not answer within {seconds:.0f} s", hint="run fewer programs at once") from None
    finally:
        process.kill()  # the program goes with it: it asked the kernel for that
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
    head, _, rest = answer.partition(b"\n")
    parts = head.decode(errors="replace").split(" ")
    if len(parts) != 8 or not secrets.compare_digest(parts[0].encode(), nonce.encode()):
        why = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise RewardError(
            f"the sandbox gave no answer ({why or process.returncode})", hint="see whether Python starts without its site"
        )
    size = int(parts[6])
    return Report(parts[1] == "1", parts[2], int(parts[3]), float(parts[4]), float(parts[5]), rest[:size], rest[size:])


@contextmanager
def _same_addresses() -> Iterator[None]:
    """What this thread starts meanwhile has its memory at the same addresses each time, where the kernel permits it."""
    change = ctypes.CDLL(None).personality
    before = change(ctypes.c_ulong(0xFFFFFFFF))
    if before >= 0:
        change(ctypes.c_ulong(before | SAME_ADDRESSES))
    try:
        yield
    finally:
        if before >= 0:
            change(ctypes.c_ulong(before))


def _records(data: bytes, token: str) -> list[list[Any]] | None:
    """The records of the program's process. A line cut short at the end is left out. None: something else wrote there."""
    records: list[list[Any]] = []
    for line in data.split(b"\n")[:-1]:
        if not line.startswith(token.encode()):
            return None
        try:
            record = json.loads(line[len(token) :])
        except (ValueError, RecursionError):
            return None
        if not isinstance(record, list) or not record or not isinstance(record[0], str):
            return None
        records.append(record)
    return records


def _outcome(report: Report, records: list[list[Any]] | None, limits: Limits, count: int) -> Outcome:
    values: list[Any | None] = [None] * count
    ran = [False] * count
    reached: Reached = "nothing"
    failures: list[tuple[str, str]] = []
    if records and records[0] == ["unlocked"]:
        raise RewardError(
            "the kernel permits neither namespaces nor a filter of system calls, so no program is run",
            hint="use x86-64 or arm64 with seccomp, or leave the code reward out",
        )
    for record in records or []:
        match record:
            case ["parsed"]:
                reached = "parsed"
            case ["defined"]:
                reached = "defined"
            case ["value", int(index), value] if 0 <= index < count:
                values[index], ran[index] = value, True
            case ["failed" | "forbidden", *_]:
                failures.append(_failure(record))
            case ["done"] if failures or all(ran):
                reached = reached if failures else "called"
            case _:
                records = None
                break
    status, detail = _verdict(report, records, failures, limits)
    if records is None:
        values, ran, reached = [None] * count, [False] * count, "nothing"
    printed = report.printed.decode("utf-8", "replace")
    return Outcome(status, values, printed, report.seconds, report.isolated, detail, ran, reached)


def _failure(record: list[Any]) -> tuple[str, str]:
    status, detail = (record[2], record[3]) if len(record) == 4 else ("forbidden", record[-1])
    known = status in ("syntax", "import", "runtime", "memory", "output", "forbidden")
    return (status if known else "runtime"), str(detail)[:400]


def _verdict(report: Report, records: list[list[Any]] | None, failures: list[Any], limits: Limits) -> tuple[Any, str]:
    """Status and detail. What the kernel and the harness saw comes before what the program's process says."""
    forbidden = [failure for failure in failures if failure[0] == "forbidden"]
    killer = os.WTERMSIG(report.status) if os.WIFSIGNALED(report.status) else 0
    if records is None:
        return "forbidden", "it wrote into the pipe of the results"
    if forbidden:
        return forbidden[0]
    if killer == signal.SIGSYS:
        return "forbidden", "it made a system call that ends it"
    if report.why == "timeout":
        return "timeout", f"{limits.wall_s} s have passed"
    if report.why == "cpu":
        return "timeout", f"it used its {limits.cpu_s} s of the processor"
    if report.why == "output":
        return "output", f"it wrote more than {limits.output_bytes} bytes, or its results are too large"
    if ["done"] in records or failures:
        return failures[0] if failures else ("ok", "")
    if killer:
        return "killed", signal.strsignal(killer) or f"signal {killer}"
    return "runtime", f"it ended early, with code {os.waitstatus_to_exitcode(report.status)}"
