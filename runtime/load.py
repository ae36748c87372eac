"""`load`: opens a bundle on an engine, with a policy, and returns a `Model`."""

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
from edgeexit.runtime.engines.base import Engine, Threads
from edgeexit.runtime.executor.components import Components, token_states
from edgeexit.runtime.executor.launch_ahead import LaunchAhead
from edgeexit.runtime.model import Model

logger = logging.getLogger(__name__)

ENGINES = ("cpu", "cuda", "tensorrt-provider", "tensorrt")


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
        engine: ``cpu``, ``cuda`` or ``tensorrt-provider`` (ONNX Runtime), or ``tensorrt``:
            engines built by ``edgeexit build``, in ``$EDGEEXIT_ENGINE_DIR`` or the user's cache.
        policy: When to stop: a `Policy`, a `Rule` for the only chain with exits, or the path of a
            policy file. None: every row runs to the last exit.
        threads: ``brief`` (one pool per session that spins for 0.1 ms at most, while a graph runs),
            ``blocking`` (it sleeps at once), ``spinning``, a number of threads, or ``process``:
            ONNX Runtime's global pool, with which other default sessions in this process fail. On a
            GPU: how the host waits for it. ``blocking`` sleeps; every other value spins, which
            returns sooner. None: ``brief`` on the host, ``spinning`` on a GPU.
        verify: ``full`` also hashes the weights.
        unsplit: Load the model as one graph per chain, without exits: the baseline of all
            measurements.
        capacity: Language models: the largest number of tokens of a text, prompt included. States
            are allocated for it. None: the model's limit, or what the engines were built for.
            In every step, the form ``fixed`` attends over the whole capacity, ``append`` over the
            smallest half, quarter, ... of it that holds the text: choose no more than you need.
        states: The form of token states, for comparisons: ``in-place`` (ONNX Runtime's own
            operator), ``fixed`` (standard operators of opset 24) or ``append`` (any engine). None:
            the fastest form that the engine supports. All forms give the same tokens.
        all_scores: Open components with every score, as `Model.trace` needs. By default they
            compute only what the policy uses, and are opened again when more is needed.
        fallback: The engine to use if `engine` cannot be used: its library or a GPU is missing,
            or no engines were built for this device. A warning is logged, and
            `Model.describe_engine` names both. None: raise the error.
        launch_ahead: On a GPU: launch a single row's next component before the score of the
            current one is read: ``never``, ``always``, or ``measured``: where this was measured to
            save more time than it wastes (`edgeexit.runtime.executor.launch_ahead`).

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
            f"{bundle.path} does not write text: it has no states",
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
                f"launch_ahead: the engine {name} has no GPU stream to launch on",
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
    """Checks a capacity.

    Args:
        capacity: Requested tokens; None: no request.
        limit: The model's limit; None: no limit.
        built: The capacity that the engines were built for; None: any.
        fixed: The engines accept exactly that capacity.

    Raises:
        UsageError: The capacity is out of range.
    """
    if capacity is None:
        return
    whole = isinstance(capacity, (int, np.integer)) and not isinstance(capacity, bool)
    if not whole or not 2 <= capacity <= (capacity if limit is None else limit):
        raise UsageError(
            f"capacity {capacity} is out of range "
            + ("(2 or more)" if limit is None else f"(2 to {limit})"),
            fix="Use a whole number, at " + ("least 2." if limit is None else f"most {limit}."),
        )
    if built is not None and (capacity > built or (fixed and capacity < built)):
        most = "exactly" if fixed else "at most"
        raise UsageError(
            f"capacity {capacity} is out of range: the engines were built for {most} {built} "
            "tokens",
            fix=f"Leave out capacity, or build for it: edgeexit build --capacity {capacity}.",
        )


def _first_usable(open_on: Callable[[str], Model], engine: str, fallback: str | None) -> Model:
    """The model on the requested engine, or on the fallback, with a warning."""
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
            f"neither the engine {engine} ({why.what}) nor the fallback {fallback} can be used: "
            f"{error.what}",
            fix=error.fix,
        ) from error
    model.instead_of = engine
    logger.warning("the engine %s cannot be used, using %s: %s", engine, fallback, why)
    return model


def _warn_if_calibrated_elsewhere(policy: Policy, engine: Mapping[str, str]) -> None:
    """Warns if the policy was calibrated on another engine: scores differ slightly between
    engines, so the measured risk does not hold here."""
    made_on = {name: policy.engine.get(name) for name in ("engine", "engines")}
    here = {name: engine.get(name) for name in made_on}
    if policy.engine and made_on != here:
        described = [" ".join(filter(None, about.values())) for about in (made_on, here)]
        logger.warning(
            "the policy was calibrated on %s, this is %s: its risk was not measured here "
            "(run edgeexit trace and calibrate)",
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
