"""TensorRT engines: the libraries that build and run them (`library`, their interface in `api`),
types that they compute in (`precision`), where they are stored (`engine_cache`), how they come in
from other machines (`importing`, `signing`), which ones fit a device (`selection`), and how they
run (`engine`, `graph`). `edgeexit.runtime.build` builds them."""
