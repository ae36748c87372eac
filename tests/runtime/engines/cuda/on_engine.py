"""Models on engines that `load` does not know."""

from __future__ import annotations

from edgeexit.bundle.policy import Policy, Rule, policy_for
from edgeexit.bundle.reader import Bundle
from edgeexit.runtime import Model
from edgeexit.runtime.engines.base import Engine
from edgeexit.runtime.executor.components import Components
from edgeexit.runtime.executor.launch_ahead import LaunchAhead


def model_on(
    bundle: Bundle,
    engine: Engine,
    policy: Policy | Rule,
    *,
    launch_ahead: LaunchAhead = "never",
    all_scores: bool = False,
    unsplit: bool = False,
) -> Model:
    """A bundle on an engine; texts have as many tokens as engine and bundle allow."""
    capacity = engine.largest.get("past", bundle.manifest.limits.get("positions", 0))
    return Model(
        bundle,
        Components(bundle, engine),
        policy_for(policy, bundle),
        unsplit=unsplit,
        launch_ahead=launch_ahead,
        all_scores=all_scores,
        capacity=capacity,
    )
