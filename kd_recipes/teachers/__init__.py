"""Teachers: from a batch to a signal."""

from kd_recipes.teachers.online import OnlineTeacher

__all__ = ["OnlineTeacher"]
