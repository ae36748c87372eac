"""Time against the same model unsplit: `bench` measures `cases`, of rows or of texts, in `worker`
processes that take turns (`paired`)."""
