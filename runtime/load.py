"""`load`: from a bundle's path to a model that runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from edgeexit.bundle.manifest import StateForm
from edgeexit.bundle.policy import Policy, Rule, policy_for
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.errors import EngineError, UsageError
from edgeexit.runtime.engines.base import Engine
from edgeexit.runtime.executor.components import Components, token_states
from edgeexit.runtime.executor.launch_ahead import LaunchAhead
from edgeexit.runtime.model import Model

logger = logging.getLogger(__name__)

ENGINES = ("cpu", "cuda", "tensorrt-provider", "tensorrt")
Threads = int | Literal["brief", "blocking", "spinning", "process"]


def load(
    path: str | os.PathLike[str] | Bundle,
    engine: str = "cpu",
    *,
    policy: Policy | Rule | str | os.PathLike[str] | None = None,
    threads: Threads | None = None,
    verify: Literal["quick", "full"] = "quick",
    unsplit: bool = False,
    capacity: int | None = None,
    states: StateForm | None = None,
    all_scores: bool = False,
    fallback: str | None = None,
    launch_ahead: LaunchAhead = "never",
) -> Model:
    """Loads a bundle.

    Args:
        path: The bundle's directory, or an opened bundle.
        engine: ``cpu``, ``cuda`` or ``tensorrt-provider`` (ONNX Runtime's), or ``tensorrt``:
            engines that ``edgeexit build`` made, in ``$EDGEEXIT_ENGINE_DIR`` or the user's cache.
        policy: When to stop: a `Policy`, a `Rule` for the one chain that has exits, or the path of
            a policy's file. None: everything goes to the last exit.
        threads: ``brief`` (a pool per session that spins for 0.1 ms before it sleeps), ``blocking``
            (one that sleeps at once), ``spinning``, a number of threads, or ``process``: ONNX
            Runtime's global pool, which makes other default sessions in this process fail. On a
            GPU: the host sleeps while it waits (``blocking``) or spins (everything else), which
            answers sooner.
            None: ``brief`` on the host, ``spinning`` on a GPU.
        verify: ``full`` also hashes the weights.
        unsplit: Load the same model as one graph per chain, without exits: the baseline of every
            figure, bound as the chain is.
        capacity: Of a model that writes: the most tokens of a text, prompt included; its states are
            that large. None: as many as the model was made for, or the engines were built for. The
            form ``fixed`` attends over the whole of it in every step, ``append`` over the smallest
            half, quarter, ... of it that holds the text, so ask for no more than you need.
        states: The form of token states, for comparisons: ``in-place`` (ONNX Runtime's own
            operator), ``fixed`` (standard operators of opset 24) or ``append`` (any engine). None:
            the fastest one that the engine runs. All give the same tokens.
        all_scores: Open components with every score, as `Model.trace` needs them, and not only
            with what the policy asks for (exits that it never asks are left out of their
            graphs). A model opened otherwise opens components again when they are first needed.
        fallback: Another engine, to be used if this one cannot be: its library or a GPU is missing,
            or no engines were built for this device. That is logged as a warning, and
            `Model.describe_engine` says what came instead of what. None: that is an error.
        launch_ahead: On a GPU, whether a single row's next component is launched while the score
            before it is read back: ``never``, ``always``, or ``measured``: where that was seen to
            gain more than what is run for nothing costs (`edgeexit.runtime.executor.launch_ahead`).

    Raises:
        BundleError, PolicyError, EngineError, UsageError: With the cause and the fix.
    """
    if not isinstance(path, (str, os.PathLike, Bundle)):
        raise UsageError(f"path is a {type(path).__name__}", fix="Give the path of a bundle.")
    bundle = path if isinstance(path, Bundle) else open_bundle(path, verify=verify)
    decoding = bundle.manifest.decoding
    if launch_ahead not in ("never", "measured", "always"):
        raise UsageError(
            f"launch_ahead={launch_ahead!r}", fix='Use "never", "measured" or "always".'
        )
    if decoding is None and (capacity is not None or states is not None):
        raise UsageError(
            f"{bundle.path} does not write text: it keeps no states",
            fix="Leave out capacity and states.",
        )
    chosen = policy_for(policy, bundle)
    limit = bundle.manifest.limits.get("positions")
    usual = (decoding and decoding.capacity) or limit or 0
    check_capacity(capacity, limit, None)

    def open_on(name: str) -> Model:
        opened = _engine(name, threads, bundle)
        when: LaunchAhead = "never" if opened.gpu is None else launch_ahead
        if when != launch_ahead and name == engine:
            raise UsageError(
                f"launch_ahead: the engine {name} has no stream that anything could be launched on",
                fix='Leave it out, or use engine="cuda" or "tensorrt".',
            )
        built = opened.largest.get("past")
        components = Components(bundle, opened, states)
        if decoding is not None:
            fixed = any(
                components[name].variant.states == "fixed"
                for name in bundle.manifest.chains[decoding.chain].components
                if token_states(bundle.manifest.components[name])
            )
            check_capacity(capacity, limit, built, fixed=fixed)
        return Model(
            bundle,
            components,
            chosen,
            unsplit=unsplit,
            all_scores=all_scores,
            launch_ahead=when,
            capacity=int(capacity or built or usual),
        )

    model = _first_usable(open_on, engine, fallback)
    _warn_if_calibrated_elsewhere(chosen, model.describe_engine())
    return model


def check_capacity(
    capacity: int | None, limit: int | None, built: int | None, *, fixed: bool = False
) -> None:
    """Refuses a capacity that is out of range.

    Args:
        capacity: Tokens asked for; None: as many as there are.
        limit: The most that the model was made for; None: any number.
        built: The most that engines were built for; None: any number.
        fixed: They were built for exactly so many.

    Raises:
        UsageError: It is out of range.
    """
    if capacity is None:
        return
    whole = isinstance(capacity, (int, np.integer)) and not isinstance(capacity, bool)
    if not whole or not 2 <= capacity <= (capacity if limit is None else limit):
        raise UsageError(
            f"capacity {capacity} is out of range: the model was made for 2 "
            + ("tokens or more" if limit is None else f"to {limit} tokens"),
            fix="Use a whole number, at " + ("least 2." if limit is None else f"most {limit}."),
        )
    if built is not None and (capacity > built or (fixed and capacity < built)):
        exactly = ", no fewer, for their states are of a fixed size" if fixed else ""
        raise UsageError(
            f"capacity {capacity} is out of range: the engines were built for {built} tokens"
            f"{exactly}",
            fix=f"Leave the capacity open, or build for it: edgeexit build --capacity {capacity}.",
        )


def _first_usable(open_on: Callable[[str], Model], engine: str, fallback: str | None) -> Model:
    """The model on the engine that was asked for, or on the one to fall back on; says so."""
    if fallback is not None:
        _require_engine(fallback)
    if fallback is None or fallback == engine:
        return open_on(engine)
    try:
        return open_on(engine)
    except EngineError as error:
        why = error
    try:
        model = open_on(fallback)
    except EngineError as error:
        raise EngineError(
            f"the engine {engine} cannot be used ({why.what}), and {fallback} neither: "
            f"{error.what}",
            fix=error.fix,
        ) from error
    model.instead_of = engine
    logger.warning("the engine %s cannot be used, %s computes instead: %s", engine, fallback, why)
    return model


def _warn_if_calibrated_elsewhere(policy: Policy, engine: Mapping[str, str]) -> None:
    """Scores differ a little from engine to engine, and so do the answers that a threshold lets
    through."""
    made_on = {name: policy.engine.get(name) for name in ("engine", "engines")}
    here = {name: engine.get(name) for name in made_on}
    if policy.engine and made_on != here:
        described = [" ".join(filter(None, one.values())) for one in (made_on, here)]
        logger.warning(
            "the policy was calibrated on %s, this is %s: its risk was not measured here "
            "(edgeexit trace and calibrate)",
            *described,
        )


def _require_engine(name: str) -> None:
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}", fix=f"Use one of {', '.join(ENGINES)}.")


def _engine(name: str, threads: Threads | None, bundle: Bundle) -> Engine:
    _require_engine(name)
    if threads is None:
        threads = "brief" if name == "cpu" else "spinning"
    if name == "tensorrt":
        from edgeexit.runtime.engines.tensorrt.engine import open_tensorrt

        return open_tensorrt(bundle, waiting="block" if threads == "blocking" else "spin")
    from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(name, threads)


__all__ = ["load"]
