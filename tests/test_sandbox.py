"""Programs that mean harm, and programs that do not: what each may reach, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from quantkit.errors import RewardError
from quantkit.rl import sandbox
from quantkit.rl.rewards import code
from quantkit.rl.rewards.code import code_reward, credit, same, source_of
from quantkit.rl.sandbox import LAYERS, Call, Limits, run_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

ISOLATED = sys.platform == "linux" and run_code("").isolated
TIGHT = Limits(wall_s=1.2, cpu_s=1, memory_mib=256)
CALLS, EXPECTED = [Call("f", [2])], [4]
GOOD = "def f(x):\n    return x * x\n"
MARK = "/tmp/quantkit-sandbox-was-here"

# The way around the list of modules that every such sandbox has: any class leads to all modules that are loaded.
REACH = """
modules = [c for c in object.__subclasses__() if c.__name__ == "_wrap_close"][0].__init__.__globals__["sys"].modules
os, real = modules["os"], modules["sys"]
def builtin(name):
    bootstrap, imp = modules["_frozen_importlib"], modules["_imp"]
    return imp.create_builtin(bootstrap.ModuleSpec(name, None))
"""

HOSTILE = {
    # processes
    "fork bomb": (REACH + "while True:\n    os.fork()", "forbidden"),
    "daemon": (REACH + "def f(x):\n    try:\n        os.setsid()\n    finally:\n        os.fork()\n    return 4", "forbidden"),
    "os.system": (REACH + f"os.system('touch {MARK}')", "forbidden"),
    "exec": (REACH + "os.execv('/bin/sh', ['sh', '-c', 'sleep 60'])", "forbidden"),
    "subprocess": ("import subprocess\nsubprocess.run(['sleep', '60'])", "forbidden"),
    "thread": (REACH + "t = modules['_thread'].start_new_thread\ndef g():\n    while True: pass\nt(g, ())\n" + GOOD, "forbidden"),
    "kill the parent": (REACH + "os.kill(os.getppid(), 9)", "forbidden"),
    "kill everybody": (REACH + "os.kill(-1, 9)", "forbidden"),
    "end early": (REACH + "def f(x):\n    os._exit(0)", "runtime"),
    "ignore SIGTERM": (REACH + "modules['_signal'].signal(15, 1)\nwhile True: pass", "timeout"),
    "close all and go on": (REACH + "os.closerange(0, 64)\nwhile True: pass", "killed"),
    # time and memory
    "loop": ("def f(x):\n    while True: pass", "timeout"),
    "sleep": ("import time\ndef f(x):\n    time.sleep(60)\n    return 4", "timeout"),
    "stop the clock": (REACH + "import time\ntime.monotonic = time.time = lambda: 0\nwhile True: pass", "timeout"),
    "power": ("def f(x):\n    return 99**98**97", "timeout memory"),
    "power of a constant": ("y = 10**10**9", "timeout memory"),
    "digits": ("def f(x):\n    return str(1 << 10**8)", "runtime"),
    "digits without limit": (REACH + "real.set_int_max_str_digits(0)\ndef f(x):\n    return str(1 << 10**7)", "timeout output"),
    "long text": ("def f(x):\n    return 'a' * 10**10", "memory"),
    "list growth": ("kept = []\nwhile True:\n    kept.append('x' * len(kept) * 99)", "memory timeout"),
    "caught memory": ("def f(x):\n    kept = []\n    while True:\n        try:\n            kept.append(' ' * 10**7)\n"
                      "        except MemoryError:\n            pass", "timeout memory"),
    "recursion": ("def f(x):\n    return f(x)", "runtime"),
    "recursion in C": (REACH + "real.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr([self])\n"
                       "def f(x): return repr(A())", "killed memory timeout runtime"),
    "nested parentheses": ("x = " + "(" * 100_000, "syntax"),
    "nested minus": ("x = " + "-" * 300_000 + "1", "syntax killed"),
    "nested attributes": ("x = a" + ".b" * 100_000, "syntax killed"),
    "null bytes": ("x = 1\0", "syntax"),
    "lone surrogate": ("x = '\ud800'", "syntax"),
    # files and network
    "read passwd": ("def f(x):\n    return open('/etc/passwd').read()", "forbidden"),
    "read the parent": (REACH + "def f(x):\n    return open(f'/proc/{os.getppid()}/environ', 'rb').read()", "forbidden"),
    "read memory": ("def f(x):\n    return open('/proc/self/mem', 'rb').read(10)", "forbidden"),
    "climb": ("def f(x):\n    return open('../../etc/passwd').read()", "forbidden"),
    "write outside": (f"open({MARK!r}, 'w').write('x')", "forbidden"),
    "fill the disk": ("n = 0\nwhile True:\n    open(f'file{n}', 'wb').write(b'x' * 2**20)\n    n += 1", "runtime"),
    "symlink": (REACH + "os.symlink('/etc', 'etc')", "forbidden"),
    "list folders": (REACH + "def f(x):\n    return os.listdir('/')", "forbidden"),
    "internet socket": ("import socket\nsocket.create_connection(('127.0.0.1', 22))", "forbidden"),
    "unix socket": (REACH + "def f(x):\n    s = __import__('_socket')\n    return s.socket(s.AF_UNIX)", "forbidden"),
    # limits and machinery
    "ctypes": ("import ctypes\nctypes.CDLL(None).fork()", "forbidden"),
    "numpy": ("import numpy\n" + GOOD, "import"),
    "quantkit": ("import quantkit\n" + GOOD, "import"),
    "rlimits": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "forbidden"),
    "limits of the parent": ("from resource import prlimit\nprlimit(1, 0, (1, 1))", "forbidden"),
    "another hook": (REACH + "real.addaudithook(lambda *a: None)", "forbidden"),
    "crafted code": (GOOD + "f.__code__ = f.__code__.replace(co_code=b'\\x64\\xff' * 50)", "forbidden"),
    "objects": (REACH + "def f(x):\n    return [o for o in builtin('gc').get_objects() if o == 4]", "forbidden"),
    # false results
    "frames": (REACH + "def f(x):\n    frame, seen = real._getframe(), []\n    while frame:\n        seen.append(str(frame.f_locals))\n"
               "        frame = frame.f_back\n    return 'expected' in ''.join(seen)", "ok"),
    "tracebacks": ("def f(x):\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        frame = e.__traceback__.tb_frame\n"
                   "    while frame.f_back:\n        frame = frame.f_back\n    return 'expected' in frame.f_globals", "ok"),
    "printed result": ("def f(x):\n    print('[\"value\",0,4]')\n    print('[\"done\"]')\n    return 5", "ok"),
    "every descriptor": (REACH + "def f(x):\n    for n in range(3, 64):\n        try:\n            os.write(n, b'[\"value\",0,4]\\n[\"done\"]\\n')\n"
                         "        except OSError:\n            pass\n    return 4", "forbidden"),
    "cut the channel": (REACH + "def f(x):\n    os.close(3)\n    return 4", "runtime killed"),
    "patched built-ins": (REACH + "b = modules['builtins']\nb.len = b.isinstance = b.issubclass = b.print = b.str = lambda *a: 4\n"
                          "b.__import__ = b.type = None\ndef f(x):\n    return 5", "ok runtime import"),
    "patched json": ("import json\njson.dumps = lambda *a, **k: '4'\njson.JSONEncoder.encode = lambda *a: '4'\ndef f(x):\n    return 5", "ok"),
    "equal to all": ("class A:\n    def __eq__(self, other): return True\n    def __hash__(self): return 4\ndef f(x):\n    return A()",
                     "runtime"),
    "number equal to all": ("class A(int):\n    def __eq__(self, other): return True\n    def __repr__(self): return '4'\n"
                            "def f(x):\n    return A(5)", "ok"),
    "list that lies": ("class A(list):\n    def __iter__(self): return iter([4])\n    def __len__(self): return 1\n"
                       "def f(x):\n    return A([5])", "ok"),
    "metaclass": ("class M(type):\n    def __subclasscheck__(c, k): return True\n    @property\n    def __name__(c): return 4\n"
                  "    def mro(c): return [c, object]\nclass A(metaclass=M):\n    __class__ = int\ndef f(x):\n    return A()", "runtime"),
    "nan": ("def f(x):\n    return float('nan')", "ok"),
    "generator": ("def f(x):\n    yield 4", "runtime"),
    "coroutine": ("async def f(x):\n    return 4", "runtime"),
    "large result": ("def f(x):\n    return ['a' * 1000] * 10**5", "output"),
    "cyclic result": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "output"),
    "doubled result": ("def f(x):\n    a = [4]\n    for _ in range(60): a = [a, a]\n    return a", "output"),
    # ways to leave and to linger
    "exit": ("import sys\nsys.exit(0)", "runtime"),
    "interrupt": ("def f(x):\n    raise KeyboardInterrupt", "runtime"),
    "memory error": ("def f(x):\n    raise MemoryError", "memory"),
    "atexit": (REACH + "def g():\n    while True: pass\nbuiltin('atexit').register(g)\ndef f(x):\n    return 5", "ok"),
    "del": ("class A:\n    def __del__(self):\n        while True: pass\ndef f(x):\n    A()\n    return 4", "timeout"),
    "hostile error": ("class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(x):\n    raise E", "timeout"),
    "print": ("while True:\n    print('x' * 10**6)", "output"),
    "standard error": ("import sys\nwhile True:\n    sys.stderr.write('x' * 10**6)", "output"),
    "surrogates": ("def f(x):\n    print('\\ud800\\udfff')\n    return '\\udcff'", "ok"),
    "input": ("def f(x):\n    return int(input())", "runtime"),
}  # fmt: skip

# Those are run once more without namespaces, and once without the hook: what the filter does alone.
AGAIN = ["fork bomb", "daemon", "exec", "thread", "kill the parent", "loop", "list growth", "read passwd", "write outside",
         "fill the disk", "every descriptor", "end early", "symlink", "unix socket"]  # fmt: skip
WITHOUT_HOOK = dict.fromkeys(("read passwd", "write outside", "fill the disk", "symlink"), "runtime")


def users() -> list[psutil.Process]:
    """Processes of the users that programs run as, and children of this process."""
    own = [p for p in psutil.process_iter(["uids"]) if p.info["uids"] and p.info["uids"].real >= 1_900_000_000]
    return own + psutil.Process().children(recursive=True)


@pytest.fixture(scope="module", autouse=True)
def nothing_remains(tmp_path_factory):
    """All temporary folders are gone in the end, and so are all processes; the mark that some programs try to leave is not there."""
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    before, pid = set(users()), os.getpid()
    patch.setattr(sandbox.tempfile, "tempdir", str(folder))
    yield
    patch.undo()
    assert list(folder.iterdir()) == []
    assert not set(users()) - before and os.getpid() == pid
    assert not Path(MARK).exists()


def contained(source: str, status: str, layers=LAYERS) -> None:
    start = time.monotonic()
    outcome = run_code(source, CALLS, TIGHT, _layers=layers)
    assert time.monotonic() - start < TIGHT.wall_s + 2
    assert outcome.status in status.split(), outcome
    assert credit(outcome, EXPECTED) < 1
    assert len(outcome.printed) <= TIGHT.output_bytes


def test_there_are_at_least_forty():
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name):
    contained(*HOSTILE[name])


@pytest.mark.parametrize("name", AGAIN)
def test_it_is_without_namespaces_too(name):
    contained(*HOSTILE[name], layers=("filter", "hook"))


@pytest.mark.parametrize("name", [name for name in AGAIN if name not in ("loop", "list growth")])
def test_the_filter_needs_no_hook(name):
    source, status = HOSTILE[name]
    contained(source, WITHOUT_HOOK.get(name, status), layers=("filter",))


@pytest.mark.skipif(not ISOLATED, reason="namespaces are not permitted here")
def test_namespaces_and_limits_hold_without_filter_and_hook():
    source = REACH + """
