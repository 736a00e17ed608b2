"""A storage at the other end of a socket that serves one request at a time: `python -m benchmarks.loader.storage S`.

It prints its port, answers one byte for one byte, each after S seconds, and ends when its standard input does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time


def serve(connection: socket.socket, turn: threading.Lock, seconds: float) -> None:
    with connection:
        while connection.recv(1):
            with turn:
                time.sleep(seconds)
            try:
                connection.sendall(b"!")
            except OSError:  # a worker was stopped while it waited
                return


def accept(listener: socket.socket, seconds: float) -> None:
    turn = threading.Lock()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, turn, seconds), daemon=True).start()


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, args=(listener, float(sys.argv[1])), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads stand in accept and recv


if __name__ == "__main__":
    main()
