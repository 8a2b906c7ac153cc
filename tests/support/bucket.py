"""A bucket of Google Cloud Storage on this machine: gcp-storage-emulator, in a process of its own."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

_SERVER = """
import signal, sys
from gcp_storage_emulator.server import create_server
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[str]:
    """Starts a server with a bucket, which this process and those it starts then see; yields its URL.

    Args:
      folder: where the server writes its log.
    """
    for module in ("gcp_storage_emulator", "gcsfs", "etils"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    variables = {
        "STORAGE_EMULATOR_HOST": endpoint,  # gcsfs
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": endpoint,  # array_record
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # as dpn_jax.paths
    }
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", _SERVER, str(port)], stdout=log, stderr=log)
    try:
        with mock.patch.dict(os.environ, variables):
            _wait(server, port)
            yield "gs://bucket"
    finally:
        server.kill()
        server.wait()


def _wait(server: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError("the emulator does not start; see server.log")


def upload(source: Path, url: str) -> None:
    """Copies a file, or all files of a folder, to a bucket as another process would, past the caches of this one."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()] if source.is_dir() else [source]
    for file in files:
        put(f"{url}/{file.relative_to(source).as_posix()}" if source.is_dir() else url, file.read_bytes())


def put(url: str, content: bytes) -> None:
    """Writes one object of a bucket."""
    import gcsfs

    gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True).pipe_file(url, content)
