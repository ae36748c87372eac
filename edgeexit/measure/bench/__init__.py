"""Measures a bundle's speed relative to the same model unsplit. `bench` is the entry point. `rows`
and `texts` compute the figures of `cases`, which `worker` processes run in turns (`paired`)."""
