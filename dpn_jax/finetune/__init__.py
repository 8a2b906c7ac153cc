"""Fine-tuning with optax: the parts of a training loop, each usable by itself. Needs the extra `finetune`."""

from dpn_jax.finetune.config import FinetuneConfig as FinetuneConfig
