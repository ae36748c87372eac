"""`load` and `load_decoder`: from a bundle's path to a model that runs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Literal

from edgeexit.bundle.manifest import Chain as ChainManifest
from edgeexit.bundle.manifest import Exit, Segment
from edgeexit.bundle.policy import Policy, decide, read_policy
from edgeexit.bundle.reader import Bundle, open_bundle
from edgeexit.errors import BundleError, EngineError, PolicyError, UsageError
from edgeexit.runtime.engines.base import Engine
from edgeexit.runtime.executor.bindings import EVERY_SCORE
from edgeexit.runtime.executor.chain import Chain, needs
from edgeexit.runtime.executor.launch_ahead import LaunchAhead
from edgeexit.runtime.executor.session import Form, open_decoder
from edgeexit.runtime.loaded import LoadedModel
from edgeexit.runtime.programs.forward import Model
from edgeexit.runtime.programs.generate import Decoder

logger = logging.getLogger(__name__)

ENGINES = ("cpu", "cuda", "tensorrt-provider", "tensorrt")
Threads = int | Literal["blocking", "spinning", "process"]


def load(
    path: str | os.PathLike[str] | Bundle,
    engine: str = "cpu",
    *,
    policy: Policy | str | os.PathLike[str] | None = None,
    threads: Threads | None = None,
    verify: Literal["quick", "full"] = "quick",
    all_scores: bool = False,
    fallback: str | None = None,
    launch_ahead: LaunchAhead = "never",
) -> Model:
    """Loads a bundle with a ``forward`` program.

    Args:
        path: The bundle's directory, or an opened bundle.
        engine: ``cpu``, ``cuda`` or ``tensorrt-provider`` (ONNX Runtime's), or ``tensorrt``:
            engines that ``edgeexit build`` made, in ``$EDGEEXIT_ENGINE_DIR`` or the user's cache.
        policy: When to stop: a `Policy`, or the path of one. None: the bundle's default, and
            without one every row goes to the last exit.
        threads: ``blocking`` (a pool per session that sleeps while idle), ``spinning``, a number of
            threads, or ``process``: ONNX Runtime's global pool, which
            makes other default sessions in this process fail. On a GPU: how the host waits for it,
            asleep (``blocking``) or looking all the time (everything else), which answers sooner.
            None: ``blocking`` on the host, ``spinning`` on a GPU.
        verify: ``full`` also hashes the weights.
        all_scores: Open the segments with every score, as `Model.trace` needs them, and not only
            with what the policy asks for (exits that it never consults are left out of their
            graphs). A model opened otherwise opens segments again when they are first needed.
        fallback: Another engine, to be used if this one cannot be: its library or a GPU is missing,
            or no engines were built for this device. That is logged as a warning, and
            `Model.describe_engine` says what came instead of what. None: that is an error.
        launch_ahead: On a GPU, whether a single row's next segment is launched while the score
            before it is read back: ``never``, ``always``, or ``measured``: where that was seen to
            gain more than the segments that are run for nothing cost
            (`edgeexit.runtime.executor.launch_ahead`).

    Raises:
        BundleError, PolicyError, EngineError: naming what is wrong and how to mend it.
    """
    if not isinstance(path, (str, os.PathLike, Bundle)):
        raise UsageError(f"path is a {type(path).__name__}", fix="Give the path of a bundle.")
    bundle = path if isinstance(path, Bundle) else open_bundle(path, verify=verify)
    manifest = bundle.manifest
    if manifest.program == "decode":
        raise UsageError(
            f"{bundle.path} writes text: it is not run in one pass",
            fix="Use load_decoder and generate (edgeexit run --prompt).",
        )
    if manifest.program != "forward":
        raise BundleError(
            f"{bundle.path}: the program {manifest.program!r} cannot be run by this edgeexit",
            fix="Install a newer edgeexit.",
        )
    if len(manifest.chains) != 1:
        raise BundleError(
            f"{bundle.path}: one pass runs one chain, the bundle has {len(manifest.chains)}",
            fix="Export again.",
        )
    if launch_ahead not in ("never", "measured", "always"):
        raise UsageError(
            f"launch_ahead={launch_ahead!r}", fix='Use "never", "measured" or "always".'
        )
    chosen = _policy(policy, bundle)
    (chain_manifest,) = manifest.chains.values()
    exits = bundle.exits()
    wanted = needs(decide(chosen, exits, digest=bundle.digest), chosen.score)
    if all_scores:
        wanted = [EVERY_SCORE] * len(exits)

    def open_on(name: str) -> Model:
        opened = _engine(name, threads, bundle)
        when: LaunchAhead = "never" if opened.gpu is None else launch_ahead
        if when != launch_ahead and name == engine:
            raise UsageError(
                f"launch_ahead: the engine {name} has no stream that anything could be launched on",
                fix='Leave it out, or use engine="cuda" or "tensorrt".',
            )
        chain = Chain(bundle, chain_manifest, manifest.inputs, opened, wanted, when)
        return Model(bundle, chain, opened, chosen)

    model = _first_usable(open_on, engine, fallback)
    _warn_if_calibrated_elsewhere(chosen, model.describe_engine())
    return model


def load_decoder(
    path: str | os.PathLike[str] | Bundle,
    engine: str = "cpu",
    *,
    policy: Policy | str | os.PathLike[str] | None = None,
    threads: Threads | None = None,
    verify: Literal["quick", "full"] = "quick",
    capacity: int | None = None,
    caches: Form | None = None,
    unsplit: bool = False,
    fallback: str | None = None,
) -> Decoder:
    """Loads a bundle with a ``decode`` program: a language model.

    Args:
        path, engine, threads, verify, fallback: As for `load`.
        policy: When ``fast`` decoding stops; the other modes do without.
        capacity: The most tokens of a text, prompt included; caches are that large. None: as many
            as the model was made for, or the engines were built for. The form ``fixed`` attends
            over the whole of it in every step, ``append`` over the smallest half, quarter, ... of
            it that holds the text, so ask for no more than you need.
        caches: The form of the caches, for comparisons: ``in-place`` (ONNX Runtime's own
            operator), ``fixed`` (standard operators of opset 24) or ``append`` (any engine). None:
            the fastest one that the engine runs. All give the same tokens.
        unsplit: Load the same model as one graph without exits: the baseline, with the same caches.

    Raises:
        BundleError, PolicyError, EngineError, UsageError: naming what is wrong and how to mend it.
    """
    bundle = path if isinstance(path, Bundle) else open_bundle(path, verify=verify)
    if bundle.manifest.program != "decode":
        raise UsageError(
            f"{bundle.path} does not write text: its program is {bundle.manifest.program}",
            fix="Use load.",
        )
    chosen = _policy(policy, bundle)
    decisions = decide(chosen, bundle.exits(), digest=bundle.digest)
    scores = [chosen.score] if any(one.consult for one in decisions[:-1]) else []
    limit = bundle.manifest.limits["positions"]
    check_capacity(capacity, limit, None)

    def open_on(name: str) -> Decoder:
        found = _engine(name, threads, bundle)
        built = found.largest.get("past")
        check_capacity(capacity, limit, built)
        opened = open_decoder(bundle, found, unsplit=unsplit, form=caches, scores=scores)
        fixed = any(variant.caches == "fixed" for variant in opened.variants)
        check_capacity(capacity, limit, built, fixed=fixed)
        return Decoder(bundle, opened, chosen, capacity or built or limit)

    model = _first_usable(open_on, engine, fallback)
    _warn_if_calibrated_elsewhere(chosen, model.describe_engine())
    return model


def check_capacity(
    capacity: int | None, limit: int, built: int | None, *, fixed: bool = False
) -> None:
    """Refuses a capacity that cannot be had.

    Args:
        capacity: Tokens asked for; None: as many as there are.
        limit: The most that the model was made for.
        built: The most that engines were built for; None: any number.
        fixed: They were built for exactly so many.

    Raises:
        UsageError: It cannot be had.
    """
    if capacity is None:
        return
    if not (isinstance(capacity, int) and 2 <= capacity <= limit):
        raise UsageError(
            f"capacity {capacity} cannot be had: the model was made for 2 to {limit} tokens",
            fix=f"Use at most {limit}.",
        )
    if built is not None and (capacity > built or (fixed and capacity < built)):
        exactly = ", no fewer, for their caches are of a fixed size" if fixed else ""
        raise UsageError(
            f"capacity {capacity} cannot be had: the engines were built for {built} tokens"
            f"{exactly}",
            fix=f"Leave the capacity open, or build for it: edgeexit build --capacity {capacity}.",
        )


def load_unsplit(
    path: str | os.PathLike[str] | Bundle,
    engine: str = "cpu",
    *,
    threads: Threads | None = None,
) -> Model:
    """Loads the same model as one graph without exits: the baseline, bound as the chain is."""
    bundle = path if isinstance(path, Bundle) else open_bundle(path)
    manifest = bundle.manifest
    leave = Exit(name="unsplit", outputs={t.name: t.name for t in manifest.outputs}, scores={})
    segment = Segment(
        name="unsplit",
        variants=manifest.unsplit,
        inputs=manifest.inputs,
        outputs=list(manifest.outputs),
        exits=[leave],
    )
    opened = _engine(engine, threads, bundle)
    policy = Policy()
    only = ChainManifest(segments=[segment])
    chain = Chain(bundle, only, manifest.inputs, opened, [None])
    return Model(bundle, chain, opened, policy)


def _first_usable(
    open_on: Callable[[str], LoadedModel], engine: str, fallback: str | None
) -> LoadedModel:
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
        threads = "blocking" if name == "cpu" else "spinning"
    if name == "tensorrt":
        from edgeexit.runtime.engines.tensorrt.engine import open_tensorrt

        return open_tensorrt(bundle, waiting="block" if threads == "blocking" else "spin")
    from edgeexit.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(name, threads)


def _policy(policy: Policy | str | os.PathLike[str] | None, bundle: Bundle) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if policy is None:
        default = bundle.manifest.policy
        if default is None:
            return Policy()
        named = {"never": math.inf, "always": -math.inf}
        threshold = default.threshold
        value = named[threshold] if isinstance(threshold, str) else threshold
        return Policy(score=default.score, thresholds=value)
    if isinstance(policy, (str, os.PathLike)):
        return read_policy(policy)
    raise PolicyError(
        f"policy is a {type(policy).__name__}", fix="Give a Policy or the path of a policy.json."
    )


__all__ = ["load", "load_decoder", "load_unsplit"]
