"""A teacher that a server on another machine runs."""

from kd_recipes.teachers.remote.source import RemoteTeacher

__all__ = ["RemoteTeacher"]
