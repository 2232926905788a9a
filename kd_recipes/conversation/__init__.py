"""Talking to models in a terminal, side by side."""

from kd_recipes.conversation.sampling import Sampling
from kd_recipes.conversation.session import Settings, converse

__all__ = ["Sampling", "Settings", "converse"]
