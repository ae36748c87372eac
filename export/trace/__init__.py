"""Traces components to ONNX graphs (`component_graphs`). Torch modules are traced whole
(`torch_graph`) or layer by layer, each kind of layer once (`layer_graphs`, `layer_stacks`).
`attention` has the forms of attention with a cache, `scores` adds scores to a graph, and `half`
converts a model to half precision."""
