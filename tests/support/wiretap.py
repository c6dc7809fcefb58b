"""A tap on a plaintext connection: passes everything on, and keeps what the client sends."""

import socket
import threading
from types import TracebackType
from typing import Self

__all__ = ["Wiretap"]


class Wiretap:
    """Listens at a free port of ``host`` and forwards to ``target``, ``host:port``."""

    def __init__(self, host: str, target: str) -> None:
        name, _, port = target.rpartition(":")
        self._target = (name, int(port))
        self._sent = bytearray()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def sent(self) -> bytes:
        """All bytes that clients sent so far."""
        with self._lock:
            return bytes(self._sent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                worker = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [client, worker]
            threading.Thread(target=self._pass_on, args=(client, worker, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(worker, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, keep: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if keep:
                    with self._lock:
                        self._sent += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return
