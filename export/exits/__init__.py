"""Models with exits, as one torch module for training and export: a `classifier`, a `decoder`, an
`encoder_decoder`; `saved` writes their exits into checkpoints."""
