"""What a device's sensors say of power and energy, and joules of what runs meanwhile.

`find_source` looks for a sensor in a fixed order, one module each: power rails of a Jetson
(`rails`), its program ``tegrastats`` (`tegrastats`), NVIDIA's library (`nvml`), and the energy
counters of x86 processors (`rapl`). A sensor that is not there or cannot be read is told with its
reason. A `Sampler` reads the chosen one in a thread of its own and integrates over a span of time.
"""
