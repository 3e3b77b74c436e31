"""Run tests for so many seconds, and go on later: a plugin of pytest, alone or under pytest-xdist.

`--budget` ends a run in time, `--resume` leaves out what has passed, `--log` keeps tracebacks in a
file and ends with a short list of failures. Under xdist the controller reads and writes what is
kept, and tells each worker when to stop and what to leave out. Everything is written as it comes: a
run may be killed.
"""

import contextlib
import hashlib
import importlib.metadata
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

GRACE = 10  # seconds that a test may go on after the end, before it is left
START = time.time()  # before torch is imported, with `-p budget`


def pytest_addoption(parser):
    parser.addoption("--budget", type=float, help="seconds after which no further test begins")
    parser.addoption(
        "--resume", action="store_true",
        help="leave out what has passed before, of the same source, GPU and versions, "
        "and begin with what failed last",
    )  # fmt: skip
    parser.addoption(
        "--log", metavar="FILE",
        help="write tracebacks into this file as they come, and show a line for each failure",
    )  # fmt: skip


def pytest_configure(config):
    given = getattr(config, "workerinput", None)
    if given is not None:
        config.pluginmanager.register(Share(config, *given["share"], given["workercount"]))
        return
    if config.getoption("--resume") and not hasattr(config, "cache"):
        raise pytest.UsageError("--resume needs pytest's cache: leave out -p no:cacheprovider")
    controller = Controller(config)
    config.pluginmanager.register(controller)
    if not config.getoption("numprocesses", None):
        config.pluginmanager.register(Share(config, *controller.share, controller=controller))


class Share:
    """What one process runs: all tests, or what xdist's controller sends to a worker."""

    def __init__(self, config, end, passed, failed, workers=1, controller=None):
        self.end, self.passed, self.failed = end, set(passed), set(failed)
        self.workers, self.controller = workers, controller
        self.steals = config.getoption("dist", "no") == "worksteal"
        self.before = self.late = 0  # how many had passed, and how many came too late
        self.has_failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if item.nodeid in self.passed]
        self.before = len(left_out)
        if left_out:
            config.hook.pytest_deselected(items=left_out)
        left = [item for item in items if item.nodeid not in self.passed]
        left.sort(key=lambda item: item.nodeid not in self.failed)
        if self.steals:  # each worker begins in a part of its own: deal out the first tests
            left = [item for first in range(self.workers) for item in left[first :: self.workers]]
        items[:] = left

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self):
        if time.time() < self.end:
            return None  # the test is run
        self.late += 1
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        with _alarm(self.end + GRACE - time.time(), self._leave):
            return (yield)

    def _leave(self, *_):
        self.late += 1
        pytest.skip("the budget is spent")

    def pytest_runtest_logreport(self, report):
        self.has_failed |= report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self):
        if self.has_failed and _is_gpu_lost():
            if self.controller is None:
                os._exit(1)  # xdist says so, and starts another worker
            pytest.exit("the GPU is lost by an error: --resume goes on in another process", 1)
        self.has_failed = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        done = {"before": self.before, "late": self.late}
        if self.controller is None:
            session.config.workeroutput.update(done)
        else:
            self.controller.gather(done)


class Controller:
    """What is known of the whole run, and kept of it."""

    def __init__(self, config):
        self.config = config
        self.budget, log = config.getoption("--budget"), config.getoption("--log")
        self.log = Path(log) if log else None
        self.kept, passed, failed = None, [], []
        if config.getoption("--resume"):
            self.kept = config.cache.mkdir("cassetta") / "outcomes.txt"
            self.fingerprint = _fingerprint(config.getoption("--simulate", None))
            passed, failed = _read(self.kept, self.fingerprint)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")
        self.share = START + (self.budget or math.inf), passed, failed
        self.reasons = {}  # by the names of the tests that failed
        self.before = self.late = 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["share"] = self.share

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.gather(getattr(node, "workeroutput", {}))

    def gather(self, done):
        """Add what one process tells when it is done."""
        self.before = max(self.before, done.get("before", 0))
        self.late += done.get("late", 0)

    def pytest_runtest_logreport(self, report):
        if report.failed or (report.passed and report.when == "call"):
            self._keep(report)

    def pytest_collectreport(self, report):
        if report.failed:
            self._keep(report)

    def _keep(self, report):
        if self.kept is not None:
            with self.kept.open("a") as file:
                file.write(f"{self.fingerprint} {report.outcome} {report.nodeid}\n")
        if not report.failed:
            return
        self.reasons.setdefault(report.nodeid, _reason(report))
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{f' {report.nodeid} ':=^100}\n{report.longreprtext}\n\n")

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK  # nothing is left to be done
        if exitstatus == pytest.ExitCode.OK and self.late:
            session.exitstatus = pytest.ExitCode.INTERRUPTED

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter):
        say = terminalreporter.write_line
        if self.log is not None:
            self.config.option.tbstyle = "no"  # of what is shown: the log has it
            if self.reasons:
                say(f"\n{len(self.reasons)} tests failed; {self.log} has their tracebacks")
            for line in _grouped(self.reasons, self.config.args):
                say(line)
        if self.before:
            say(f"{self.before} tests passed before, and are left out")
        if self.late:
            say(f"the budget of {self.budget:g} s is spent, {self.late} tests are left: "
                "--resume goes on")  # fmt: skip
        return (yield)


@contextlib.contextmanager
def _alarm(seconds, handle):
    """Call `handle` if this takes longer, unless somebody else's alarm comes first."""
    clock = getattr(signal, "ITIMER_REAL", None)  # which Windows has not
    other = 0.0 if clock is None else signal.getitimer(clock)[0]
    in_main = threading.current_thread() is threading.main_thread()
    if clock is None or not in_main or math.isinf(seconds) or 0 < other < seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(clock, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(clock, other)
        signal.signal(signal.SIGALRM, before)


def _read(path, fingerprint):
    """Names of tests that passed under this fingerprint, and that failed last, under any.

    A line that was cut off tells nothing.
    """
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    last = {}
    for line in whole.splitlines():
        under, outcome, name = line.split(" ", 2)
        last[name] = under, outcome
    passed = [name for name, found in last.items() if found == (fingerprint, "passed")]
    return passed, [name for name, (_, outcome) in last.items() if outcome == "failed"]


def _reason(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    words = (report.longreprtext if crash is None else crash.message).split()
    return " ".join(words)[:160]


def _grouped(reasons, order):
    """Lines: by file, those that were asked for first, and in it a line for each test function."""
    order = {os.path.normpath(name): n for n, name in enumerate(order)}
    files = {}
    for name in reasons:
        file, _, test = name.partition("::")
        files.setdefault(file, {}).setdefault(test.partition("[")[0], []).append(name)
    for file in sorted(files, key=lambda one: (order.get(one, len(order)), one)):
        yield file
        for cases in files[file].values():
            first = cases[0].partition("::")[2] or "while it was collected"
            others = f" and {len(cases) - 1} more of its cases" if len(cases) > 1 else ""
            yield f"  {first}{others}: {reasons[cases[0]]}"


def _fingerprint(simulated):
    """Of all that the outcome of a test depends on."""
    import torch

    root = Path(__file__).parent.parent
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    triton = [one.version for one in importlib.metadata.distributions(name="triton")]
    digest = hashlib.sha256(f"{gpu} {simulated} {torch.__version__} {triton[:1]}".encode())
    for folder in ("cassetta", "kernels", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _is_gpu_lost():
    """Whether an error stays in this process, so that all that follows would fail by it.

    As that of a kernel does, and a capture that failed: nothing can be drawn after it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
