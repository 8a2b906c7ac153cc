"""Dual Path Networks in JAX and Flax NNX, from the weights that timm publishes."""

import dpn_jax.cli.early  # noqa: F401  before all that takes time: Ctrl-C during the imports
from dpn_jax import explain as explain
from dpn_jax.checkpoint.card import CardFacts as CardFacts
from dpn_jax.checkpoint.load import from_pretrained as from_pretrained
from dpn_jax.checkpoint.load import load as load
from dpn_jax.checkpoint.publish import push_to_hub as push_to_hub
from dpn_jax.checkpoint.publish import save_pretrained as save_pretrained
from dpn_jax.checkpoint.save import save as save
from dpn_jax.config import DPNConfig as DPNConfig
from dpn_jax.config import list_models as list_models
from dpn_jax.errors import CheckpointError as CheckpointError
from dpn_jax.errors import ImageError as ImageError
from dpn_jax.evaluation.evaluate import evaluate as evaluate
from dpn_jax.evaluation.metrics import Evaluation as Evaluation
from dpn_jax.evaluation.metrics import Proportion as Proportion
from dpn_jax.fast.forward import fast_forward as fast_forward
from dpn_jax.fast.memory import keep_freed_memory as keep_freed_memory
from dpn_jax.fast.plan import compiler_options as compiler_options
from dpn_jax.fast.training import fast_apply as fast_apply
from dpn_jax.images.transform import preprocessing as preprocessing
from dpn_jax.inference.classifier import Classifier as Classifier
from dpn_jax.inference.export import export_model as export_model
from dpn_jax.inference.export import load_exported as load_exported
from dpn_jax.inference.prediction import Prediction as Prediction
from dpn_jax.inference.throughput import Throughput as Throughput
from dpn_jax.model import DPN as DPN
from dpn_jax.model import create_model as create_model
from dpn_jax.pretrained import Preprocessing as Preprocessing
from dpn_jax.pretrained import list_pretrained as list_pretrained

__version__ = "0.2.0"
