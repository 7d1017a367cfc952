"""Child processes and the operating system: who a pid is, dying with the parent, ending a whole group."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def identity(pid: int) -> str | None:
    """What tells a live process from any later one with its pid: when it started. None if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            # man proc_pid_stat: the command in parentheses, then the state; starttime is field 22.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def dying_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """A ``preexec_fn`` after which the child gets this signal when the thread that made it ends; Linux only.

    Give it to Popen from a process that has one thread: what runs between fork and exec must take no lock.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), number)

    return ask


def signal_group(leader: int, number: signal.Signals) -> None:
    """Send a signal to every process of the group a child leads; none left is no error."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        return


def how_it_ended(code: int) -> str:
    """``died with exit code 3`` or ``was killed by SIGKILL``, of a Popen's return code."""
    if code >= 0:
        return f"died with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
