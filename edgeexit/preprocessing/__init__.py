"""Preprocessing: images to tensors with Pillow, sounds to features with numpy, texts to token ids
with tokenizers. The device runs this code; at export, its results are compared with those of
transformers."""
