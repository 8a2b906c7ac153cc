"""`examples/serve.py` as its users run it: a process of its own, real clients on 127.0.0.1."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

ROOT = Path(__file__).parents[2]
DIGITS = sorted((ROOT / "samples" / "digits").glob("*.png"))
CLIENTS = 64
SECONDS = float(os.environ.get("DPN_JAX_LOAD_SECONDS", "5"))
"""Of load, before SIGTERM; the docs' figures are of 60."""


class Server:
    """A running service.

    Attributes:
      address: its URL.
      process: it.
    """

    def __init__(self, *words: object, model: str = "dpn_tiny.digits") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--model", model]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NO_PROXY": "127.0.0.1"}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *map(str, words)], stderr=subprocess.PIPE, text=True, env=environment
        )

    def wait(self, path: str = "/readyz", seconds: float = 120) -> None:
        """Until it answers with 200."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.address + path, trust_env=False).status_code == 200:
                    return
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.1)
        raise AssertionError(f"not {path} after {seconds} s")

    def post(self, content: bytes, **options: object) -> httpx.Response:
        """Sends one image as a body."""
        return httpx.post(f"{self.address}/classify", content=content, trust_env=False, timeout=60, **options)

    def end(self) -> str:
        """Ends it; what it said."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=90)
        return said


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    words = ("--max-bytes", 300_000, "--max-pixels", 1_000_000, "--body-timeout", 2, "--queue", 12, "--batch-size", 8)
    running = Server(*words)
    try:
        running.wait("/healthz")
        running.wait()
        yield running
        assert "Traceback" not in running.end()
    finally:
        running.process.kill()


def label(answer: dict) -> str:
    return answer["predictions"][0]["label"]


@pytest.mark.slow
def test_a_body_and_a_form(server: Server) -> None:
    found = server.post(DIGITS[7].read_bytes())
    assert found.status_code == 200 and label(found.json()["results"][0]) == "7"
    best = found.json()["results"][0]["predictions"]
    assert len(best) == 5 and best[0].keys() == {"label", "probability", "index", "synset"}
    files = [("image", (path.name, path.read_bytes())) for path in DIGITS] + [("image", ("note.txt", b"no image"))]
    found = httpx.post(f"{server.address}/classify", files=files, trust_env=False, timeout=60)
    *good, bad = found.json()["results"]
    assert found.status_code == 200 and [row["name"] for row in good] == [path.name for path in DIGITS]
    assert [label(row) for row in good] == list("0123456789")
    assert bad.keys() == {"name", "error"} and "not an image" in bad["error"]


@pytest.mark.slow
def test_a_map_lies_over_the_photo(server: Server) -> None:
    photo = Image.open(DIGITS[3]).convert("RGB").resize((90, 60))
    photo.save(content := io.BytesIO(), "PNG")
    found = server.post(content.getvalue(), params={"explain": "1"}).json()["results"][0]
    kind, _, data = found["map"].partition(";base64,")
    assert kind == "data:image/jpeg" and Image.open(io.BytesIO(base64.b64decode(data))).size == (90, 60)


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"no image", 400, "not an image"),
        (b"", 400, "empty"),
        (b"x" * 300_001, 413, "the body is larger than 300000 bytes"),
        (bomb(1100, 1000), 400, "1100 x 1000 pixels are too many"),
        (bomb(40_000, 40_000), 400, "decompression bomb"),
        (DIGITS[0].read_bytes()[:60], 400, "image"),
    ],
    ids=["text", "nothing", "too long", "too many pixels", "bomb", "truncated"],
)
def test_what_is_no_image_is_answered_in_json(server: Server, content: bytes, status: int, message: str) -> None:
    found = server.post(content)
    assert found.status_code == status and message in found.json()["error"]
    assert label(server.post(DIGITS[1].read_bytes()).json()["results"][0]) == "1"


@pytest.mark.slow
def test_other_requests_are_answered_in_json_or_not_at_all(server: Server) -> None:
    found = httpx.post(f"{server.address}/classify", files=[("x", ("", b""))], trust_env=False)
    assert found.status_code == 400 and found.json()["error"]
    assert httpx.get(f"{server.address}/classify", trust_env=False).json()["error"] == "Method Not Allowed"
    assert httpx.get(f"{server.address}/nowhere", trust_env=False).json()["error"] == "Not Found"
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(head + b"x")
        slow.settimeout(30)
        assert b"408" in slow.recv(1000).splitlines()[0]
    for _ in range(20):  # clients that leave
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(head + b"x")
    assert label(server.post(DIGITS[2].read_bytes()).json()["results"][0]) == "2"
    assert b"dpn_request_seconds_count" in httpx.get(f"{server.address}/metrics", trust_env=False).content


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back(server: Server) -> None:
    files = [("image", (path.name, path.read_bytes())) for path in (*DIGITS, *DIGITS)]
    found = httpx.post(f"{server.address}/classify", files=files, trust_env=False, timeout=60)
    assert (found.status_code, found.headers["Retry-After"]) == (503, "1")
    assert found.json()["error"] == "the queue is full"


async def load(address: str, seconds: float) -> list[tuple[float, str, str]]:
    """What many clients at once get: seconds, the digit that was sent, and the answer."""
    answers = []
    async with httpx.AsyncClient(
        trust_env=False, timeout=60, limits=httpx.Limits(max_connections=CLIENTS), http2=False
    ) as client:

        async def one(number: int) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                number += 1
                path = DIGITS[number % 10]
                start = time.monotonic()
                try:
                    found = await client.post(f"{address}/classify", content=path.read_bytes())
                except httpx.TransportError:  # not accepted: the service is ending
                    return
                answer = label(found.json()["results"][0]) if found.status_code == 200 else str(found.status_code)
                answers.append((time.monotonic() - start, path.stem, answer))

        await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    return answers


@pytest.mark.slow
def test_many_clients_get_their_own_answers_until_the_end() -> None:
    """And SIGTERM in the middle loses none that was accepted."""
    running = Server("--batch-size", 16)
    try:
        running.wait()

        async def both() -> list[tuple[float, str, str]]:
            loading = asyncio.create_task(load(running.address, SECONDS + 3))
            await asyncio.sleep(SECONDS)
            running.process.send_signal(signal.SIGTERM)
            return await loading

        answers = asyncio.run(both())
        said = running.process.communicate(timeout=90)[1]
        assert running.process.returncode in (0, -signal.SIGTERM) and "Traceback" not in said
        assert said.strip() == f"answered {len(answers)} of {len(answers)} requests"
    finally:
        running.process.kill()
    assert len(answers) > CLIENTS
    assert [answer for _, _, answer in answers] == [sent for _, sent, _ in answers]
    seconds = sorted(seconds for seconds, _, _ in answers)
    quantiles = {name: round(seconds[int(share * len(seconds))], 3) for name, share in (("p50", 0.5), ("p99", 0.99))}
    print(json.dumps({"clients": CLIENTS, "answered": len(seconds), **quantiles}))
