"""Fine-tuning with optax: a training loop and its parts, each usable alone. Needs the extra `finetune`."""

from dpn_jax.errors import DataError as DataError
from dpn_jax.errors import DivergedError as DivergedError
from dpn_jax.errors import RunError as RunError
from dpn_jax.finetune.checkpoints import Checkpoints as Checkpoints
from dpn_jax.finetune.checks import find_broken as find_broken
from dpn_jax.finetune.config import FinetuneConfig as FinetuneConfig
from dpn_jax.finetune.data import BatchIterator as BatchIterator
from dpn_jax.finetune.data import batches as batches
from dpn_jax.finetune.loss import class_weights as class_weights
from dpn_jax.finetune.mixup import mix as mix
from dpn_jax.finetune.optimizer import learning_rate as learning_rate
from dpn_jax.finetune.optimizer import make_optimizer as make_optimizer
from dpn_jax.finetune.parameters import frozen_norms as frozen_norms
from dpn_jax.finetune.report import plot_curves as plot_curves
from dpn_jax.finetune.report import read_metrics as read_metrics
from dpn_jax.finetune.run import Finetuned as Finetuned
from dpn_jax.finetune.run import finetune as finetune
from dpn_jax.finetune.start import initial_model as initial_model
from dpn_jax.finetune.step import TrainState as TrainState
from dpn_jax.finetune.step import eval_step as eval_step
from dpn_jax.finetune.step import train_step as train_step
from dpn_jax.images.splits import ImageFolder as ImageFolder
from dpn_jax.images.splits import image_folder as image_folder
from dpn_jax.multihost import data_mesh as data_mesh
from dpn_jax.multihost import replicate as replicate
from dpn_jax.multihost import shard_batch as shard_batch
