"""The same network, rearranged for each backend's speed; `dpn_jax.model` stays the definition."""
