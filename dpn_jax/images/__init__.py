"""From photos to arrays: `read`, `transform`; class names: `labels`; which files: `folders`, `splits`, `sources`; packed:
`records`, `packed`, `pack`."""
