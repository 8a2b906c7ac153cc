"""From photos to arrays: `read`, `transform`; what the classes are called, `labels`; which files, `folders`."""
