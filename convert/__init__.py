"""Scripts that may import torch and timm; the library itself never does."""
