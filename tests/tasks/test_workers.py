"""Workers: whatever a user's function does costs that one reward; no process is left behind."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

from nanomath.judge.child import Child
from nanomath.rewards import Rewards
from nanomath.run.loop import STEP_TIMEOUT_S
from nanomath.tasks import Problem
from nanomath.tasks import workers as reward_workers
from nanomath.tasks.workers import Workers, default_num_workers
from train_grpo import GRPOConfig

PROBLEM = Problem(7, "mine", "What?", {"answer": "4", "row": {"points": 0.5}})
SECONDS = 1.0

HOSTILE = '''
import ctypes, os, resource, signal, subprocess, sys, threading, time

def act(problem, completion):
    return ACTIONS.get(completion, lambda: float(len(completion)))()

def forever():
    while True:
        pass

def flood():
    while True:
        print("x" * 10000)

def hang_with_child():
    child = subprocess.Popen(["sleep", "1000"])
    open(__file__ + ".pid", "w").write(str(child.pid))
    child.wait()

def forked():
    return 0.5 if os.fork() else 0.75

def fork_and_wait():
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    os.waitpid(child, 0)

def child_left():
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(3)

def deep():
    return 1 + deep()

def left_thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return 0.5

def say(text):
    print(text)
    os.system("echo echo from a shell")
    os.write(1, b"[9.0, null]\\n")
    return 0.5

def read_input():
    return float(len(sys.stdin.read()))

def terminal():
    raise ValueError("\\x1b[2J\\n数")

class Unprintable(Exception):
    def __str__(self):
        raise self

def unprintable():
    raise Unprintable

ACTIONS = {
    "raise": lambda: 1 / 0, "unprintable": unprintable, "exit": lambda: sys.exit(3),
    "deep": deep, "memory": lambda: bytearray(10**15), "terminal": terminal,
    "nan": lambda: float("nan"), "text": lambda: "1.0", "list": lambda: [1.0] * 10**6,
    "_exit": lambda: os._exit(3), "segfault": lambda: ctypes.string_at(0), "abort": os.abort,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "closed": lambda: os.closerange(0, 99),
    "realtime": lambda: os.kill(os.getpid(), signal.SIGRTMIN + 3),
    "sleep": lambda: time.sleep(1000), "forever": forever, "flood": flood,
    "lock": lambda: ctypes.PyDLL(None).sleep(1000), "fork_and_wait": fork_and_wait,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP), "child": hang_with_child,
    "child_left": child_left,
    "none": lambda: None, "forked": forked, "left_thread": left_thread, "say": lambda: say("hi"),
    "read_input": read_input, "modules": lambda: float("torch" in sys.modules),
    "pid": os.getpid, "nap": lambda: time.sleep(0.2) or 0.5, "zero": lambda: 0.0,
    "hash": lambda: hash("a set of texts is in the same order in every worker"),
    "core": lambda: resource.getrlimit(resource.RLIMIT_CORE)[0],
    "oom": lambda: float(open("/proc/self/oom_score_adj").read()),
}
'''  # fmt: skip
FAILURES = {
    "raise": "ZeroDivisionError: division by zero",
    "unprintable": "Unprintable: (an error without a text)",
    "exit": "SystemExit: 3",
    "deep": "RecursionError: maximum recursion depth exceeded",
    "memory": "MemoryError: ",
    "terminal": r"ValueError: \x1b[2J\n数",
    "nan": "it returned nan, not a number within 1e+50",
    "text": "TypeError: a reward must be a number, not str",
    "list": "TypeError: float() argument must be a string or a real number, not 'list'",
    "_exit": "it ended its process (exit status 3)",
    "segfault": f"it ended its process ({signal.strsignal(signal.SIGSEGV)})",
    "abort": f"it ended its process ({signal.strsignal(signal.SIGABRT)})",
    "killed": f"it ended its process ({signal.strsignal(signal.SIGKILL)})",
    "realtime": f"it ended its process ({signal.strsignal(signal.SIGRTMIN + 3)})",
    "closed": "it ended its process (exit status 1)",
    "child_left": "it ended its process (exit status 3)",
    **dict.fromkeys(
        ["sleep", "forever", "flood", "lock", "fork_and_wait", "stopped", "child"],
        "it took more than 1 s",
    ),
}
IN_FILE = r" \(hostile\.py, line \d+\)$"
IN_LINE = {"raise": "1 / 0", "terminal": "raise ValueError"}
REWARDS = {"none": None, "forked": 0.5, "left_thread": 0.5, "say": 0.5, "read_input": 0.0,
           "modules": 0.0, "zero": 0.0, "core": 0.0, "x" * 9: 9.0}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "hostile.py"
    file.write_text(HOSTILE)
    return f"{file}:act"


@pytest.fixture(scope="module")
def workers(spec):
    workers = Workers([spec], num_workers=4, seconds=SECONDS)
    yield workers
    workers.close()


def tasks(*completions):
    return [(0, PROBLEM, completion) for completion in completions]


if sys.platform == "linux":
    REWARDS["oom"] = 1000.0  # when memory runs out a worker goes first, not the trainer


def pids(workers) -> list[int]:
    return [process.pid for process in workers._children if process is not None]


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids, seconds: float) -> list[int]:
    """Return those that are still alive after `seconds`."""
    pids = list(pids)
    give_up = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left


def test_hostile_functions_cost_their_own_reward_alone(workers, spec, capfd):
    """Of one batch every failure is None and named, with the line of the user's file where there is
    one; every other completion has its number."""
    kinds = [*FAILURES, *REWARDS]
    start = time.monotonic()
    scored = workers.score(tasks(*(text for kind in kinds for text in (kind, "abc"))))
    assert scored[1::2] == [(3.0, None)] * len(kinds)
    places = {kind: failure for kind, (_, failure) in zip(kinds, scored[::2]) if failure}
    lines = HOSTILE.splitlines()
    for kind, text in IN_LINE.items():
        (number,) = (n for n, line in enumerate(lines, 1) if text in line)
        assert places[kind].endswith(f" (hostile.py, line {number})")
    scored = [(reward, failure and re.sub(IN_FILE, "", failure)) for reward, failure in scored]
    assert dict(zip(kinds, scored[::2], strict=True)) == {
        **{kind: (None, failure) for kind, failure in FAILURES.items()},
        **{kind: (reward, None) for kind, reward in REWARDS.items()},
    }
    assert time.monotonic() - start < 15  # seven limits of 1 s over 4 workers, and 12 restarts
    child = int(Path(spec.removesuffix(":act") + ".pid").read_text())
    assert wait_until_gone([child], 2) == []
    assert len(capfd.readouterr().err) < reward_workers.OUTPUT_BYTES + 100


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names children on Linux alone")
def test_a_forked_child_that_comes_back_ends(spec):
    """A function that returns twice, in two processes, is answered once; the child ends."""
    workers = Workers([spec], num_workers=1, seconds=SECONDS)
    (pid,) = pids(workers)
    assert workers.score(tasks(*["forked"] * 5)) == [(0.5, None)] * 5
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 5 and wait_until_gone(map(int, children), 2) == []
    workers.close()


def test_what_functions_print_is_shown(workers, capfd):
    """All that they print, and the lines where one hangs or crashes, on stderr."""
    workers.score(tasks("say"))
    assert capfd.readouterr().err == "hi\necho from a shell\n[9.0, null]\n"
    lines = HOSTILE.splitlines()
    for kind, words in (("sleep", "Timeout"), ("lock", "Timeout"), ("segfault", "Fatal Python")):
        workers.score(tasks(kind))
        error = capfd.readouterr().err
        (number,) = (n for n, line in enumerate(lines, 1) if f'"{kind}":' in line)
        assert words in error and f'hostile.py", line {number} in' in error


def test_what_floods_is_cut_in_each_call(workers, capfd):
    """Of a function that prints without an end a call shows its first 20,000 bytes, and says so."""
    for _ in range(2):
        workers.score(tasks("flood"))
        shown, notice, more = capfd.readouterr().err.partition(
            "\n(what else reward functions print"
        )
        assert 19_000 < len(shown) <= 20_000 and set(shown) == {"x", "\n"} and notice
        assert len(more) < 100


def test_workers_are_kept_and_only_the_lost_one_replaced(spec):
    """Set-up is paid once: the same two processes score every call, until one is killed."""
    workers = Workers([spec], num_workers=2, seconds=SECONDS)
    before = set(pids(workers))
    for _ in range(3):
        assert {reward for reward, _ in workers.score(tasks(*["pid"] * 40))} <= before
    assert workers.score(tasks("_exit", *["nap"] * 6))[0][0] is None
    assert len(before & set(pids(workers))) == 1 and len(pids(workers)) == 2
    left = pids(workers)
    workers.close()
    assert wait_until_gone(left, 2) == []


def test_the_number_of_workers_changes_nothing(spec):
    """One worker or three: the same rewards, in the order of the completions; in parallel."""
    completions = ["x" * length for length in range(60)] + ["raise", "none", "hash"]
    results, seconds = [], []
    for num_workers in (1, 3):
        workers = Workers([spec], num_workers=num_workers, seconds=5)
        results.append(workers.score(tasks(*completions)))
        start = time.monotonic()
        assert workers.score(tasks(*["nap"] * 6)) == [(0.5, None)] * 6
        seconds.append(time.monotonic() - start)
        workers.close()
    assert results[0] == results[1]
    assert results[0][:60] == [(float(length), None) for length in range(60)]
    assert seconds[0] >= 6 * 0.2 and 2 * 0.2 <= seconds[1] < 6 * 0.2


def test_text_arrives_as_it_is(tmp_path):
    """Control characters, half a surrogate pair, a megabyte; the problem with all its fields."""
    file = tmp_path / "echo.py"
    file.write_text(
        "import zlib\n"
        "def echo(problem, completion):\n"
        "    text = completion + repr(problem)\n"
        "    return zlib.crc32(text.encode('utf-8', 'surrogatepass'))\n"
    )
    texts = ["", "\n", "a\r\nb\u2028c\x00", "\ud800", "数学 \U0001f600", '"]}\n{', "x" * 1_000_000]
    workers = Workers([f"{file}:echo"], num_workers=2, seconds=5)
    scored = workers.score(tasks(*texts))
    workers.close()
    expected = [zlib.crc32((t + repr(PROBLEM)).encode("utf-8", "surrogatepass")) for t in texts]
    assert [reward for reward, _ in scored] == expected


def test_two_functions_one_of_which_hangs_at_times(tmp_path, spec):
    """The sum is None only where one of weight other than 0 gave none; the other's stay."""
    file = tmp_path / "points.py"
    file.write_text(
        "import helper\n"
        "def points(problem, completion):\n    return helper.part(problem.payload['row'])\n"
    )
    (tmp_path / "helper.py").write_text("def part(row):\n    return row['points']\n")
    names = ("format", spec, f"{file}:points")
    completions = ["abc", "sleep", "none", "zero"]
    for weights, totals in (((1, 2, 4), [8.0, None, None, 2.0]), ((1, 0, 4), [2.0] * 4)):
        with Rewards(names, weights, seconds=SECONDS, num_workers=2) as rewards:
            assert rewards.score([PROBLEM] * 4, completions) == (
                totals,
                {"format": [0.0] * 4, "act": [3.0, None, None, 0.0], "points": [0.5] * 4},
            )


