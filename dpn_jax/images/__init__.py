"""From photos to arrays: `read`, `transform`; class names: `labels`; which files: `folders`, `splits`."""
