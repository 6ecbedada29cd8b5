"""The other process of the sandbox: a harness, and below it the process that runs the program. ``sandbox`` tells the design.

Started as a file, so that nothing of quantkit is imported. Only small modules are: a start takes a few milliseconds.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False  # type checkers know the name; ``typing`` would take longer to import than all else
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Job = dict[str, Any]

STACK = 64 << 20
FIRST_UID, NOBODY = 1_900_000_000, 65_534
NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user, pid, net, ipc, uts
DEATH_SIGNAL, DUMPABLE, SECCOMP, NO_NEW_PRIVILEGES = 1, 4, 22, 38  # of prctl

# System calls by number, on x86-64 and on arm64. All that are not named here fail with EPERM; that includes open and stat.
HARMLESS = {
    "x86_64": [0, 1, 3, 8, 9, 10, 11, 12, 13, 14, 15, 20, 24, 25, 28, 35, 39, 60, 96, 131, 186, 202, 219, 228, 230, 231],
    "aarch64": [63, 64, 57, 62, 222, 226, 215, 214, 134, 135, 139, 66, 124, 216, 233, 101, 172, 93, 169, 132, 178, 98, 128, 113,
                115, 94],
}  # fmt: skip
THREADS = {"x86_64": [56, 435, 273, 334], "aarch64": [220, 435, 99, 293]}
DEADLY = {  # clone, fork, exec, socket, connect, kill, ptrace, memory of others, namespaces, mount, bpf, io_uring, pidfd, keys
    "x86_64": [56, 435, 57, 58, 59, 322, 41, 53, 42, 62, 200, 101, 310, 311, 272, 308, 165, 321, 425, 434, 424, 438, 250, 298, 323],
    "aarch64": [220, 435, 221, 281, 198, 199, 203, 129, 130, 117, 270, 271, 97, 268, 40, 280, 425, 434, 424, 438, 219, 241, 282],
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
KILL, ALLOW, FAIL = 0x80000000, 0x7FFF0000, 0x00050001  # the last one: with EPERM


def take(count: int) -> bytes:
    """So many bytes of standard input, and not one more: what follows is for the harness alone."""
    found = b""
    while len(found) < count:
        part = os.read(0, count - len(found))
        if not part:
            os._exit(1)
        found += part
    return found


def main() -> NoReturn:
    """The harness. Answers with one line (nonce, isolated, why, wait status, CPU and wall seconds, two sizes) and two texts."""
    job: Job = marshal.loads(take(int.from_bytes(take(8), "little")))
    program = load_program()
    program.preload(job)
    isolated = separate(job)
    printed, records = os.pipe(), os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            inside(program, job, isolated, printed[1], records[1])
        finally:
            os._exit(1)
    os.close(printed[1])
    os.close(records[1])
    nonce = take(32).decode()  # only now, so that the child has no copy of it
    texts, why = watch(printed[0], records[0], job, child, start + job["wall_s"])
    os.kill(child, 9)  # with a process namespace, all that it started dies with it
    _, status, usage = os.wait4(child, 0)
    cpu, seconds = usage.ru_utime + usage.ru_stime, time.monotonic() - start
    said, values = bytes(texts[printed[0]][: job["output_bytes"]]), bytes(texts[records[0]])
    head = f"{nonce} {int(isolated)} {why} {status} {cpu:.3f} {seconds:.3f} {len(said)} {len(values)}\n"
    program.send(1, head.encode() + said + values)
    os._exit(0)


def load_program() -> Any:
    """The module beside this file. Its folder is on the path for this import alone, as other names there hide Python's."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import sandbox_program

    del sys.path[0]
    return sandbox_program


def separate(job: Job) -> bool:
    """Give up root, enter new namespaces and tie our life to the parent's. Returns whether there are namespaces."""
    libc = ctypes.CDLL(None)
    if os.geteuid() == 0:
        os.setgroups([])
        for uid in (FIRST_UID + os.getpid(), NOBODY):  # a user of its own, whose processes can be counted
            try:
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                break
            except OSError:
                continue
    isolated = "namespaces" in job["layers"] and libc.unshare(NAMESPACES) == 0
    prctl(libc, DUMPABLE, 0)
    prctl(libc, DEATH_SIGNAL, 9)
    if os.getppid() != job["parent"]:
        os._exit(1)
    return isolated


