"""GGUF files: header, quantisation formats and tokenizers."""
