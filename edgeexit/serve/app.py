"""`make_app`: the web application of a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

from edgeexit import __version__
from edgeexit.errors import EdgeExitError
from edgeexit.runtime import Model
from edgeexit.serve.completions import CHATS, COMPLETIONS, text_routes
from edgeexit.serve.guard import Guard
from edgeexit.serve.jobs import Jobs
from edgeexit.serve.metrics import CONTENT_TYPE, Metrics
from edgeexit.serve.predict import PREDICT, predict_routes
from edgeexit.serve.refusals import Refusal, invalid_request, json_response, refusal_of
from edgeexit.serve.settings import Settings
from edgeexit.serve.texts import Texts

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class App:
    """The application and what a shutdown needs."""

    asgi: ASGIApp
    jobs: Jobs


def make_app(model: Model, settings: Settings) -> App:
    """The application. Create it where its event loop runs or before."""
    about = {
        "model": settings.name,
        "bundle": model.bundle.digest,
        "engine": model.describe_engine()["engine"],
        "mode": settings.generating.get("mode", "full") if model.writes else "",
        "version": __version__,
    }
    metrics = Metrics([exit_.name for exit_ in model.exits], about)
    jobs = Jobs(settings.queue, metrics.queue_seconds.observe)
    metrics.watch(jobs)
    app = FastAPI(title="edgeexit", version=__version__, docs_url=None, redoc_url=None)
    _handle_errors(app, endpoints(model))
    _common_routes(app, model, settings, jobs, metrics)
    if model.writes:
        texts = Texts(model, settings.generating, metrics)
        app.include_router(text_routes(model, texts, jobs, settings))
    else:
        app.include_router(predict_routes(model, jobs, settings, metrics))
    return App(Guard(app, settings, metrics, endpoints(model)), jobs)


def endpoints(model: Model) -> list[str]:
    """The paths that a server of this model has."""
    own = [COMPLETIONS, CHATS] if model.writes else [PREDICT]
    return ["/", "/health", "/metrics", "/openapi.json", "/v1/models", *own]


def _common_routes(
    app: FastAPI, model: Model, settings: Settings, jobs: Jobs, metrics: Metrics
) -> None:
    """What every server has."""
    page = (resources.files(__package__) / "page.html").read_bytes()
    manifest = model.bundle.manifest
    entry = {
        "id": settings.name,
        "object": "model",
        "created": 0,
        "owned_by": "edgeexit",
        "edgeexit": {
            "bundle": model.bundle.digest,
            "task": manifest.task,
            "writes": model.writes,
            "chats": model.writes and manifest.chat is not None,
            "images": manifest.image_preprocessing is not None,
            "texts": not model.writes and manifest.text_preprocessing is not None,
            "mode": settings.generating.get("mode", "full") if model.writes else None,
            "exits": [exit_.name for exit_ in model.exits],
            "capacity": model.capacity or None,
        },
    }

    @app.get("/")
    async def index() -> Response:
        """A page that uses the others."""
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are taken."""
        state = "stopping" if jobs.is_stopping else "ok"
        busy = {"running": int(jobs.running is not None), "waiting": jobs.waiting}
        return json_response({"status": state} | busy, 503 if jobs.is_stopping else 200)

    @app.get("/metrics")
    async def all_metrics() -> Response:
        """Counts for Prometheus."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/v1/models")
    async def models() -> Response:
        """The model."""
        return json_response({"object": "list", "data": [entry]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """The model, by its name."""
        if name != settings.name:
            message = f"There is no model {name[:80]!a}, only {settings.name}."
            raise Refusal(404, message, param="model", code="model_not_found")
        return json_response(entry)


def _handle_errors(app: FastAPI, paths: Sequence[str]) -> None:
    """Gives every error OpenAI's form."""

    @app.exception_handler(Refusal)
    @app.exception_handler(EdgeExitError)
    @app.exception_handler(Exception)
    async def refused(request: Request, error: Exception) -> Response:
        return refusal_of(error).response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors()).response

    @app.exception_handler(StarletteHTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path[:80]}: {error.detail}"
        if error.status_code == 404:
            what += f". This server has {', '.join(paths)}"
        headers = dict(error.headers or {})
        return Refusal(error.status_code, f"{what}.", headers=headers).response


__all__ = ["App", "endpoints", "make_app"]
