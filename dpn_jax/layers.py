"""The building blocks: convolution, norm with activation, pooling. Everything is `[B, H, W, C]`.

The functions that they use are `operations`, plain `jax.lax` by default; see there also for what a map *in parts* is.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dpn_jax.operations import PLAIN, Features, Operations, at_least_float32, split_channels

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nnx.relu, "silu": nnx.silu}


class Conv(nnx.Module):
    """A 2-D convolution that pads `dilation * (kernel_size // 2)` on every side.

    Args:
      in_channels, out_channels: channels read and written.
      kernel_size: side of the square kernel, odd.
      stride, dilation: pixels from one output to the next, and from one tap of the kernel to the next.
      groups: groups of channels that do not mix.
      use_bias: adds a bias.
      operations: the functions to use.
      dtype: dtype of the arithmetic and the result.
      param_dtype: dtype of the parameters.
      rngs: source of the initial values, `U(-1/sqrt(fan_in), 1/sqrt(fan_in))` as in torch; None leaves
        the parameters abstract (`jax.ShapeDtypeStruct`), to be filled in on loading.

    Source: `torch.nn.Conv2d.reset_parameters`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        operations: Operations = PLAIN,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        kernel_shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(jax.ShapeDtypeStruct(kernel_shape, param_dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((out_channels,), param_dtype)) if use_bias else None
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.groups = groups
        self.operations = operations
        self.dtype = jnp.dtype(dtype)
        initialize(self, rngs)

    def __call__(self, x: Features) -> jax.Array:
        """Maps `[B, H, W, in_channels]`, whole or in parts, to `[B, H', W', out_channels]`."""
        x = jax.tree.map(lambda part: part.astype(self.dtype), x)
        kernel = self.kernel[...].astype(self.dtype)
        y = self.operations.convolve(x, kernel, stride=self.stride, dilation=self.dilation, groups=self.groups)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def set_view(self, operations: Operations | None = None) -> None:
        """For `nnx.view`: other operations."""
        self.operations = operations or self.operations


class NormAct(nnx.Module):
    """Batch norm, then an activation, with torch's conventions.

    In training it normalizes with the batch's biased variance and moves the running variance toward the unbiased one,
    as torch does (Flax's BatchNorm moves it toward the biased one). Statistics are computed in at least float32.

    Args:
      channels: channels normalized.
      activation: 'relu' or 'silu'.
      epsilon: added to the variance; every DPN uses 1e-3.
      momentum: share of the old running statistics kept at a training step; torch's momentum 0.1 is 0.9 here.
      operations: the functions to use.
      dtype: dtype of the result.
      param_dtype: dtype of the scale, the bias and the running statistics.
      rngs: None leaves the parameters abstract, as in `Conv`; nothing here is random.

    Source: `timm.layers.norm_act.BatchNormAct2d`, `torch.nn.BatchNorm2d`.
    """

    def __init__(
        self,
        channels: int,
        *,
        activation: str = "relu",
        epsilon: float = 1e-3,
        momentum: float = 0.9,
        operations: Operations = PLAIN,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        vector = jax.ShapeDtypeStruct((channels,), param_dtype)
        self.scale = nnx.Param(vector)
        self.bias = nnx.Param(vector)
        self.mean = nnx.BatchStat(vector)
        self.var = nnx.BatchStat(vector)
        # torch's num_batches_tracked: not used, but kept for converting back to timm
        self.steps = nnx.BatchStat(jax.ShapeDtypeStruct((), jnp.int32))
        self.activation = activation
        self.epsilon = epsilon
        self.momentum = momentum
        self.operations = operations
        self.dtype = jnp.dtype(dtype)
        self.use_running_average = False  # switched by model.train() and model.eval()
        initialize(self, rngs)

    def __call__(self, x: Features) -> Features:
        """Normalizes and activates `x`, whole or in parts.

        Raises:
          ValueError: training on a single value per channel, whose variance is not defined.
        """
        parts, structure = jax.tree.flatten(x)
        options = {"epsilon": self.epsilon, "batch_stats": not self.use_running_average}
        normalize = functools.partial(self.operations.normalize, **options)
        activate = ACTIVATIONS[self.activation]
        outputs = [
            activate(normalize(part, *vectors)).astype(self.dtype)
            for part, vectors in zip(parts, self.vectors(x), strict=True)
        ]
        return jax.tree.unflatten(structure, outputs)

    def vectors(self, x: Features) -> list[tuple[jax.Array, ...]]:
        """What each part of `x` is normalized with: mean, variance, scale and bias, `[C]`, in at least float32.

        In training they are the batch's, and the running ones move.

        Raises:
          ValueError: as for a call.
        """
        parts = jax.tree.leaves(x)
        mean, var = self.running_statistics() if self.use_running_average else self._batch_statistics(parts)
        vectors = (mean, var, self.scale[...].astype(mean.dtype), self.bias[...].astype(mean.dtype))
        return list(zip(*(split_channels(vector, x) for vector in vectors), strict=True))

    def set_view(self, use_running_average: bool | None = None, operations: Operations | None = None) -> None:
        """For `nnx.view`.

        Args:
          use_running_average: normalize with the running statistics and keep them.
          operations: the functions to use.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        self.operations = operations or self.operations

    def running_statistics(self) -> tuple[jax.Array, jax.Array]:
        """The running mean and variance, `[C]` each, in at least float32."""
        dtype = at_least_float32(self.mean.dtype)
        return self.mean[...].astype(dtype), self.var[...].astype(dtype)

    def _batch_statistics(self, parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        count = parts[0].size // parts[0].shape[-1]
        if count < 2:
            raise ValueError(f"training needs more than one value per channel, got features of {parts[0].shape}")
        guesses = split_channels(self.running_statistics()[0], tuple(parts))
        of_parts = (
            self.operations.moments(part, guess.astype(at_least_float32(part.dtype)))
            for part, guess in zip(parts, guesses, strict=True)
        )
        mean, var = map(jnp.concatenate, zip(*of_parts, strict=True))
        self._move_running(self.mean, mean)
        self._move_running(self.var, var * (count / (count - 1)))
        self.steps.set_value(self.steps[...] + 1)
        return mean, var

    def _move_running(self, running: nnx.BatchStat, value: jax.Array) -> None:
        value = lax.stop_gradient(value).astype(running.dtype)
        # not `running[...] = `: that asks a tracer for its sharding, which takes Flax half a minute per network
        running.set_value(self.momentum * running[...] + (1 - self.momentum) * value)


class NormActConv(nnx.Module):
    """Norm, activation, convolution: DPN's pre-activation unit, timm's `BnActConv2d`.

    Args:
      in_channels, out_channels, kernel_size, stride, dilation, groups: as for `Conv`.
      norm: a class such as `NormAct`.
      options: `operations`, `dtype`, `param_dtype` and `rngs` of both.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: Callable[..., nnx.Module] = NormAct,
        **options: Any,
    ) -> None:
        self.norm = norm(in_channels, **options)
        options |= {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "groups": groups}
        self.conv = Conv(in_channels, out_channels, **options)

    def __call__(self, x: Features) -> jax.Array:
        """Maps `[B, H, W, in_channels]`, whole or in parts, to `[B, H', W', out_channels]`."""
        return self.conv(self.norm(x))


_deferred = contextvars.ContextVar("deferred", default=False)


@contextlib.contextmanager
def initialized_together(module: nnx.Module, rngs: nnx.Rngs | None) -> Iterator[None]:
    """Keeps every `Conv` and `NormAct` abstract, and calls `initialize` on `module` at the end of the outermost one.

    So one program draws a whole network's parameters: compiling a random draw for each shape takes half a minute for a
    DPN-92. Modules of other kinds take their values from `rngs` at once.
    """
    outer = _deferred.get()
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)
    if not outer:
        initialize(module, rngs)