def prctl(libc: Any, option: int, value: int, third: int = 0) -> bool:
    return libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0


def watch(printed: int, records: int, job: Job, child: int, end: float) -> tuple[dict[int, bytearray], str]:
    """What comes over both pipes until they close; with "timeout", "cpu" or "output" if there is too much of that, else "-".

    Processor time is read from the child's clock: the kernel's own limit counts ticks, up to a third more on a busy machine.
    """
    texts = {printed: bytearray(), records: bytearray()}
    limits = {printed: job["output_bytes"], records: 2 * job["value_bytes"] + 8192 * len(job["calls"])}
    poll, still_open = select.poll(), {printed, records}
    for descriptor in still_open:
        poll.register(descriptor)
    while still_open:
        left, left_cpu = end - time.monotonic(), job["cpu_s"] - time.clock_gettime(~child << 3 | 2)
        if left <= 0 or left_cpu <= 0:
            return texts, "timeout" if left <= 0 else "cpu"
        for descriptor, _ in poll.poll(min(left, left_cpu / job["processes"]) * 1000 + 1):
            data = os.read(descriptor, 65536)
            if not data:
                poll.unregister(descriptor)
                still_open.discard(descriptor)
            texts[descriptor] += data
            if len(texts[descriptor]) > limits[descriptor]:
                return texts, "output"
    return texts, "-"


def inside(program: Any, job: Job, isolated: bool, printed: int, records: int) -> None:
    """What the child does. It has no descriptors but an empty input, the output and the pipe for results."""
    null = os.open("/dev/null", os.O_RDWR)
    for old, new in ((null, 0), (printed, 1), (printed, 2), (records, program.RECORDS)):
        os.dup2(old, new)
    os.closerange(program.RECORDS + 1, 256)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    os.environ.clear()
    filtered = lock(job, isolated)
    for name in ("__main__", "_ctypes", "ctypes", "marshal", "resource", "sandbox_program", "select"):
        sys.modules.pop(name, None)
    program.start(job, locked=filtered or isolated)


def lock(job: Job, isolated: bool) -> bool:
    """Set the limits, give up capabilities, filter system calls. Returns whether they are filtered."""
    libc = ctypes.CDLL(None)
    prctl(libc, DEATH_SIGNAL, 9)
    limits = {
        resource.RLIMIT_CPU: 2 * job["cpu_s"] + 1, resource.RLIMIT_AS: job["memory_mib"] << 20, resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: job["open_files"], resource.RLIMIT_NPROC: job["processes"] + 1, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: STACK,
    }  # fmt: skip
    for what, value in limits.items():
        most = resource.getrlimit(what)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(what, (value, value))
    libc.capset(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), ctypes.byref((ctypes.c_uint32 * 6)()))
    prctl(libc, NO_NEW_PRIVILEGES, 1)
    machine = os.uname().machine
    if "filter" not in job["layers"] or machine not in ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    rules = ctypes.create_string_buffer(filter_program(machine, isolated and job["processes"] > 1))
    head = ctypes.create_string_buffer(
        ((len(rules) - 1) // 8).to_bytes(8, "little") + ctypes.addressof(rules).to_bytes(8, "little")
    )
    return prctl(libc, SECCOMP, 2, ctypes.addressof(head))


def filter_program(machine: str, threads: bool) -> bytes:
    """A classic BPF program over ``struct seccomp_data``: each instruction is a code, two jumps and a constant."""
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (end, 0, 0, KILL), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (end, 0, 0, KILL)]  # the x32 calls of x86-64
    harmless = HARMLESS[machine] + (THREADS[machine] if threads else [])
    for numbers, verdict in ((harmless, ALLOW), (DEADLY[machine], KILL)):
        program += [rule for number in numbers for rule in ((equal, 0, 1, number), (end, 0, 0, verdict))]
    program.append((end, 0, 0, FAIL))
    return b"".join(code.to_bytes(2, "little") + bytes([yes, no]) + k.to_bytes(4, "little") for code, yes, no, k in program)


if __name__ == "__main__":
    main()
