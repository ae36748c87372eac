"""Components to ONNX graphs (`component_graphs`): torch modules whole (`torch_graph`), or layer by
layer, each kind of layer once (`layer_graphs`, `layer_stacks`), in the forms of `attention`, with
`scores`, in half precision (`half`)."""
