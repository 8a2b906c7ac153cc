"""From photos to arrays."""
