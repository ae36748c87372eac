"""Architecture families: one short file each, which says what a model's stem, layers and head are.

To add one, write a function ``trunk(model) -> Trunk`` in a new file (for images ``trunk(model,
size)``, with the height and width that preprocessing gives) and list its model type in
`edgeexit.export.pretrained.FAMILIES`; `bert` and `vit` are the examples to follow. For a language
model the function is ``trunk(model) -> DecoderTrunk``, the list `DECODERS` and the example `opt`.
"""
