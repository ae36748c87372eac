"""TensorRT engines: the libraries (`library`, their interface in `api`), the types that engines
compute in (`precision`), the cache (`engine_cache`), import from other machines (`importing`,
`signing`), choice for a device (`selection`), and running (`engine`, `graph`).
`edgeexit.runtime.build` builds engines."""
