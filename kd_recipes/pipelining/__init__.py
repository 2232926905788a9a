"""Recipes in order, from one config: what is to run, what has run, and what came of it."""
