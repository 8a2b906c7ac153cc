"""Running a model on photos."""
