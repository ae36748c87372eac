"""TensorRT engines: what they are built for (`profiles`), with what (`library`), how (`build`, one
process per engine: `worker`), where they are kept (`store`), and how they run (`engine`, on a GPU
that `device` describes and `cuda` gives memory of)."""
