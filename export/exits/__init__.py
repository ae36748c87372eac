"""Models with exits, as one torch module for training and export: a `classifier`, a `decoder`, an
`encoder_decoder`; `skipped_attention` removes attentions from a decoder, `saved` writes all of it
into checkpoints."""
