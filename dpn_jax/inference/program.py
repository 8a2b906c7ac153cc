"""The program of a classifier: uint8 images in, logits out, split over devices that send each other nothing."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpn_jax.multihost import AXIS, data_mesh
from dpn_jax.pretrained import Preprocessing

Devices = Literal["all"] | jax.Device | Sequence[jax.Device] | None
"""Where to run: None is JAX's default device, "all" are all devices of this process."""


def find_devices(devices: Devices = None) -> tuple[jax.Device, ...]:
    """The devices that are meant.

    Raises:
      ValueError: there are none, one is named twice, they are of several kinds, or one belongs to another process.

    Example:
      >>> len(find_devices())
      1
    """
    if devices is None:
        return tuple(jnp.zeros(()).devices())
    if isinstance(devices, str) and devices != "all":
        raise ValueError(f"devices must be None, 'all', a device or several, got {devices!r}")
    if isinstance(devices, jax.Device):
        devices = (devices,)
    chosen = tuple(jax.local_devices() if isinstance(devices, str) else devices)
    if strange := [device for device in chosen if not isinstance(device, jax.Device)]:
        raise ValueError(f"devices must be of jax.devices(), got {strange[0]!r}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"devices must be one or more, each once, got {list(chosen)}")
    if len({device.platform for device in chosen}) > 1:
        raise ValueError(f"devices must be of one kind, got {list(chosen)}")
    if others := [device for device in chosen if device.process_index != jax.process_index()]:
        raise ValueError(
            f"devices must be of this process ({jax.process_index()}), got {others[0]} of process "
            f"{others[0].process_index}; see stream_in_processes"
        )
    return chosen


class Program:
    """A forward pass on prepared images, split over devices.

    Each device runs the program of one device on its part of the batch, so that one device and many give the same
    logits up to the rounding of another batch size. It compiles once for each batch size.

    Args:
      apply: a pure function of params and normalized images.
      params: copied to each device once.
      preprocessing: its mean and standard deviation normalize uint8 images, on the devices.
      devices: where to run.
      compiler_options: for `jax.jit`.
      raw: `apply` takes uint8 images as they are.
      rows_each: the only number of rows that a device takes; defaults to any.
    """

    def __init__(
        self,
        apply: Callable[[Any, jax.Array], jax.Array],
        params: Any,
        preprocessing: Preprocessing,
        devices: Sequence[jax.Device],
        *,
        compiler_options: Mapping[str, str] | None = None,
        raw: bool = False,
        rows_each: int | None = None,
    ) -> None:
        self.params = params
        self._place(devices)
        self._rows_each = rows_each
        self._preprocessing = preprocessing
        self._compiler_options = dict(compiler_options or {})
        self._apply = apply if raw else functools.partial(_apply_normalized, apply, preprocessing)

    @functools.cached_property
    def jitted(self) -> Callable[[Any, jax.Array], jax.Array]:
        """The program: params and images `[B, H, W, C]` to logits `[B, K]`, both split over the devices."""
        return jax.jit(split_over(self._apply, self.mesh), compiler_options=self._compiler_options)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled and without devices, which can be neither copied nor pickled."""
        state = {name: value for name, value in vars(self).items() if name not in ("jitted", "mesh")}
        return state | {"params": jax.device_get(self.params), "ids": [device.id for device in self.mesh.devices.flat]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On the devices of the same numbers, or on all if there are none of these."""
        ids = state.pop("ids")
        present = jax.local_devices()
        self.__dict__.update(state)
        self._place([device for device in present if device.id in ids] or present)

    def _place(self, devices: Sequence[jax.Device]) -> None:
        self.mesh = data_mesh(devices)
        self.params = jax.device_put(self.params, NamedSharding(self.mesh, PartitionSpec()))

    def sharing(self, apply: Callable[[Any, jax.Array], jax.Array]) -> "Program":
        """Another function of the same params, on the same devices; they are not copied."""
        devices = tuple(self.mesh.devices.flat)
        return Program(apply, self.params, self._preprocessing, devices, compiler_options=self._compiler_options)

    def rows(self, images: int) -> int:
        """The rows of a batch that holds so many images: as many on each device."""
        devices = self.mesh.size
        return devices * (self._rows_each or -(-images // devices))

    def __call__(self, images: np.ndarray) -> jax.Array:
        """Dispatches a batch.

        Args:
          images: `[B, H, W, C]`, uint8 or normalized floats; B is a multiple of the number of devices.

        Returns:
          The logits `[B, K]`, before they are computed.
        """
        return self.jitted(self.params, jax.device_put(images, NamedSharding(self.mesh, PartitionSpec(AXIS))))


def split_over(apply: Callable[[Any, jax.Array], jax.Array], mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """A function of params and images that runs on each device of a mesh with its part of the images.

    Args:
      apply: a pure function of params and images.
      mesh: from `data_mesh`.
    """
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(apply, mesh=mesh, in_specs=(whole, split), out_specs=split)


def normalize(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """`Transform.normalize` in a program: equal to it up to rounding.

    Args:
      images: uint8 `[..., C]`.
      preprocessing: its mean and standard deviation, of C channels.

    Returns:
      float32 `[..., C]`.

    Example:
      >>> settings = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
      >>> normalize(jnp.full((1, 1, 1, 3), 255, jnp.uint8), settings).ravel()
      Array([1., 1., 1.], dtype=float32)
    """
    mean, std = (np.asarray(value, np.float32) for value in (preprocessing.mean, preprocessing.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def _apply_normalized(
    apply: Callable[[Any, jax.Array], jax.Array], preprocessing: Preprocessing, params: Any, images: jax.Array
) -> jax.Array:
    return apply(params, normalize(images, preprocessing) if images.dtype == jnp.uint8 else images)