def initialize(module: nnx.Module, rngs: nnx.Rngs | None) -> None:
    """Initializes every abstract variable of the `Conv` and `NormAct` modules in a module, in one compiled program.

    Args:
      module: changed in place; existing values are kept.
      rngs: its stream `params` is drawn from once; None leaves the module as it is.

    Source: `torch.nn.Conv2d.reset_parameters`, `torch.nn.BatchNorm2d.reset_parameters`.
    """
    if rngs is None or _deferred.get():
        return
    drawn: list[tuple[nnx.Variable, tuple[float, float]]] = []
    for _, submodule in nnx.iter_modules(module):
        if isinstance(submodule, Conv):
            limit = math.prod(submodule.kernel.shape[:3]) ** -0.5
            drawn += [
                (variable, (-limit, limit)) for variable in (submodule.kernel, submodule.bias) if variable is not None
            ]
        elif isinstance(submodule, NormAct):
            drawn += [(variable, (1, 1)) for variable in (submodule.scale, submodule.var)]
            drawn += [(variable, (0, 0)) for variable in (submodule.bias, submodule.mean, submodule.steps)]
    drawn = [(variable, bounds) for variable, bounds in drawn if isinstance(variable.get_value(), jax.ShapeDtypeStruct)]
    if not drawn:
        return
    shapes = tuple(jax.ShapeDtypeStruct(variable.shape, variable.dtype) for variable, _ in drawn)
    values = _uniform(rngs.params(), shapes, tuple(bounds for _, bounds in drawn))
    for (variable, _), value in zip(drawn, values, strict=True):
        variable.set_value(value)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniform(
    key: jax.Array, shapes: tuple[jax.ShapeDtypeStruct, ...], bounds: tuple[tuple[float, float], ...]
) -> list[jax.Array]:
    """Arrays of the shapes and dtypes given, uniform between their bounds."""
    sizes = [0 if low == high else shape.size for shape, (low, high) in zip(shapes, bounds, strict=True)]
    drawn = [shape.dtype for shape, size in zip(shapes, sizes, strict=True) if size]
    dtype = at_least_float32(max(drawn, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32)))
    shares = jnp.split(jax.random.uniform(key, (sum(sizes),), dtype), np.cumsum(sizes)[:-1].tolist())
    return [
        (low + share.reshape(shape.shape) * (high - low)).astype(shape.dtype)
        if low < high
        else jnp.full(shape.shape, low, shape.dtype)
        for shape, (low, high), share in zip(shapes, bounds, shares, strict=True)
    ]


