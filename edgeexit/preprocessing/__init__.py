"""What users give becomes what models take: pictures by Pillow, texts by tokenizers. The same code
runs on the device and, at export, beside transformers' own."""
