"""Architecture families: one short file each, which describes a model's stem, layers and head.

To add a family, write a function ``trunk(model) -> Trunk`` in a new file (for images ``trunk(model,
size)``, with the height and width that preprocessing gives) and list its model type in
`edgeexit.export.pretrained.FAMILIES`; follow `bert` or `vit`. For a language model write
``trunk(model) -> DecoderTrunk`` and list it in `DECODERS`; follow `opt`. For a vision-language
model write ``trunk(model) -> VisionLanguageTrunk``, with a tower of `towers` and a language model
of `language`, and list it in `VISION_LANGUAGE`; follow `llava`.
"""
