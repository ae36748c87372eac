"""Measurements of a bundle on a device: correctness, exit scores, latency and throughput.

`data` reads data sets, `check` compares a bundle with its samples, `trace` records every exit,
`calibrate` chooses a policy from a trace, `bench` measures time against the unsplit model;
`inspect` and `doctor` describe a bundle and a machine. Needs only numpy and the runtime: devices
have no scipy.
"""

from __future__ import annotations
