"""A user's script over the whole public face, for a type checker (`tests/test_typing.py`); it is not run."""

from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL.Image import Image

import dpn_jax
from dpn_jax import explain, finetune
from dpn_jax.checkpoint.names import Entry, name_table
from dpn_jax.evaluation.metrics import Calibration, ClassResult
from dpn_jax.images.transform import Transform

assert_type(dpn_jax.__version__, str)
assert_type(dpn_jax.list_models(), list[str])
assert_type(dpn_jax.list_pretrained(), list[str])

# models
model = dpn_jax.create_model("dpn_tiny", num_classes=3, rngs=nnx.Rngs(0))
assert_type(model, dpn_jax.DPN)
assert_type(dpn_jax.from_pretrained("dpn92.mx_in1k"), dpn_jax.DPN)
assert_type(dpn_jax.load(Path("m.safetensors")), dpn_jax.DPN)
assert_type(model.config, dpn_jax.DPNConfig)
assert_type(model.config.replace(num_classes=5), dpn_jax.DPNConfig)
assert_type(model.config.multiply_adds(224, 224), int)
assert_type(name_table(model.config), tuple[Entry, ...])
images = jax.numpy.zeros((1, 32, 32, 3))
assert_type(model(images), jax.Array)
assert_type(model.forward_features(images), jax.Array)
assert_type(model.forward_head(images, pre_logits=True), jax.Array)
features, maps = model.forward_intermediates(images, indices=(1, 2))
assert_type(maps, list[jax.Array])
assert_type(model.forward_intermediates(images, intermediates_only=True), list[jax.Array])
for info in model.feature_info:
    assert_type(info.reduction, int)
dpn_jax.save(model, "m.safetensors", overwrite=True)
assert_type(dpn_jax.save_pretrained(model, "folder", facts=dpn_jax.CardFacts()), Path)
assert_type(dpn_jax.push_to_hub(model, "you/dpn", private=True), str)

# inference
transform = dpn_jax.preprocessing("dpn92.mx_in1k", image_size=(224, 320))
assert_type(transform, Transform)
assert_type(transform.preprocessing, dpn_jax.Preprocessing)
assert_type(dpn_jax.fast_forward(model)(images), jax.Array)
assert_type(dpn_jax.fast_apply(model, images), jax.Array)
assert_type(dpn_jax.compiler_options("tpu"), dict[str, str])
assert_type(dpn_jax.keep_freed_memory(), bool)
classifier = dpn_jax.Classifier.from_pretrained("dpn92.mx_in1k", devices="all", batch_size=8)
assert_type(classifier, dpn_jax.Classifier)
assert_type(classifier("photo.jpg"), list[dpn_jax.Prediction])
assert_type(classifier(["a.jpg", "b.jpg"], top_k=1), list[list[dpn_jax.Prediction]])
for answer in classifier.stream(["a.jpg"]):
    if isinstance(answer, dpn_jax.ImageError):
        continue
    assert_type(answer[0].label, str)
    assert_type(answer[0].probability, float)
dpn_jax.export_model(model, "m.jaxexport", platforms=["tpu"], uint8=True)
dpn_jax.load_exported("m.jaxexport")

# evaluation
result = dpn_jax.evaluate(classifier, "photos/val")
assert_type(result, dpn_jax.Evaluation)
assert_type(result.top1, dpn_jax.Proportion)
assert_type(result.top1.interval, tuple[float, float])
assert_type(result.calibration(), Calibration)
assert_type(result.per_class, tuple[ClassResult, ...])
assert_type(result.macro_f1, float)
assert_type(result.throughput, dpn_jax.Throughput | None)

# explanations
assert_type(explain.saliency(model, images, samples=4), jax.Array)
assert_type(explain.grad_cam(model, images, 1, index=2), jax.Array)
assert_type(explain.grad_cam_plus_plus(model, images), jax.Array)
assert_type(explain.integrated_gradients(model, images), explain.IntegratedGradients)
assert_type(explain.occlusion(model, images, window=8, stride=4), jax.Array)
assert_type(explain.overlay("photo.jpg", np.zeros((32, 32))), Image)
assert_type(explain.insertion(model, images, images[..., 0]), explain.Curve)
assert_type(explain.deletion(model, images, images[..., 0]), explain.Curve)
assert_type(explain.randomized(model), dpn_jax.DPN)
assert_type(explain.path_shares(model, images), list[explain.PathShares])
assert_type(explain.ablate(model, path="dense"), dpn_jax.DPN)
assert_type(explain.cka(images, images), float)
assert_type(explain.receptive_field(model, images), explain.ReceptiveField)

# fine-tuning
config = finetune.FinetuneConfig(epochs=3, optimizer="adamw", freeze="stage1")
assert_type(finetune.finetune("photos", "run", config, source="dpn92.mx_in1k"), finetune.Finetuned)
folder = finetune.image_folder("photos", split="train")
assert_type(folder, finetune.ImageFolder)
data = finetune.batches(folder, config, transform.preprocessing, train=True)
assert_type(data, finetune.BatchIterator)
tx = finetune.make_optimizer(config, model, batches_per_epoch=10)
state = finetune.TrainState.create(model, tx, config)
assert_type(state, finetune.TrainState)
mesh = finetune.data_mesh()
assert_type(mesh, Mesh)
state, metrics = finetune.train_step(finetune.replicate(state, mesh), finetune.shard_batch(next(data), mesh))
assert_type(state, finetune.TrainState)
assert_type(metrics, dict[str, jax.Array])
assert_type(finetune.eval_step(state, next(data)), dict[str, jax.Array])
assert_type(state.model(ema=True), dpn_jax.DPN)
assert_type(finetune.frozen_norms(config, model), tuple[str, ...])
assert_type(finetune.read_metrics("run/metrics.jsonl"), list[dict[str, Any]])

# errors are ordinary ones
try:
    dpn_jax.load("damaged.safetensors")
except dpn_jax.CheckpointError as error:
    assert_type(str(error), str)
except (finetune.RunError, finetune.DataError, finetune.DivergedError):
    raise
