"""A relay on loopback whose line can be cut: then nothing passes any more, and nothing is closed."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress


class Relay:
    """Listens on a port of its own for each of `ports` and passes everything on, unless it is cut.

    Attributes:
        ports: by the port at the coordinator, the one to connect to instead.
    """

    def __init__(self, ports: list[int]) -> None:
        self._open = threading.Event()
        self._open.set()
        self._stop = threading.Event()
        self.ports: dict[int, int] = {}
        self._listeners: list[socket.socket] = []
        for port in ports:
            listener = socket.create_server(("127.0.0.1", 0))
            listener.settimeout(0.2)
            self.ports[port] = listener.getsockname()[1]
            self._listeners.append(listener)
            threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._stop.set()
        self._open.set()
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: socket.socket, port: int) -> None:
        while not self._stop.is_set():
            try:
                inner, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            threading.Thread(target=self._pass, args=(inner, port), daemon=True).start()

    def _pass(self, inner: socket.socket, port: int) -> None:
        with inner, suppress(OSError):
            self._open.wait()
            with socket.create_connection(("127.0.0.1", port)) as outer:
                inner.setblocking(True)
                other = {inner: outer, outer: inner}
                while not self._stop.is_set():
                    for ready in select.select([inner, outer], [], [], 0.2)[0]:
                        if not self._open.is_set():
                            time.sleep(0.05)  # what was sent waits, as it does before a router that is off
                            continue
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        other[ready].sendall(data)
