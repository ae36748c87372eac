"""What a device tells about a bundle: whether it is right, how sure its exits are, what it costs.

`data` reads data sets, `check` compares a bundle with its samples, `trace` records every exit once,
`calibrate` chooses a policy from a trace, `bench` measures time against the model unsplit;
`inspect` and `doctor` describe a bundle and a machine. Needs numpy and the runtime; statistics are
written with them alone, because a device has no scipy.
"""

from __future__ import annotations
