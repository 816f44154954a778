"""Starts a process of ours at the other end of a socket, inherited, without name or port. Knows no messages."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


def spawned(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and our end of a socket pair. command: as `started` takes it."""
    ours, theirs = socket.socketpair()
    with theirs:
        return started(command, theirs), ours


def started(command: Sequence[str], sock: socket.socket) -> subprocess.Popen[bytes]:
    """The process. command: gets the file descriptor of `sock`, which it inherits, as its last argument."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    return subprocess.Popen(
        [*command, str(sock.fileno())],
        pass_fds=(sock.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=2,  # stdout is the front end's own
        env=environment,
    )


def outlive_signals() -> None:
    """In a process of ours: SIGINT and SIGTERM, which a terminal sends to the whole group, end nothing. When to end is
    the front end's business, which then hangs up.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ignore)


def ignore(number: int, frame: FrameType | None) -> None:
    """A handler of signals. It stands for `signal.SIG_IGN`, which a child process would inherit."""
