"""The HTTP part: OpenAI's completions and chat completions, the list of edits, and the web page."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlas.core.errors import ActlasError, InputError
from actlas.serve.engine import Engine, Event, Ticket
from actlas.serve.jobs import Job, read_job

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from actlas.core.edit import Edit
    from actlas.core.model import Model

PAGE = Path(__file__).parent / "page.html"
_MOST_BYTES = 4_000_000


def make_app(
    model: Model,
    edits: Mapping[str, Edit],
    *,
    default: Sequence[str] = (),
    max_tokens: int = 2048,
    max_batch: int = 8,
) -> FastAPI:
    """Return the web application.

    Args:
        model: what is served.
        edits: what requests may ask for, by name.
        default: edits of requests that name none, e.g. `["happy*1"]`.
        max_tokens: the most new tokens that a request may ask for.
        max_batch: the most requests that are generated together.

    Raises:
        InputError: FastAPI is not installed, or a default that is not among the edits.
        ModelError: the model does not generate text.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    except ImportError as error:
        raise InputError(
            "serving needs FastAPI and uvicorn; install them: pip install 'actlas[serve]'"
        ) from error
    from actlas.serve.jobs import read_edits

    read_edits(list(default), edits)
    engine = Engine(model, max_batch=max_batch)
    limit = min(max_tokens, (model.context_length or max_tokens))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title=f"Actlas: {model.name}", lifespan=life, docs_url=None, redoc_url=None)
    app.state.engine = engine

    def failed(error: Exception) -> JSONResponse:
        wrong = getattr(error, "exit_status", 1) == 2
        kind = "invalid_request_error" if wrong else "server_error"
        return JSONResponse({"error": {"message": str(error), "type": kind}}, 400 if wrong else 503)

    async def run(request: Request, chat: bool) -> Any:
        try:
            body = await _json(request)
            job = read_job(body, edits, default, chat=chat, model=model.name, most_tokens=limit)
            events: asyncio.Queue[Event] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def emit(event: Event) -> None:
                loop.call_soon_threadsafe(events.put_nowait, event)

            ticket = await asyncio.to_thread(engine.submit, job, emit)
        except ActlasError as error:
            return failed(error)
        reply = _Reply(job, chat, model.name)
        if job.stream:
            return StreamingResponse(reply.stream(events, ticket), media_type="text/event-stream")
        try:
            return await reply.whole(events, ticket)
        except ActlasError as error:
            return failed(error)

    async def chat_completions(request: Request) -> Any:
        return await run(request, True)

    async def completions(request: Request) -> Any:
        return await run(request, False)

    def models() -> dict[str, Any]:
        names = [model.name, *(f"{model.name}+{name}" for name in edits)]
        return {"object": "list", "data": [{"id": n, "object": "model", "owned_by": "actlas"} for n in names]}

    def listed() -> dict[str, Any]:
        return {
            "model": model.name,
            "chat": bool(getattr(model.tokenizer, "chat_template", None)),
            "default": list(default),
            "max_tokens": limit,
            "edits": [
                {
                    "name": name,
                    "about": edit.describe(),
                    "measurements": [m.to_json() for m in edit.measurements],
                }
                for name, edit in edits.items()
            ],
        }

    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    for annotated in (chat_completions, completions):
        annotated.__annotations__["request"] = Request  # FastAPI reads it; the name is imported in here
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/edits", listed, methods=["GET"])
    app.add_api_route("/health", lambda: {"status": "ok"}, methods=["GET"])
    app.add_api_route("/", page, methods=["GET"], response_class=HTMLResponse)
    return app


async def _json(request: Request) -> Any:
    size, parts = 0, []
    async for part in request.stream():
        size += len(part)
        if size > _MOST_BYTES:
            raise InputError(f"the body is larger than {_MOST_BYTES:,} bytes; send a shorter prompt")
        parts.append(part)
    try:
        return json.loads(b"".join(parts))
    except ValueError as error:
        raise InputError(f"the body is not valid JSON ({error})") from error


class _Reply:
    """Puts a request's events into OpenAI's forms."""

    def __init__(self, job: Job, chat: bool, model: str) -> None:
        self.job, self.chat = job, chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": "+".join([model, *job.names]),
        }

    async def whole(self, events: asyncio.Queue[Event], ticket: Ticket) -> dict[str, Any]:
        """Wait for the end and return one reply."""
        text = ""
        try:
            while True:
                event = await events.get()
                text += event.text
                if event.error is not None:
                    raise event.error
                if event.last:
                    break
        except BaseException:
            ticket.cancel()
            raise
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        usage = {
            "prompt_tokens": len(self.job.ids),
            "completion_tokens": event.tokens,
            "total_tokens": len(self.job.ids) + event.tokens,
        }
        return {
            **self._head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [{"index": 0, "finish_reason": event.reason, **content}],
            "usage": usage,
            "edits": self.job.names,
            "seed": self.job.seed,
        }

    async def stream(self, events: asyncio.Queue[Event], ticket: Ticket) -> AsyncIterator[str]:
        """Yield server-sent events until the end; stop the work if the client goes."""
        try:
            if self.chat:
                yield self._chunk({"role": "assistant", "content": ""}, None)
            while True:
                event = await events.get()
                if event.error is not None:
                    yield f"data: {json.dumps({'error': {'message': str(event.error)}})}\n\n"
                    break
                if event.text:
                    yield self._chunk({"content": event.text}, None)
                if event.last:
                    yield self._chunk({}, event.reason)
                    break
            yield "data: [DONE]\n\n"
        finally:
            ticket.cancel()

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": 0, "finish_reason": reason, **content}
        return f"data: {json.dumps({**self._head, 'object': kind, 'choices': [choice]})}\n\n"
