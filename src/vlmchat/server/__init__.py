"""Answers over HTTP: workers, which own a model, and controllers, which know workers."""