def global_pool(x: jax.Array, pool: str) -> jax.Array:
    """Pools `[B, H, W, C]` over the image.

    Args:
      x: the features.
      pool: 'avg', 'max', 'avgmax' (their mean), 'catavgmax' (both, concatenated along the channels) or '' (as it is).

    Returns:
      `[B, 1, 1, C]`, `[B, 1, 1, 2 C]` for 'catavgmax', or `x` itself for ''.

    Source: `timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d`.
    """
    if not pool:
        return x
    average = x.mean(axis=(1, 2), keepdims=True)
    if pool == "avg":
        return average
    maximum = x.max(axis=(1, 2), keepdims=True)
    if pool == "max":
        return maximum
    if pool == "avgmax":
        return 0.5 * (average + maximum)
    return jnp.concatenate([average, maximum], axis=-1)


def window_average(x: jax.Array, window: int) -> jax.Array:
    """Averages `[B, H, W, C]` over every full `window` x `window` square, at stride 1 and without padding.

    Raises:
      ValueError: the window does not fit into the image.
    """
    if min(x.shape[1:3]) < window:
        raise ValueError(f"test_time_pool is {window} but the features are only {x.shape[1]}x{x.shape[2]}")
    total = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, window, window, 1), (1, 1, 1, 1), ((0, 0),) * 4)
    return total / window**2
