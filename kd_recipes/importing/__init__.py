"""Readers of other projects' checkpoints: each leaves a directory that transformers and torchtune both load."""
