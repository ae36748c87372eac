"""Time against the same model unsplit: `bench` measures the `cases` of a classifier, `decode_bench`
the `decode_cases` of a language model, in `worker` processes that take turns (`paired`)."""
