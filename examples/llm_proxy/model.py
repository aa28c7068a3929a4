"""A model server that only pretends: it streams tokens, and says in the end how many they were.

uvicorn model:app --port 9000
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

TOKENS_OF_A_CHUNK = 20
SECONDS_BETWEEN_CHUNKS = 0.02

app = FastAPI()


@app.post("/completions")
async def complete(max_tokens: int) -> StreamingResponse:
    """Stream an answer of some length, as lines of JSON that end with the usage."""
    return StreamingResponse(chunks(random.randint(1, max_tokens)), media_type="application/jsonl")


async def chunks(tokens: int) -> AsyncIterator[str]:
    for begin in range(0, tokens, TOKENS_OF_A_CHUNK):
        await asyncio.sleep(SECONDS_BETWEEN_CHUNKS)
        yield json.dumps({"tokens": min(TOKENS_OF_A_CHUNK, tokens - begin)}) + "\n"
    yield json.dumps({"usage": tokens}) + "\n"
