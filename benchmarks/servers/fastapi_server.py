"""FastAPI: the body is read in the event loop, and one thread classifies, so that /ping answers meanwhile.

uvicorn fastapi_server:app --workers 2
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from classifier import Classifier
from fastapi import FastAPI, Request

app = FastAPI()
classifier = Classifier()
thread = ThreadPoolExecutor(1)


@app.get("/ping")
async def ping() -> dict[str, str]:
    return {}


@app.post("/invocations")
async def invocations(request: Request) -> dict[str, Any]:
    return await asyncio.get_running_loop().run_in_executor(thread, classifier.answer, await request.body())


# The annotations are text, and FastAPI reads them.
invocations.__annotations__["request"] = Request
