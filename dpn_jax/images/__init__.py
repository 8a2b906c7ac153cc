"""From photos to arrays: `read`, `transform`; names of classes: `labels`; which images: `folders`, `splits`, `sources`.

Packed images: `records`, `packed`, `pack`.
"""
