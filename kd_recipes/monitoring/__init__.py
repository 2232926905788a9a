"""Monitoring: what a run reports while it runs."""
