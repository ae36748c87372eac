"""TensorRT engines: with what they are built (`library`, its interface in `api`) and in which types
(`precision`), where they are kept (`engine_cache`), and how they run (`engine`, on a GPU that
`edgeexit.runtime.engines.cuda` gives memory of). `edgeexit.runtime.build` builds them."""
