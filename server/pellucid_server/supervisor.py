"""Keeps a few processes running: starts, watches, restarts and stops them, and shows what they print.

One thread, one loop. The first service starts alone; the others once it is healthy. A child that dies is
started again after a pause; one that dies three times in a row before it was healthy ends everything.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from .processes import dying_with_parent, how_it_ended, identity, signal_group

_FAILED_STARTS = 3
_TICK_SECONDS = 0.1
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 10.0
#: One that ran this long before it died is started again as if it had never died before.
_STEADY_SECONDS = 30.0
#: Asked to end, then killed: together well under the ten seconds `pellucid up` promises.
_GRACE_SECONDS, _LAST_GRACE_SECONDS = 6.0, 2.0
_COLOURS = (36, 32, 33, 35, 34, 31)


def _at_once() -> bool:
    return True


@dataclass(frozen=True)
class Service:
    """One process to keep running.

    Attributes:
        name: what its lines are marked with.
        command: what runs it.
        healthy: whether it does its work; asked after each start until it says yes.
        before_start: called before each start; while it says no, the start waits.
        why: the reason it failed to start, if it left one; by default its last line.
    """

    name: str
    command: Sequence[str]
    healthy: Callable[[], bool]
    before_start: Callable[[], bool] = _at_once
    why: Callable[[], str] = str


@dataclass
class _Child:
    """A service and its present process."""

    service: Service
    process: subprocess.Popen[bytes] | None = None
    healthy: bool = False
    failed_starts: int = 0
    deaths: int = 0
    started: float = 0.0
    not_before: float = 0.0
    partial: bytes = b""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=20))


class Supervisor:
    """Runs services until told to stop.

    Args:
        services: the first is started before, and stopped after, the others.
        env: the children's environment.
        pids: file that names the children while they run; see :func:`end_leftovers`.
        ready: whether everything together does its work; asked once all are healthy, until it says yes.
        announce: called whenever that becomes so.
        out: where lines are written; in colours if it is a terminal.
    """

    def __init__(
        self,
        services: Sequence[Service],
        *,
        env: Mapping[str, str],
        pids: Path,
        ready: Callable[[], bool],
        announce: Callable[[], None],
        out: IO[str] = sys.stdout,
    ) -> None:
        self._children = [_Child(service) for service in services]
        self._env = dict(env)
        self._pids = pids
        self._ready, self._announce = ready, announce
        self._announced = self._others_may_start = False
        self._out = out
        self._coloured = out.isatty() and "NO_COLOR" not in os.environ
        self._width = max(len(service.name) for service in services)
        self._selector = selectors.DefaultSelector()
        self._signals = 0
        self._failure: str | None = None

    def run(self) -> str | None:
        """Until a signal (SIGINT, SIGTERM, SIGHUP) or a service that cannot be started; the reason then.

        Call it from the main thread of a process with no other: children die with the thread that made them.
        """
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            while not self._signals and self._failure is None:
                self._start_those_due()
                self._show_output(_TICK_SECONDS)
                self._see_deaths()
                self._see_health()
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._failure

    def say(self, text: str, name: str = "up", colour: int = 1) -> None:
        """One line of output, marked with who says it."""
        mark = f"{name:<{self._width}} |"
        self._out.write(f"\x1b[{colour}m{mark}\x1b[0m {text}\n" if self._coloured else f"{mark} {text}\n")
        self._out.flush()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _start_those_due(self) -> None:
        for child in self._children:
            due = child.process is None and time.monotonic() >= child.not_before
            if due and child.service.before_start():
                self._start(child)
            if not self._others_may_start:
                return

    def _start(self, child: _Child) -> None:
        child.healthy, child.started = False, time.monotonic()
        child.lines.clear()
        child.process = subprocess.Popen(
            child.service.command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dying_with_parent(signal.SIGKILL),
        )
        assert child.process.stdout is not None
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)
        self._write_pids()

    def _show_output(self, seconds: float) -> None:
        """Show what children printed, waiting up to ``seconds`` for some."""
        if not self._selector.get_map():
            time.sleep(seconds)
        for key, _ in self._selector.select(seconds):
            self._read(key.data)

    def _read(self, child: _Child) -> None:
        """Show the next bytes of a child."""
        assert child.process is not None
        assert child.process.stdout is not None
        data = os.read(child.process.stdout.fileno(), 1 << 16)
        *lines, child.partial = (child.partial + data).split(b"\n")
        if not data:
            self._selector.unregister(child.process.stdout)
            child.process.stdout.close()
            lines, child.partial = [child.partial], b""
        colour = _COLOURS[self._children.index(child) % len(_COLOURS)]
        for line in lines:
            # A progress bar rewrites its line: the last state of it is enough.
            text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip()
            if text:
                child.lines.append(text)
                self.say(text, child.service.name, colour)

    def _see_deaths(self) -> None:
        for child in self._children:
            if child.process is None or child.process.poll() is None:
                continue
            code = self._bury(child)
            self._announced = False
            steady = time.monotonic() - child.started > _STEADY_SECONDS
            child.deaths = 1 if child.healthy and steady else child.deaths + 1
            child.failed_starts = 0 if child.healthy else child.failed_starts + 1
            if child.failed_starts >= _FAILED_STARTS:
                reason = child.service.why() or (child.lines[-1] if child.lines else how_it_ended(code))
                reason = reason.removeprefix("Error: ")
                self._failure = f"{child.service.name} failed to start {_FAILED_STARTS} times: {reason}"
                return
            pause = min(_FIRST_PAUSE_SECONDS * 2 ** (child.deaths - 1), _LONGEST_PAUSE_SECONDS)
            child.not_before = time.monotonic() + pause
            self.say(f"{child.service.name} {how_it_ended(code)}; starting it again in {pause:g} s")

    def _bury(self, child: _Child) -> int:
        """Show a dead child's last words, end what is left of its group, and give its return code."""
        assert child.process is not None
        assert child.process.stdout is not None
        signal_group(child.process.pid, signal.SIGKILL)  # first: a grandchild may hold the pipe open
        pipe = child.process.stdout
        while not pipe.closed and select.select([pipe], [], [], _TICK_SECONDS)[0]:
            self._read(child)
        if not pipe.closed:  # a process that left the group holds it open
            self._selector.unregister(pipe)
            pipe.close()
        code = child.process.wait()
        child.process = None
        return code

    def _see_health(self) -> None:
        for child in self._children:
            if child.process is not None and not child.healthy:
                child.healthy = child.service.healthy()
        self._others_may_start = self._others_may_start or self._children[0].healthy
        if not self._announced and all(child.healthy for child in self._children) and self._ready():
            self._announced = True
            self._announce()

    def _stop(self) -> None:
        """End the others, then the first; ask, wait, then kill. A second signal skips the waiting."""
        first, *others = self._children
        asked = self._signals
        if self._signals:
            self.say("stopping")
        for children, seconds in ((others, _GRACE_SECONDS), ([first], _LAST_GRACE_SECONDS)):
            running = [child for child in children if child.process is not None]
            for child in running:
                assert child.process is not None
                child.process.terminate()
            deadline = time.monotonic() + seconds
            while running and time.monotonic() < deadline and self._signals <= max(asked, 1):
                self._show_output(_TICK_SECONDS)
                running = [child for child in running if child.process and child.process.poll() is None]
            for child in children:
                if child.process is not None:
                    self._bury(child)
        self._selector.close()
        self._pids.unlink(missing_ok=True)

    def _write_pids(self) -> None:
        running = {c.service.name: c.process.pid for c in self._children if c.process is not None}
        record = [{"name": name, "pid": pid, "identity": identity(pid)} for name, pid in running.items()]
        temporary = self._pids.with_suffix(".new")
        temporary.write_text(json.dumps(record))
        temporary.replace(self._pids)


def end_leftovers(pids: Path) -> list[str]:
    """End the children a killed supervisor left behind; the names of those that still ran.

    A pid counts only if the process that has it started when the recorded one did.
    """
    try:
        record = json.loads(pids.read_text())
        left = [(str(c["name"]), int(c["pid"]), str(c["identity"])) for c in record]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    alive = [(name, pid, who) for name, pid, who in left if identity(pid) == who]
    for _, pid, _ in alive:
        signal_group(pid, signal.SIGKILL)
    deadline = time.monotonic() + _LAST_GRACE_SECONDS
    while any(identity(pid) == who for _, pid, who in alive) and time.monotonic() < deadline:
        time.sleep(0.02)
    pids.unlink(missing_ok=True)
    return [name for name, _, _ in alive]
