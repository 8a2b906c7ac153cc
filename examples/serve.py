"""A service that classifies photos, to start from: `python examples/serve.py --model dpn_mini.cifar10`.

`/` is a page to drop a photo on. `POST /classify` takes an image as its body, or several as a form
(`-F image=@cat.jpg`), and answers in JSON; `?explain=1` adds a Grad-CAM of each. Images of different requests share
batches. `/healthz` says that the process lives, `/readyz` that everything is compiled, `/metrics` what it does, for
Prometheus. SIGTERM ends it when all that was accepted is answered. Needs "dpn-jax[serve]".
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

try:
    import uvicorn
    from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    sys.exit(f'serve needs {error.name}: pip install "dpn-jax[serve]"')

import dpn_jax
from dpn_jax import ImageError, explain
from dpn_jax.inference.prediction import most_probable

REQUESTS = Counter("dpn_requests_total", "Requests to /classify, by status", ["status"])
SECONDS = Histogram("dpn_request_seconds", "From a request's arrival to its answer")
ROWS = Histogram("dpn_batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
WAITING = Gauge("dpn_waiting_images", "Images that are accepted and not answered")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Serve a model over HTTP."""

    model: str = "dpn_mini.cifar10"
    """A pretrained tag, hub id, file or folder."""
    host: str = "127.0.0.1"
    port: int = 8000
    batch_size: int = 16
    deadline: float = 0.005
    """Seconds that the first image of a batch waits for others."""
    queue: int = 256
    """Images that may wait; further ones get 503 and a Retry-After."""
    max_bytes: int = 20_000_000
    """Bytes of the largest body."""
    max_pixels: int = 50_000_000
    """Pixels of the largest image."""
    body_timeout: float = 20.0
    """Seconds in which a body must have come."""
    top_k: int = 5


