"""TensorRT engines: what they are built for (`profiles`), with what (`library`), how (`build`, one
process per engine: `worker`), and where they are kept (`store`)."""