def test_signals_for_the_trainer_do_not_end_a_worker(spec):
    """Ctrl-C and a scheduler's warning reach every process: a reward on its way still arrives."""
    workers = Workers([spec], num_workers=1, seconds=5)
    (pid,) = pids(workers)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    timers = [threading.Timer(0.1, os.kill, (pid, number)) for number in numbers]
    for timer in timers:
        timer.start()
    assert workers.score(tasks("nap", "pid")) == [(0.5, None), (float(pid), None)]
    assert os.getpgid(pid) == pid != os.getpgid(0)  # a terminal's Ctrl-C does not even come
    workers.close()


def test_ctrl_c_ends_the_workers(spec):
    """KeyboardInterrupt in the middle of a batch leaves score() and no process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    with (
        pytest.raises(KeyboardInterrupt),
        Rewards((spec, "format"), seconds=60, num_workers=2) as rewards,
    ):
        left = pids(rewards._workers)
        timer.start()
        rewards.score([PROBLEM] * 3, ["sleep", "forever", "sleep"])
    signal.signal(signal.SIGINT, before)
    assert len(left) == 2 and wait_until_gone(left, 2) == []


KILLED = """
import sys, threading
from nanomath.tasks.workers import Workers
from nanomath.tasks import Problem
workers = Workers([sys.argv[1]], num_workers=3, seconds=1.5)
print([process.pid for process in workers._children], flush=True)
for kinds in (["left_thread"] * 3, ["forever", "lock"]):
    workers.score([(0, Problem(0, "", "", {}), kind) for kind in kinds])
