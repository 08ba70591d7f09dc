"""An HTTP server of files on the loopback interface, with ranges and faults."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """Serves the files of a folder; a context manager.

    Args:
        folder: the files.
        port: 0 for a free one.

    Attributes:
        requests: number of requests of whole files by name.
        sent: bytes sent by name.
        fault: called with the handler, the name and the bytes that are due; returns True if it
            answered in place of the server.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.fault: Callable[[BaseHTTPRequestHandler, str, bytes], bool] = lambda *_: False
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # which delays each body by 40 ms

            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                path = folder / name
                server.headers.append(dict(self.headers))
                if not path.is_file():
                    self.send_error(404)
                    return
                content, size = path.read_bytes(), path.stat().st_size
                wanted = re.fullmatch(r"bytes=(\d*)-", self.headers.get("Range") or "")
                tail = re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range") or "")
                start = int(wanted[1]) if wanted else max(0, size - int(tail[1])) if tail else 0
                server.requests[name] += not tail
                due = content[start:]
                if not tail and server.fault(self, name, due):
                    self.close_connection = True
                    return
                self.send_response(206 if wanted or tail else 200)
                self.send_header("Content-Length", str(len(due)))
                if wanted or tail:
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.end_headers()
                self.wfile.write(due)
                server.sent[name] += len(due)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients that give up

        self._server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "ShardServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def refuse(status: int, times: int) -> Callable[..., bool]:
    """Fault: a status, a number of times."""
    left = [times]

    def fault(handler: BaseHTTPRequestHandler, name: str, due: bytes) -> bool:
        left[0] -= 1
        if left[0] < 0:
            return False
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return fault


def break_off(times: int) -> Callable[..., bool]:
    """Fault: the connection ends after half of the bytes, a number of times."""
    left = [times]

    def fault(handler: BaseHTTPRequestHandler, name: str, due: bytes) -> bool:
        left[0] -= 1
        if left[0] < 0:
            return False
        is_partial = "Range" in handler.headers
        handler.send_response(206 if is_partial else 200)
        handler.send_header("Content-Length", str(len(due)))
        handler.end_headers()
        handler.wfile.write(due[: len(due) // 2])
        return True

    return fault


def stall(seconds: float) -> Callable[..., bool]:
    """Fault: no byte after the header."""

    def fault(handler: BaseHTTPRequestHandler, name: str, due: bytes) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(due)))
        handler.end_headers()
        time.sleep(seconds)
        return True

    return fault
