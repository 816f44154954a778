"""Starts a process of ours at the other end of a socket pair, inherited, without name or port. Knows no messages."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def spawned(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and our end of its socket. command: gets the other end's file descriptor as its last argument."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is the front end's own
            env=environment,
        )
    return process, ours
