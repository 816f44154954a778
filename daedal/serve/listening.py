"""The socket on which a server listens. Taken before anything is loaded, so that a port in use is said at once."""

import socket

from daedal.errors import DaedalError

BACKLOG = 2048


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A listening socket; port 0 picks a free one. DaedalError when the address cannot be had."""
    if not 0 <= port <= 65535:
        raise DaedalError(f"port is {port}: it must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise DaedalError(
            f"the host {host!r} cannot be resolved ({error.strerror}): give another with --host"
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        sentence = f"port {port} on {host} cannot be used ({error.strerror}): give another with --port"
        raise DaedalError(sentence) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL under which this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
