"""The web page of a studio and its JSON. Imported only once the extra ``serve`` is there."""

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from typing import Annotated, Any, Literal

import anyio
import anyio.from_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from moe_kernels.programs.shared.options import LARGEST_SEED
from moe_kernels.programs.shared.serving import limits
from moe_kernels.programs.shared.serving.studio import Busy, HasLeft, Left, Refused, Studio

PAGE = resources.files(__package__).joinpath("page.html")
# The page has all that it needs, and the browser loads nothing from elsewhere.
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_NOT_BLANK = r"\S"


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Drawing(_Asked):
    """Body of /api/draw."""

    caption: Annotated[str, Field(max_length=limits.MAX_CAPTION, pattern=_NOT_BLANK)]
    count: Annotated[int, Field(ge=1, le=limits.MAX_PICTURES)] = 4
    guidance: Annotated[float, Field(ge=0, le=limits.MAX_GUIDANCE, allow_inf_nan=False)] = 3.0
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    adapter: str | None = None


class Message(_Asked):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[str, Field(max_length=limits.MAX_MESSAGE)]


class Chatting(_Asked):
    """Body of /api/chat; the last message is the user's."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    adapter: str | None = None


def make_app(studio: Studio, hosts: Sequence[str]) -> FastAPI:
    """Return the app. Each request is computed in a thread of its own.

    Args:
        hosts: names by which it may be asked, ["*"] for any. A page of somebody else's, whose name
            was made to mean this machine, asks by that name.
    """
    app = FastAPI(title="moe-kernels draw", docs_url=None, redoc_url=None)  # theirs are of a CDN
    app.add_middleware(SmallBodies)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts])
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Refused, lambda _, error: _problem(422, str(error)))
    app.add_exception_handler(Busy, lambda _, error: _problem(503, str(error)))
    app.add_exception_handler(Left, lambda _, error: _problem(503, str(error)))  # for nobody
    app.add_exception_handler(Exception, _on_failure)
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/")
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS)

    @app.get("/api/info")
    def info() -> dict[str, Any]:
        return studio.info()

    @app.post("/api/draw")
    def draw(asked: Drawing, request: Request) -> dict[str, Any]:
        pictures = studio.draw(
            asked.caption, asked.count, asked.guidance, asked.seed, asked.adapter,
            _has_left(request),
        )  # fmt: skip
        return {"pictures": [_data_url(picture) for picture in pictures]}

    @app.post("/api/chat")
    def chat(asked: Chatting, request: Request) -> dict[str, Any]:
        messages = [message.model_dump() for message in asked.messages]
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise Refused("There is nothing to answer: the last message must be the user's text.")
        return studio.chat(messages, asked.adapter, _has_left(request))

    return app


class SmallBodies:
    """Middleware that refuses a request whose body is large, or of unknown size, before reading."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            size = dict(scope["headers"]).get(b"content-length", b"")
            if not size.isdigit() or int(size) > limits.MAX_BODY:
                await _read_on(receive)
                problem = f"A request must say its length, at most {limits.MAX_BODY:,} bytes."
                await _problem(413, problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _read_on(receive: Callable) -> None:
    """Read what is still coming, within bounds: who is answered while sending sees no answer."""
    left = limits.MAX_BODY
    with anyio.move_on_after(0.5):
        while left > 0:
            message = await receive()
            if not message.get("more_body"):
                return
            left -= len(message["body"])


def _has_left(request: Request) -> HasLeft:
    """Return a function of the request's thread that asks the server's loop for its client."""
    return partial(anyio.from_thread.run, request.is_disconnected)


def _problem(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)


def _on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say in a sentence which field is wrong."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the request"
    if first["type"] == "string_pattern_mismatch":  # no reader wants to see the pattern
        return _problem(422, f"{place}: there is no text.")
    return _problem(422, f"{place}: {first['msg']}.")


def _on_failure(_: Request, error: Exception) -> JSONResponse:
    """Say that it is the server's fault; its terminal gets the traceback from uvicorn."""
    return _problem(500, f"The server failed ({type(error).__name__}); its terminal says why.")


def _data_url(picture: Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
