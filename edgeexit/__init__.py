"""edgeexit: early exits that save real time on real devices.

A model with exits goes one way: `edgeexit.export` (the workstation, torch) splits it at its exits
into a bundle, `edgeexit.runtime` (the device, numpy and one engine library) chains the segments
and stops when an exit's score says so, `edgeexit.measure` tells what that gained against the same
model unsplit. ``edgeexit --help`` is the command line. Importing this package loads neither torch
nor an engine.
"""

from __future__ import annotations

__version__ = "0.1.0"
