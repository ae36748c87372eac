"""``POST /v1/predict``: models that answer in one pass.

The body is an image file, or JSON with ``image``, ``text``, ``texts`` or ``inputs``. Every row has
the exit that answered it and that exit's score.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeexit.bundle.manifest import Tensor
from edgeexit.bundle.reader import Bundle
from edgeexit.errors import InputError
from edgeexit.preprocessing.images import decode_image, preprocess_images
from edgeexit.runtime import Model, Result
from edgeexit.runtime.text.tokenizer import encode_batch
from edgeexit.serve.completions import check_model
from edgeexit.serve.jobs import Job, Jobs
from edgeexit.serve.metrics import Metrics
from edgeexit.serve.refusals import BAD, Refusal, invalid_request, json_response
from edgeexit.serve.settings import Settings
from edgeexit.serve.texts import LIMIT_PIXELS
from edgeexit.serve.waiting import next_event

PREDICT = "/v1/predict"
MOST_ROWS = 256
"""Rows of a request: states of all rows are in memory at once."""


class Predict(BaseModel):
    """A request. Exactly one of `image`, `text`, `texts` and `inputs` is given."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    image: str | None = None
    text: str | None = None
    texts: Annotated[list[str], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    inputs: dict[str, Any] | None = None
    outputs: bool = False
    deadline_s: Annotated[float, Field(gt=0)] | None = None


def predict_routes(model: Model, jobs: Jobs, settings: Settings, metrics: Metrics) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post(PREDICT)
    async def predict(request: Request) -> Response:
        """Answers rows."""
        body = await request.body()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        asked, image = (Predict(), body) if kind.startswith("image/") else (_read(body, kind), None)
        check_model(asked.model, settings.name)
        answer = functools.partial(_answer, model, asked, image, metrics)
        seconds = min(settings.deadline_s, asked.deadline_s or settings.deadline_s)
        job = Job(answer, seconds)
        jobs.start(job)
        done = await next_event(request, jobs, job)
        return json_response({"model": settings.name} | done.value)

    return router


def _read(body: bytes, kind: str) -> Predict:
    """A request in JSON."""
    if kind != "application/json":
        raise Refusal(
            415,
            f"The body is {kind[:80]!a}. Send application/json, or an image file as image/png or "
            "the like (Content-Type).",
        )
    try:
        asked = Predict.model_validate(msgspec.json.decode(body))
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refusal(BAD, f"The body is not JSON ({error}).") from error
    except ValidationError as error:
        raise invalid_request(error.errors()) from error
    names = ("image", "text", "texts", "inputs")
    given = [name for name in names if getattr(asked, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise Refusal(BAD, f"Give exactly one of {', '.join(names)}; found {found}.")
    return asked


def _answer(
    model: Model, asked: Predict, image: bytes | None, metrics: Metrics, job: Job
) -> dict[str, Any]:
    """The answer. Runs on the model's thread."""
    inputs = _inputs(model.bundle, asked, image)
    rows = max((len(value) for value in inputs.values() if value.ndim), default=0)
    if rows > MOST_ROWS:
        raise InputError(f"{rows} rows in one request", fix=f"Send {MOST_ROWS} at most.")
    result = model(inputs)
    metrics.count_exits(Counter(result.exit_names))
    with_outputs = asked.outputs or "logits" not in result.outputs
    found = [_row(model.bundle, result, row, with_outputs) for row in range(len(result.exits))]
    return {"score": model.decisions[-1].score, "rows": found}


def _row(bundle: Bundle, result: Result, row: int, with_outputs: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"exit": result.exit_names[row], "score": float(result.scores[row])}
    if result.earlier:
        about["earlier"] = {chain: exits[row] for chain, exits in result.earlier.items()}
    logits, labels = result.outputs.get("logits"), bundle.manifest.labels
    if logits is not None and logits.ndim == 2:
        about["class"] = number = int(logits[row].argmax())
        about["label"] = labels[number] if number < len(labels) else str(number)
    if with_outputs:
        about["outputs"] = {name: value[row].tolist() for name, value in result.outputs.items()}
    return about


def _inputs(bundle: Bundle, asked: Predict, image: bytes | None) -> Mapping[str, NDArray[Any]]:
    if asked.inputs is not None:
        tensors = {tensor.name: tensor for tensor in bundle.manifest.inputs}
        return {name: _array(tensors, name, value) for name, value in asked.inputs.items()}
    if image is None and asked.image is not None:
        image = _decoded(asked.image)
    if image is not None:
        preprocessing = bundle.manifest.image_preprocessing
        if preprocessing is None:
            raise InputError(
                "the model has no image preprocessing", fix="Send text, texts or inputs instead."
            )
        opened = decode_image(image, "image", limit_pixels=LIMIT_PIXELS)
        return {preprocessing.input: preprocess_images(preprocessing, [opened])}
    texts = asked.texts if asked.texts is not None else [asked.text or ""]
    return encode_batch(bundle, texts, tell=True)


def _decoded(image: str) -> bytes:
    """The bytes of an image in JSON: base64, also as a ``data:`` address."""
    try:
        return base64.b64decode(image.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"image is not base64 ({error})",
            fix="Encode the bytes of the file, or send them as the body.",
        ) from error


def _array(tensors: Mapping[str, Tensor], name: str, value: Any) -> NDArray[Any]:
    """An input from JSON, in its declared dtype. The model checks names and shapes."""
    wanted = np.dtype(tensors[name].dtype if name in tensors else "float32")
    try:
        given = np.array(value)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"input {name}: not an array ({error})", fix="Give nested lists of equal lengths."
        ) from error
    fits = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}.get(wanted.kind, "")
    if given.dtype.kind not in fits:
        raise InputError(
            f"input {name}: {given.dtype} where the model takes {wanted}",
            fix="Give nested lists of numbers of that type.",
        )
    with np.errstate(over="ignore"):
        return given.astype(wanted)


__all__ = ["PREDICT", "predict_routes"]
