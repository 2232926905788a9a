"""Recipes for torchtune that distil and compress language models."""

__version__ = "0.1.0"
