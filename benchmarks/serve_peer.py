"""A FastAPI server of a transformers pipeline: what benchmarks/serve.py compares with.

The queue is the one that the transformers documentation shows for web servers: whatever waits when
the pipeline is free is its next batch. With --max-batch=1 each picture is computed by itself, as in
the servers that one finds most often. Pictures are decoded in a pool of threads beside it.
"""

import argparse
import asyncio
import contextlib
import io
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from transformers import pipeline


def application(directory: str, *, max_batch: int) -> FastAPI:
    """The server of a model in Hugging Face layout."""
    classify = pipeline("image-classification", model=directory, device="cpu")
    waiting: asyncio.Queue[tuple[Image.Image, asyncio.Future]] = asyncio.Queue()

    async def compute() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < max_batch and not waiting.empty():
                batch.append(waiting.get_nowait())
            images = [image for image, _ in batch]
            answers = await asyncio.to_thread(classify, images, batch_size=len(images))
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(compute())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/")
    async def answer(request: Request) -> list[dict[str, str | float]]:
        image = await asyncio.to_thread(_decode, await request.body())
        future = asyncio.get_running_loop().create_future()
        waiting.put_nowait((image, future))
        return await future

    return app


def _decode(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")


def main() -> None:
    """Serves until it is told to end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=16)
    args = parser.parse_args()
    app = application(args.directory, max_batch=args.max_batch)
    uvicorn.run(app, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