"""


def test_no_worker_outlives_a_killed_trainer(spec):
    """kill -9: the idle worker ends at once, those that hang, even in C, within their limit."""
    root = Path(__file__).resolve().parent.parent.parent
    trainer = subprocess.Popen(
        [sys.executable, "-c", KILLED, spec], cwd=root, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    left = json.loads(trainer.stdout.readline())
    time.sleep(0.3)
    assert len(left) == 3 and all(map(is_alive, left))
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    start = time.monotonic()
    while sum(map(is_alive, left)) > 2 and time.monotonic() - start < 1:
        time.sleep(0.02)
    assert sum(map(is_alive, left)) == 2  # the two that hang
    assert wait_until_gone(left, 3) == []


GOOD = """
number = 3

def f(problem, completion):
    return 1

def one(completion):
    return 1
"""


def test_files_that_do_not_load(tmp_path, monkeypatch):
    """Errors in the file, a missing function, one that is not callable, set-up without end: one
    error that names the reward; nothing is left running."""
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "fails.py").write_text("1 / 0\n")
    (tmp_path / "exits.py").write_text("import sys; sys.exit('no GPU')\n")
    (tmp_path / "ends.py").write_text("import os; os._exit(4)\n")
    (tmp_path / "hangs.py").write_text("while True: pass\n")
    (tmp_path / "good.py").write_text(GOOD)
    for name, message in (
        ("broken.py:f", "SyntaxError"),
        ("fails.py:f", "ZeroDivisionError: division by zero"),
        ("exits.py:f", "SystemExit: no GPU"),
        ("ends.py:f", r"it ended its process \(exit status 4\)"),
        ("good.py:g", "has no function 'g'; it has f, one"),
        ("good.py:number", "has no function 'number'"),
        ("good.py:one", r"one is called with \(problem, completion\): too many positional"),
        ("hangs.py:f", "it took more than 0.5 s"),
    ):
        if name == "hangs.py:f":
            monkeypatch.setattr(reward_workers, "START_SECONDS", 0.5)
        with pytest.raises(ValueError, match=message) as error:
            Workers([f"{tmp_path}/{name}"], num_workers=1, seconds=1)
        assert f"reward {tmp_path}/{name} does not load" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_worker_that_cannot_be_replaced(tmp_path, monkeypatch):
    """What no worker is left for is None and named; the next call tries again."""
    file = tmp_path / "edited.py"
    good = "import os\ndef f(problem, completion):\n    return len(completion) or os._exit(1)\n"
    file.write_text(good)
    workers = Workers([f"{file}:f"], num_workers=1, seconds=5)
    file.write_text("1 / 0\n")
    scored = workers.score(tasks("a", "", "b", "c"))
    assert scored[:2] == [(1.0, None), (None, "it ended its process (exit status 1)")]
    assert "does not load: ZeroDivisionError" in scored[2][1] and scored[2][0] is None
    assert scored[3] == (None, "no worker was left to score it")
    file.write_text(good)
    assert workers.score(tasks("ab")) == [(2.0, None)]
    monkeypatch.setattr(reward_workers, "BATCH_SECONDS", -1.0)  # the time for a step is over
    assert workers.score(tasks("ab", "c"))[1][1].startswith("not scored: the step took")
    workers.close()


def test_rewards_end_before_other_ranks_give_up():
    """The longest a step's rewards may take is less than ranks wait for one another."""
    field = {field.name: field for field in dataclasses.fields(GRPOConfig)}["reward_seconds"]
    longest = reward_workers.BATCH_SECONDS + reward_workers.START_SECONDS + field.metadata["high"]
    assert longest + 10 < STEP_TIMEOUT_S


def test_number_of_workers(monkeypatch):
    """The cores are shared by the ranks of a machine: 1 to 8 workers each."""
    for cores, ranks, expected in ((2, 1, 2), (64, 1, 8), (64, 8, 8), (16, 8, 2), (4, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: range(n), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert default_num_workers() == expected


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("while True: print(end=' ', flush=True); time.sleep(0.2)", TimeoutError),
        ("while True: print('x' * 65536, end='', flush=True)", ConnectionError),
    ],
)
def test_a_reply_has_one_deadline_and_a_bound(program, error):
    """A child that drips bytes is late at its deadline, not later; one that floods is given up."""
    child = Child(
        [sys.executable, "-c", f"import time\n{program}"],
        environment={},
        on_stderr=lambda text: None,
    )
    start = time.monotonic()
    try:
        with pytest.raises(error):
            child.ask(b"", 2.0)
        assert time.monotonic() - start < 3.0
    finally:
        child.end()
