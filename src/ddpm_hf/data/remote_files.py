"""Files by path or URL: ranges of a file, and downloads that retry, resume and never hang."""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, httpx  # type: ignore[attr-defined]

from ddpm_hf.data.errors import DataError

T = TypeVar("T")

TIMEOUT_S = 30.0
"""Seconds without a byte after which a request counts as stalled."""
MIN_BYTES_PER_S = 1000
"""Lower speeds, averaged over at least `TIMEOUT_S`, also count as stalled."""
WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Waits before the retries of a failed request."""
NUM_CONNECTIONS = 8
"""Number of files to read at a time."""
_CHUNK = 2**16  # bytes that a broken transfer loses at most
_END_BYTES = 2**16  # the last bytes of a parquet file, which pyarrow reads first


class BrokenTransfer(OSError):
    """A transfer that is too slow, ended early, or has the wrong size."""


def is_url(location: str) -> bool:
    """Whether a location is a URL instead of a local path."""
    return "://" in location


def read_end(location: str, num_bytes: int) -> tuple[bytes, int]:
    """The last bytes of a file, and its size.

    Args:
        location: path or URL; a server without ranges sends the whole file.
        num_bytes: number of bytes; a shorter file is returned whole.
    Raises:
        DataError: if the file cannot be read.
    """
    if is_url(location):
        return _retry(location, lambda: _request_end(location, num_bytes))
    try:
        size = os.path.getsize(location)
        with open(location, "rb") as file:
            file.seek(max(0, size - num_bytes))
            return file.read(num_bytes), size
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from error


def modification_time(location: str) -> int:
    """Modification time of a local file in ns; 0 for a URL."""
    return 0 if is_url(location) else os.stat(location).st_mtime_ns


def download(url: str, path: Path, size: int) -> None:
    """Download a file; a broken transfer continues where it ended.

    Args:
        url: where the file is.
        path: where it is written.
        size: its expected size in bytes.
    Raises:
        DataError: names the file, after several attempts or for a permanent error.
    """
    path.touch()
    _retry(url, lambda: _append(url, path, size))


def read_through(url: str, function: Callable[[Any], T]) -> T:
    """Result of `function` for a file that is read once, from its start, without storing it.

    Args:
        url: where the file is.
        function: takes an object with `read(size)`; called again if the transfer breaks.
    Raises:
        DataError: names the file, after several attempts or for a permanent error.
    """

    def action() -> T:
        with _response(url, {}) as response:
            return function(_Reader(_chunks(response)))

    return _retry(url, action)


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read in ranges: one request for the end, and one for each other range.

    Args:
        url: where the file is.
    Raises:
        DataError: names the file, after several attempts or for a permanent error.
    """

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._end, self.size = read_end(url, _END_BYTES)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the offset of the next byte."""
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer at the end."""
        start = self._position
        stop = self.size if size < 0 else min(start + size, self.size)
        kept_from = self.size - len(self._end)
        self._position = max(start, stop)
        if start >= kept_from:
            return self._end[start - kept_from : stop - kept_from]
        return _retry(self._url, lambda: _request_range(self._url, start, stop))


class _Reader:
    """`read(size)` on a sequence of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        parts, missing = [self._rest], size - len(self._rest)
        while missing > 0 and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            missing -= len(chunk)
        content = b"".join(parts)
        self._rest = content[size:]
        return content[:size]


def _append(url: str, path: Path, size: int) -> None:
    """Append the missing bytes of a file."""
    done = path.stat().st_size
    if done == size:
        return
    missing = {"Range": f"bytes={done}-"} if done else {}
    with _response(url, missing) as response, path.open("ab") as file:
        if response.status_code != 206:  # the server ignores ranges
            file.truncate(0)
        for chunk in _chunks(response):
            file.write(chunk)
            if file.tell() > size:
                break
    if (done := path.stat().st_size) != size:
        if done > size:
            path.write_bytes(b"")
        raise BrokenTransfer(f"{done:,} of {size:,} bytes")


def _request_end(url: str, num_bytes: int) -> tuple[bytes, int]:
    with _response(url, {"Range": f"bytes=-{num_bytes}"}) as response:
        end, received = b"", 0
        for chunk in _chunks(response):
            end, received = (end + chunk)[-num_bytes:], received + len(chunk)
        total = response.headers.get("content-range", "").rpartition("/")[2]
        return end, int(total) if total.isdigit() else received


def _request_range(url: str, start: int, stop: int) -> bytes:
    with _response(url, {"Range": f"bytes={start}-{stop - 1}"}) as response:
        if response.status_code != 206:
            raise DataError(f"{url} is on a server that sends no ranges of a file")
        content = b"".join(_chunks(response))
    if len(content) != stop - start:
        raise BrokenTransfer(f"{len(content):,} of {stop - start:,} bytes")
    return content


@contextmanager
def _response(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """A streamed response without an error status; the token goes to the Hub only."""
    is_hub = urlsplit(url)[:2] == urlsplit(constants.ENDPOINT)[:2]  # scheme and host
    headers = {"Accept-Encoding": "identity", **(build_hf_headers() if is_hub else {}), **headers}
    request = {"headers": headers, "timeout": TIMEOUT_S, "follow_redirects": True}
    with _client(os.getpid()).stream("GET", url, **request) as response:
        response.raise_for_status()
        yield response


@lru_cache(maxsize=1)
def _client(pid: int) -> Any:
    """The client of a process: its connections do not survive a fork."""
    return httpx.Client()


def _chunks(response: Any) -> Iterator[bytes]:
    start, received = time.monotonic(), 0
    for chunk in response.iter_raw(_CHUNK):
        received += len(chunk)
        elapsed = time.monotonic() - start
        if elapsed > TIMEOUT_S and received < MIN_BYTES_PER_S * elapsed:
            raise BrokenTransfer(f"only {received:,} bytes in {elapsed:.0f} s")
        yield chunk


def _retry(url: str, action: Callable[[], T]) -> T:
    """Result of `action`, repeated after temporary errors."""
    waits = list(WAITS_S)
    while True:
        try:
            return action()
        except (httpx.HTTPError, BrokenTransfer) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"status {status}" if status else str(error) or type(error).__name__
            is_permanent = status is not None and status < 500 and status not in (408, 429)
            if is_permanent or not waits:
                attempts = 1 if is_permanent else len(WAITS_S) + 1
                raise DataError(f"{url} failed after {attempts} attempts: {reason}") from error
            time.sleep(waits.pop(0))
