"""What GGUF files have in common, read or written: names, blocks of codes, and how text is split."""
