"""From files to models and back: `open`, `load` and `save`, on top of `names`, `hub` and `files`."""