class Batcher:
    """Runs images of many requests together: a batch starts when it is full, or its first image has waited enough.

    Args:
      classifier: the model; only one thread uses it.
      options: `batch_size`, `deadline` and `queue`.
    """

    def __init__(self, classifier: dpn_jax.Classifier, options: Options) -> None:
        self.classifier, self.options = classifier, options
        self.device = concurrent.futures.ThreadPoolExecutor(1)
        self.host = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self.arrived: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        self.waiting, self.ready = 0, False

    def compile(self) -> None:
        """Compiles every size of a batch."""
        crop, most = self.classifier.transform.crop(Image.new("RGB", (64, 64))), self.options.batch_size
        for size in sorted({min(2**power, most) for power in range(most.bit_length() + 1)}):
            self.classifier.logits(np.stack([crop] * size))
        self.ready = True

    @contextlib.contextmanager
    def admitted(self, images: int) -> Iterator[None]:
        """Counts images of a request while it is answered; 503 if there is no room for them."""
        if self.waiting + images > self.options.queue:
            raise HTTPException(503, "the queue is full", headers={"Retry-After": "1"})
        self.waiting += images
        WAITING.set(self.waiting)
        try:
            yield
        finally:
            self.waiting -= images
            WAITING.set(self.waiting)

    async def logits(self, crop: np.ndarray) -> np.ndarray:
        """The logits of one prepared image, float32 [K]."""
        self.arrived.put_nowait((crop, answer := asyncio.get_running_loop().create_future()))
        return await answer

    async def run(self) -> None:
        """Forms batches and runs them, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.arrived.get()]
            end = loop.time() + self.options.deadline
            while len(batch) < self.options.batch_size:
                try:
                    batch.append(await asyncio.wait_for(self.arrived.get(), max(end - loop.time(), 0)))
                except TimeoutError:
                    break
            ROWS.observe(len(batch))
            crops = np.stack([crop for crop, _ in batch])
            try:
                rows = await loop.run_in_executor(self.device, self.classifier.logits, crops)
            except Exception as error:  # each request answers with it
                rows = [error] * len(batch)
            for (_, answer), row in zip(batch, rows, strict=True):
                if not answer.cancelled():  # as when the client left
                    (answer.set_exception if isinstance(row, Exception) else answer.set_result)(row)


class Service:
    """The routes; `app` is what uvicorn runs."""

    def __init__(self, options: Options) -> None:
        self.options, self.accepted, self.answered = options, 0, 0
        self.model = dpn_jax.from_pretrained(options.model)
        classifier = dpn_jax.Classifier(self.model, batch_size=options.batch_size)
        self.batcher = Batcher(classifier, options)
        self.top_k = min(options.top_k, len(classifier.labels))
        routes = [
            Route("/", lambda request: FileResponse(Path(__file__).with_name("serve.html"))),
            Route("/classify", self.classify, methods=["POST"]),
            Route("/healthz", lambda request: JSONResponse({"status": "alive"})),
            Route("/readyz", self.readyz),
            Route("/metrics", lambda request: Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)),
        ]
        handlers = {HTTPException: self.refused, Exception: self.refused}
        self.app = Starlette(routes=routes, lifespan=self.lifespan, exception_handlers=handlers)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Compiles while the server already answers that it is not ready; uvicorn has answered all when this ends."""
        compiling = asyncio.get_running_loop().run_in_executor(self.batcher.device, self.batcher.compile)
        running = asyncio.create_task(self.batcher.run())
        yield
        running.cancel()
        print(f"answered {self.answered} of {self.accepted} requests", file=sys.stderr)
        await asyncio.wait([compiling])

    async def readyz(self, request: Request) -> Response:
        """Whether a request would be answered at once."""
        ready = self.batcher.ready
        return JSONResponse({"status": "ready" if ready else "compiling"}, 200 if ready else 503)

    async def classify(self, request: Request) -> Response:
        """The labels of each image, in the order they came."""
        start = time.perf_counter()
        self.accepted += 1
        names, bodies = await self.images(request)
        wants_map = request.query_params.get("explain") in ("1", "true")
        with self.batcher.admitted(len(bodies)):
            results = await asyncio.gather(*(self.one(body, wants_map) for body in bodies))
        SECONDS.observe(time.perf_counter() - start)
        self.answered += 1
        status = 400 if all("error" in row for row in results) else 200
        REQUESTS.labels(str(status)).inc()
        rows = [{"name": name} | row for name, row in zip(names, results, strict=True)]
        return JSONResponse({"results": rows} | ({"error": rows[0]["error"]} if status == 400 else {}), status)

    async def images(self, request: Request) -> tuple[list[str], list[bytes]]:
        """Names and bytes of a request's images; the whole body is read within limits of size and time."""
        most, parts, size = self.options.max_bytes, [], 0
        try:
            async with asyncio.timeout(self.options.body_timeout):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise HTTPException(413, f"the body is larger than {most} bytes")
                    parts.append(part)
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left") from None
        request._body = b"".join(parts)  # where Starlette's form() looks for it
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return ["image"], [request._body]
        async with request.form(max_part_size=most) as form:
            files = [file for _, file in form.multi_items() if not isinstance(file, str)]
            if not files:
                raise HTTPException(400, "the form has no file")
            return [file.filename or "image" for file in files], [await file.read() for file in files]

    async def one(self, body: bytes, wants_map: bool) -> dict[str, Any]:
        loop, classifier = asyncio.get_running_loop(), self.batcher.classifier
        try:
            crop = await loop.run_in_executor(self.batcher.host, self.crop, body)
        except ImageError as error:
            return {"error": str(error)}
        best = most_probable(await self.batcher.logits(crop), self.top_k, classifier.labels, classifier.synsets)
        found = {"predictions": [prediction._asdict() for prediction in best]}
        if wants_map:
            found["map"] = await loop.run_in_executor(self.batcher.device, self.map, body, crop, best[0].index)
        return found

    def crop(self, body: bytes) -> np.ndarray:
        """uint8 [H, W, C]; an image with too many pixels is refused before it is decoded."""
        width = height = 0
        with contextlib.suppress(Exception), Image.open(io.BytesIO(body)) as image:  # else crop says what is wrong
            width, height = image.size
        if width * height > self.options.max_pixels:
            raise ImageError(f"image: {width} x {height} pixels are too many")
        return self.batcher.classifier.transform.crop(body)

    def map(self, body: bytes, crop: np.ndarray, index: int) -> str:
        """A Grad-CAM over the image, as a data URL."""
        transform = self.batcher.classifier.transform
        # the last stage whose map is fine enough to show a place
        fine = [info.index for info in self.model.feature_info[1:] if len(crop) >= 4 * info.reduction]
        images, stage = transform.normalize(crop[None]), max(fine, default=1)
        values = explain.grad_cam(self.model, images, index=stage, classes=[index])
        picture = explain.overlay(Image.open(io.BytesIO(body)), np.asarray(values)[0], transform=transform)
        picture.thumbnail((800, 800))
        picture.save(file := io.BytesIO(), "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    async def refused(self, request: Request, error: Exception) -> Response:
        """What cannot be answered; or a fault of the service, whose traceback goes to stderr."""
        known = error if isinstance(error, HTTPException) else HTTPException(500, type(error).__name__)
        REQUESTS.labels(str(known.status_code)).inc()
        return JSONResponse({"error": known.detail}, known.status_code, headers=known.headers)


def main(options: Options) -> None:  # until SIGINT or SIGTERM
    uvicorn.run(
        Service(options).app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=60
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