def f(x):
    made = 0
    for _ in range(20):
        try:
            if os.fork() == 0:
                os._exit(0)
            made += 1
        except OSError:
            pass
    return [made, os.getpid(), os.getppid(), os.getuid() == 0]
"""  # fmt: skip
    outcome = run_code(source, CALLS, TIGHT, _layers=("namespaces",))
    assert outcome.values == [[0, 1, 0, False]] and outcome.isolated, outcome


def test_without_any_lock_nothing_is_run():
    with pytest.raises(RewardError, match="neither namespaces nor a filter"):
        run_code(f"open({MARK!r}, 'w')", _layers=("hook",))


@pytest.mark.skipif(not ISOLATED, reason="namespaces are not permitted here")
def test_a_process_that_gets_away_dies_with_the_namespace():
    source = (
        REACH
        + "def f(x):\n    os.setsid()\n    if os.fork() == 0:\n        import time\n        time.sleep(60)\n    return os.getpid()"
    )
    before = set(users())
    outcome = run_code(source, CALLS, Limits(wall_s=1.2, cpu_s=1, processes=3), _layers=("namespaces",))
    assert outcome.values == [1], outcome
    assert set(users()) == before


PROGRAMS = {
    "square": (GOOD, [("f", [3], 9)]),
    "several": ("import math\nfrom collections import Counter, namedtuple\nP = namedtuple('P', 'x y')\n"
                "def root(x): return math.sqrt(x)\ndef count(s): return Counter(s)\ndef pair(a): return P(a, True)",
                [("root", [2.0], 1.41421356237), ("count", ["aab"], {"a": 2, "b": 1}), ("pair", [1], [1, True])]),
    "classes": ("from __future__ import annotations\nfrom dataclasses import dataclass, asdict, field\nfrom typing import List, Optional\n"
                "from enum import IntEnum\nimport functools, heapq, bisect, itertools, operator, copy, string, re, statistics\n"
                "@dataclass(order=True)\nclass A:\n    x: int\n    y: List[int] = field(default_factory=list)\n"
                "class E(IntEnum):\n    ONE = 1\n"
                "def f(n: Optional[int]): return [asdict(copy.deepcopy(A(n))), E.ONE, statistics.mean([1, 2]), re.sub('a', 'b', 'aa')]",
                [("f", [1], [{"x": 1, "y": []}, 1, 1.5, "bb"])]),
    "deep": ("import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10**6)\n@lru_cache(None)\n"
             "def f(n): return 0 if n == 0 else 1 + f(n - 1)", [("f", [5000], 5000)]),
    "dates": ("from datetime import datetime\nfrom fractions import Fraction\nfrom decimal import Decimal\n"
              "def f(s): return [datetime.strptime(s, '%Y-%m-%d').year, str(Fraction(1, 3)), str(Decimal('0.1') + 1), f'{1:>3}']",
              [("f", ["2024-02-03"], [2024, "1/3", "1.1", "  1"])]),
    "prints and catches": ("try:\n    import numpy\nexcept ImportError:\n    numpy = None\nprint('hello ä')\n"
                           "def f(): print('x'); return None\nif __name__ == '__main__':\n    input()", [("f", [], None)]),
    "large integers": ("import math\ndef f(n): return math.factorial(n)", [("f", [100], __import__("math").factorial(100))]),
}  # fmt: skip


@pytest.mark.parametrize("layers", [LAYERS, ("filter", "hook"), ("namespaces", "hook")], ids=" ".join)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_good_program_gets_all(name, layers):
    if "filter" not in layers and not ISOLATED:
        pytest.skip("namespaces are not permitted here")
    source, checks = PROGRAMS[name]
    outcome = run_code(source, [Call(function, arguments) for function, arguments, _ in checks], _layers=layers)
    assert credit(outcome, [expected for *_, expected in checks]) == 1, outcome
    assert outcome.status == "ok" and outcome.reached == "called"


def test_the_same_program_gives_the_same():
    source = (
        "import random\ndef f(x):\n    print({'a', 'b', 'c', 'd'}, hash('x'))\n    class A: pass\n"
        "    return [random.random(), random.Random().random(), random.sample(range(99), 5), list({'a', 'b', 'c'}), id(A()) > 0]"
    )
    first, second = (run_code(source, CALLS) for _ in range(2))
    assert (first.values, first.printed, first.status) == (second.values, second.printed, "ok")
    assert first.values[0][0] == __import__("random").Random(0).random()


def test_one_call_that_fails_does_not_stop_the_next():
    outcome = run_code("def f(x): return 1 // x", [Call("f", [1]), Call("f", [0]), Call("g", []), Call("f", [-1])])
    assert outcome.values == [1, None, None, -1] and outcome.ran == [True, False, False, True]
    assert (outcome.status, outcome.reached) == ("runtime", "defined") and "ZeroDivisionError" in outcome.detail
    assert "(line 1)" in outcome.detail


def test_a_missing_value_is_not_the_value_none():
    outcome = run_code("def f(x): raise ValueError", CALLS)
    assert outcome.values == [None] and credit(outcome, [None]) == 0.3


def test_limits_hold_in_other_threads_and_side_by_side():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda source: run_code(source, CALLS, Limits(wall_s=2.5, cpu_s=1)).status,
                              ["def f(x):\n    while True: pass", GOOD, GOOD, REACH + "os.fork()"]))  # fmt: skip
    assert found == ["timeout", "ok", "ok", "forbidden"]
    assert threading.active_count() < 20


def test_more_than_one_process_permits_threads_where_there_are_namespaces():
    source = (
        "import threading\ndef f(x):\n    found = []\n    t = threading.Thread(target=lambda: found.append(x * x))\n"
        "    t.start(); t.join()\n    return found[0]"
    )
    assert run_code(source, CALLS).status == "import"
    outcome = run_code(source, CALLS, Limits(processes=4, wall_s=2))
    assert outcome.values == [4] or not outcome.isolated, outcome


def test_the_start_is_quick():
    def seconds() -> float:
        start = time.perf_counter()
        run_code(GOOD, CALLS)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.2  # 25 ms on an idle core


def memory_of(process: int) -> bytes:
    """All that a process can read and write."""
    found = b""
    with open(f"/proc/{process}/mem", "rb") as memory:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            first, last = (int(part, 16) for part in span.split("-"))
            if "rw" in rights and last - first < 1 << 27:
                try:
                    memory.seek(first)
                    found += memory.read(last - first)
                except OSError:
                    pass
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to read the memory of other users")
def test_neither_the_nonce_nor_expected_values_reach_the_program(monkeypatch):
    nonce, token, expected = "5e" * 16, "70" * 16, "what-f-should-return"
    given = iter([token, nonce])
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: next(given))
    before = {p.pid for p in users()}
    reward = code_reward(limits=Limits(wall_s=2))
    tests = [[{"call": "f", "args": ["an-argument"], "expected": expected}]]
    source = "import time\ndef f(x):\n    print(x, flush=True)\n    time.sleep(9)"
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(reward, ["?"], [source], tests=tests)
        new: list[psutil.Process] = []
        while len(new) < 2 or new[-1].status() != "sleeping":
            time.sleep(0.05)
            new = sorted((p for p in set(users()) if p.pid not in before), key=lambda p: p.pid)
        time.sleep(0.2)
        harness, program = memory_of(new[0].pid), memory_of(new[1].pid)
        said = b"".join(Path(f"/proc/{p.pid}/{name}").read_bytes() for p in new for name in ("cmdline", "environ"))
        assert run.result() == [0.3]
    assert b"an-argument" in program and token.encode() in program
    assert nonce.encode() in harness and nonce.encode() not in program
    for text in (harness, program, said):
        assert expected.encode() not in text
    assert nonce.encode() not in said and token.encode() not in said


def test_the_harness_imports_nothing_of_quantkit():
    child = "import sys; sys.argv = ['x']; sys.path.insert(0, 'quantkit/rl'); import sandbox_child; sandbox_child.load_program(); " \
            "print([m for m in sys.modules if m.split('.')[0] in ('quantkit', 'numpy', 'torch', 'json', 're', 'enum', 'socket')])"  # fmt: skip
    out = subprocess.run([sys.executable, "-s", "-P", "-S", "-B", "-c", child], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parent.parent).stdout  # fmt: skip
    assert out.strip() == "[]"


def test_the_caller_is_as_before():
    def state() -> list[str]:
        kept = ("Umask", "Uid", "Seccomp", "NoNewPrivs", "Cap")
        return [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kept)] + [
            Path("/proc/thread-self/personality").read_text(), os.getcwd(), str(sorted(os.listdir("/proc/self/fd"))),
        ]  # fmt: skip

    before = state()
    run_code(GOOD, CALLS)
    assert state() == before


@pytest.mark.parametrize("answer", ["", "import sys; sys.exit(3)", "print('00' * 16, 1, '-', 0, 0.1, 0.1, 0, 0)"])
def test_an_answer_without_the_nonce_is_none(tmp_path, monkeypatch, answer):
    (tmp_path / "child.py").write_text(answer)
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    with pytest.raises(RewardError, match="no answer"):
        run_code(GOOD, CALLS)


@pytest.mark.parametrize(
    "values", [{"wall_s": 0}, {"cpu_s": 0}, {"memory_mib": 1}, {"processes": 0}, {"cpu_s": 1.5}, {"wall_s": float("nan")}]
)
def test_limits_must_make_sense(values):
    with pytest.raises(RewardError, match=next(iter(values))):
        Limits(**values)


@pytest.mark.parametrize("arguments", [[object()], [b"x"], [{1, 2}]])
def test_arguments_must_be_plain(arguments):
    with pytest.raises(RewardError, match="plain data"):
        run_code(GOOD, [Call("f", arguments)])


# --- the reward

TWO = [{"call": "f", "args": [2], "expected": 4}, {"call": "f", "args": [3], "expected": 9}]
GRADES = [
    (f"Well.\n```python\n{GOOD}```\n", 1.0),
    (GOOD, 1.0),
    (f"```python\ndef f(x): return 0\n```\nBetter:\n```python\n{GOOD}```", 1.0),
    ("def f(x): return 4", 0.75),
    ("def f(x): return [4, 9][x - 2] if x < 3 else 1 / 0", 0.55),
    ("def f(x): return float(x * x)", 0.5),
    ("def g(x): return x", 0.3),
    ("def f(x): return 1 / 0", 0.3),
    ("x = 1 / 0", 0.1),
    ("import numpy", 0.1),
    ("def f(x) return x", 0.0),
    (f"```python\n{GOOD}", 0.0),
    ("I cannot do that.", 0.0),
    ("", 0.3),
    ("import socket", -0.5),
]


def test_graded_credit():
    texts = [text for text, _ in GRADES]
    reward = code_reward(workers=2)
    found = reward(["?"] * len(texts), texts, tests=[TWO] * len(texts))
    assert dict(zip(texts, found, strict=True)) == dict(GRADES)
    assert reward.__name__ == "code"


def test_messages_json_and_rows_without_tests():
    reward = code_reward("checks")
    said = [{"role": "assistant", "content": f"```python\n{GOOD}```"}]
    assert reward(["?"] * 4, [said] * 4, checks=[TWO, json.dumps(TWO), [], None]) == [1.0, 1.0, None, None]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({}, "needs the column 'tests'"),
        ({"tests": []}, "needs the column 'tests'"),
        ({"tests": [[{"call": "f"}]]}, "row 0: the tests are malformed"),
        ({"tests": ["{"]}, "row 0: the tests are no JSON"),
        ({"tests": [[{"call": 3, "args": [], "expected": 1}]]}, "row 0"),
        ({"tests": [[{"call": "f", "args": [], "expected": {1, 2}}]]}, "row 0"),
    ],
)
def test_a_wrong_column_is_named(columns, match):
    with pytest.raises(RewardError, match=match):
        code_reward()(["?"], [GOOD], **columns)


@pytest.mark.parametrize(
    ("value", "true", "equal"),
    [
        (1, 1, True), (True, 1, False), (1, True, False), (1.0, 1, False), (1, 1.0, True), (1 + 1e-12, 1.0, True), (1.0001, 1.0, False),
        (10**400, 1.0, False), (float("nan"), float("nan"), False), (float("inf"), float("inf"), True), ([1, [2.0]], [1, [2]], False),
        ([1, 2], [1, 2, 3], False), ({"a": 1}, {"a": 1}, True), ({"a": True}, {"a": 1}, False), ("a", "a", True), (None, None, True),
        (None, False, False), ([], {}, False), (10**30 + 1, 10**30, False),
    ],
)  # fmt: skip
def test_equality_is_strict(value, true, equal):
    assert same(value, true) is equal


def test_the_source_is_found_in_linear_time():
    start = time.monotonic()
    assert source_of("```python\n" * 200_000).startswith("```python")
    assert source_of("```py\nx\n```\n```\ny\n```\n") == "x\n"
    assert time.monotonic() - start < 1
    assert code.FENCES
