"""Monitoring: what a run reports while it runs."""

from kd_recipes.monitoring.health import Health
from kd_recipes.monitoring.monitor import Alert, HealthMonitor
from kd_recipes.monitoring.symptoms import Vitals

__all__ = ["Alert", "Health", "HealthMonitor", "Vitals"]
