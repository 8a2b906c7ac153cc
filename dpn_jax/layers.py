"""The building blocks: convolution, norm with activation, and pooling. Everything is `[B, H, W, C]`.

A *part* is one of several tensors that together are one feature map, split along the channels. Norms and convolutions
take a map whole or in parts, so that the residual and the dense path of a block are never concatenated just to be read.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dpn_jax.fast.grouped import Lanes as Lanes
from dpn_jax.fast.grouped import Merged as Merged
from dpn_jax.fast.grouped import Native as Native
from dpn_jax.fast.grouped import at_least_float32, convolve, fenced, sum_by_product
from dpn_jax.fast.grouped import grouped_conv as grouped_conv

Features = TypeVar("Features", bound=jax.Array | tuple[jax.Array, ...])
"""A feature map `[B, H, W, C]`, or a tuple of parts whose channels add up to C."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nnx.relu, "silu": nnx.silu}


class Conv(nnx.Module):
    """A 2-D convolution that pads `kernel_size // 2` on every side.

    Args:
      in_channels, out_channels: channels read and written.
      kernel_size: side of the square kernel, odd.
      stride: step in both directions.
      groups: groups of channels that do not mix.
      use_bias: adds a bias.
      dtype: dtype of the arithmetic and the result.
      param_dtype: dtype of the parameters.
      rngs: source of the initial values, `U(-1/sqrt(fan_in), 1/sqrt(fan_in))` for kernel and bias as in torch. None
        leaves the parameters abstract (`jax.ShapeDtypeStruct`), for loaded ones to be put in.

    Source: `torch.nn.Conv2d.reset_parameters`, `timm.layers.padding.get_padding`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        kernel_shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(jax.ShapeDtypeStruct(kernel_shape, param_dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((out_channels,), param_dtype)) if use_bias else None
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = groups
        self.dtype = jnp.dtype(dtype)
        # how it is written; `fast.fast_apply` sets what the backend runs best
        self.formulation = Native()
        self.matmul = False
        initialize(self, rngs)

    def __call__(self, x: Features) -> jax.Array:
        """Maps `[B, H, W, in_channels]`, whole or in parts, to `[B, H', W', out_channels]`."""
        kernel = self.kernel[...].astype(self.dtype)
        if self.groups > 1:
            kernel = self.formulation.arrange(kernel, self.groups)
            y = self.formulation.apply(x.astype(self.dtype), kernel, stride=self.stride)
        elif self.matmul:
            # one product; a sum of two would be added up again by each loop that reads it
            whole = jnp.concatenate([part.astype(self.dtype) for part in jax.tree.leaves(x)], axis=-1)
            y = convolve(whole, kernel, stride=self.stride, matmul=True)
        else:
            # over parts, the convolution is the sum of one convolution a part, each on its slice of the kernel
            y = functools.reduce(
                jnp.add,
                (
                    convolve(part.astype(self.dtype), kernel_of_part, stride=self.stride)
                    for part, kernel_of_part in zip(jax.tree.leaves(x), split_channels(kernel, x, axis=2), strict=True)
                ),
            )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class NormAct(nnx.Module):
    """Batch norm, then an activation, with torch's conventions.

    In training it normalizes with the batch's biased variance and moves the running variance towards the unbiased one,
    as torch does (Flax's BatchNorm moves it towards the biased one). The variance takes two passes: `E[x^2] - E[x]^2`
    can come out negative. Statistics are computed in float32 at least.

    Args:
      channels: channels normalized.
      activation: 'relu' or 'silu'.
      epsilon: added to the variance; every DPN uses 1e-3.
      momentum: share of the old running statistics kept at a training step; torch's momentum 0.1 is 0.9 here.
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
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        vector = jax.ShapeDtypeStruct((channels,), param_dtype)
        self.scale = nnx.Param(vector)
        self.bias = nnx.Param(vector)
        self.mean = nnx.BatchStat(vector)
        self.var = nnx.BatchStat(vector)
        # torch's num_batches_tracked: not used, but kept for the way back
        self.steps = nnx.BatchStat(jax.ShapeDtypeStruct((), jnp.int32))
        self.activation = activation
        self.epsilon = epsilon
        self.momentum = momentum
        self.dtype = jnp.dtype(dtype)
        self.use_running_average = False  # switched by model.train() and model.eval()
        # how it is differentiated; `fast.fast_apply` sets what the backend runs best
        self.matmul = False
        initialize(self, rngs)

    def __call__(self, x: Features) -> Features:
        """Normalizes and activates `x`, whole or in parts.

        Raises:
          ValueError: training on a single value per channel, whose variance is not defined.
        """
        parts, structure = jax.tree.flatten(x)
        own = not self.use_running_average
        mean, var = self._batch_statistics(parts) if own else self.running_statistics()
        vectors = (mean, var, self.scale[...].astype(mean.dtype), self.bias[...].astype(mean.dtype))
        vectors_of_parts = zip(*(split_channels(vector, x) for vector in vectors), strict=True)
        normalize = functools.partial(_normalize_matmul if self.matmul else _normalize, self.epsilon, own)
        activate = ACTIVATIONS[self.activation]
        outputs = [
            activate(normalize(part.astype(mean.dtype), *vectors)).astype(self.dtype)
            for part, vectors in zip(parts, vectors_of_parts, strict=True)
        ]
        return jax.tree.unflatten(structure, outputs)

    def running_statistics(self) -> tuple[jax.Array, jax.Array]:
        """The running mean and variance, `[C]` each, in float32 at least."""
        dtype = at_least_float32(self.mean.dtype)
        return self.mean[...].astype(dtype), self.var[...].astype(dtype)

    def _batch_statistics(self, parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        count = parts[0].size // parts[0].shape[-1]
        if count < 2:
            raise ValueError(f"training needs more than one value per channel, got features of {parts[0].shape}")
        means, variances = [], []
        for part in parts:
            part = part.astype(at_least_float32(part.dtype))
            if self.matmul:
                part = lax.stop_gradient(part)  # `_normalize_matmul` knows how they depend on it
            means.append(channel_sum(part, matmul=self.matmul) / count)
            variances.append(channel_sum(jnp.square(part - means[-1]), matmul=self.matmul) / count)
        mean, var = jnp.concatenate(means), jnp.concatenate(variances)
        self._move_running(self.mean, mean)
        self._move_running(self.var, var * (count / (count - 1)))
        self.steps.set_value(self.steps[...] + 1)
        return mean, var

    def _move_running(self, running: nnx.BatchStat, value: jax.Array) -> None:
        value = lax.stop_gradient(value).astype(running.dtype)
        # not `running[...] = `: that asks a tracer for its sharding, which takes Flax half a minute a network
        running.set_value(self.momentum * running[...] + (1 - self.momentum) * value)


class NormActConv(nnx.Module):
    """Norm, activation, convolution: DPN's pre-activation unit, timm's `BnActConv2d`. Arguments as for `Conv`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.norm = NormAct(in_channels, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv = Conv(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            groups=groups,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Features) -> jax.Array:
        """Maps `[B, H, W, in_channels]`, whole or in parts, to `[B, H', W', out_channels]`."""
        return self.conv(self.norm(x))


def _normalize(
    epsilon: float, own: bool, x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Batch norm of one part; `own` tells that mean and variance are those of `x`."""
    # scaling the centerd values, not shifting the scaled ones, keeps the digits where mean >> standard deviation
    return (x - mean) * (scale * lax.rsqrt(var + epsilon)) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize_matmul(
    epsilon: float, own: bool, x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """The same with a gradient of its own: two sums over the pixels, where autodiff takes five. With `own` all of the
    gradient goes to `x`, and none to mean and variance.

    What is one number a channel is computed apart (`fenced`), not once more for each pixel.
    """
    return _normalize_forward(epsilon, own, x, mean, var, scale, bias)[0]


def _normalize_forward(
    epsilon: float, own: bool, x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    mean, bias, scale, root, gain = fenced(_forward_vectors, epsilon=epsilon)(mean, var, scale, bias)
    return (x - mean) * gain + bias, (x, mean, scale, root, gain)


def _normalize_backward(
    epsilon: float, own: bool, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    x, mean, scale, root, gain = kept
    centerd = x - mean
    of_bias = channel_sum(gradient, matmul=True)
    of_gain = channel_sum(gradient * centerd, matmul=True)
    vectors = fenced(_backward_vectors, count=x.size // x.shape[-1])(of_bias, of_gain, scale, root)
    of_mean, of_var, constant, slope, of_scale, of_bias = vectors
    of_x = gradient * gain
    if own:
        of_x = of_x + (constant + centerd * slope)
        of_mean, of_var = jnp.zeros_like(mean), jnp.zeros_like(mean)
    return of_x, of_mean, of_var, of_scale, of_bias


def _forward_vectors(
    mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float
) -> tuple[jax.Array, ...]:
    root = lax.rsqrt(var + epsilon)
    return mean, bias, scale, root, scale * root


def _backward_vectors(
    of_bias: jax.Array, of_gain: jax.Array, scale: jax.Array, root: jax.Array, *, count: int
) -> tuple[jax.Array, ...]:
    of_mean = -of_bias * scale * root
    of_var = of_gain * scale * -0.5 * root**3
    return of_mean, of_var, of_mean / count, of_var * (2 / count), of_gain * root, of_bias


_normalize_matmul.defvjp(_normalize_forward, _normalize_backward)


def channel_sum(x: jax.Array, *, matmul: bool = False) -> jax.Array:
    """Sums `[B, H, W, C]` over all but the channels.

    Args:
      x: the features.
      matmul: up to eight pixels at a time in one loop, then a product with ones. On a CPU it is up to 20 times as fast,
        as XLA sums a matrix's columns one by one.
    """
    if not matmul:
        return x.sum(axis=(0, 1, 2))
    batch, height, width, channels = x.shape
    # few enough to be written out: fused with what computes `x`, which is then never in memory as a whole
    together = next(n for n in range(8, 0, -1) if height * width % n == 0)
    pixels = x.reshape(batch, -1, together, channels)
    sums = functools.reduce(jnp.add, (pixels[:, :, pixel] for pixel in range(together)))
    return sum_by_product(sums, axes=2)


def initialize(module: nnx.Module, rngs: nnx.Rngs | None) -> None:
    """Gives the parameters of every `Conv` and `NormAct` in a module their initial values.

    One program makes them all: compiling a random draw for each shape takes half a minute for a DPN-92.

    Args:
      module: its parameters are overwritten; they may be abstract.
      rngs: its stream `params` is drawn from once; None leaves the module as it is.

    Source: `torch.nn.Conv2d.reset_parameters`, `torch.nn.BatchNorm2d.reset_parameters`.
    """
    if rngs is None:
        return
    variables: list[nnx.Variable] = []
    bounds: list[tuple[float, float]] = []
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Conv):
            limit = math.prod(part.kernel.shape[:3]) ** -0.5
            drawn = [part.kernel] if part.bias is None else [part.kernel, part.bias]
            variables += drawn
            bounds += [(-limit, limit)] * len(drawn)
        elif isinstance(part, NormAct):
            variables += [part.scale, part.bias, part.mean, part.var, part.steps]
            bounds += [(1, 1), (0, 0), (0, 0), (1, 1), (0, 0)]
    shapes = tuple(jax.ShapeDtypeStruct(variable.shape, variable.dtype) for variable in variables)
    for variable, value in zip(variables, _uniform(rngs.params(), shapes, tuple(bounds)), strict=True):
        variable.set_value(value)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniform(
    key: jax.Array, shapes: tuple[jax.ShapeDtypeStruct, ...], bounds: tuple[tuple[float, float], ...]
) -> list[jax.Array]:
    """Arrays of the shapes and dtypes given, uniform between their bounds."""
    sizes = [0 if low == high else shape.size for shape, (low, high) in zip(shapes, bounds, strict=True)]
    dtype = at_least_float32(max((shape.dtype for shape in shapes), key=lambda dtype: dtype.itemsize))
    shares = jnp.split(jax.random.uniform(key, (sum(sizes),), dtype), np.cumsum(sizes)[:-1].tolist())
    return [
        (low + share.reshape(shape.shape) * (high - low)).astype(shape.dtype)
        if low < high
        else jnp.full(shape.shape, low, shape.dtype)
        for shape, (low, high), share in zip(shapes, bounds, shares, strict=True)
    ]


def split_channels(array: jax.Array, like: Features, axis: int | None = -1) -> list[jax.Array]:
    """Slices `array` along `axis` as the parts of `like` slice the channels; `None` leaves it whole."""
    parts = jax.tree.leaves(like)
    if axis is None or len(parts) == 1:
        return [array]
    ends, end = [], 0
    for part in parts[:-1]:
        end += part.shape[-1]
        ends.append(end)
    return jnp.split(array, ends, axis=axis)


@jax.custom_vjp
def fork(x: Features) -> tuple[Features, Features]:
    """A map twice, for two readers, whose gradients are added where XLA's CPU compiler cannot fuse the sum.

    Left to itself it computes the gradient of the residual path anew in each block, from those of all blocks behind.
    """
    return x, x


def _fork_forward(x: Features) -> tuple[tuple[Features, Features], None]:
    return (x, x), None


def _fork_backward(_: None, gradients: tuple[Features, Features]) -> tuple[Features]:
    return (fenced(_add_trees)(*gradients),)


def _add_trees(x: Features, y: Features) -> Features:
    return jax.tree.map(jnp.add, x, y)


fork.defvjp(_fork_forward, _fork_backward)


def max_pool(x: jax.Array) -> jax.Array:
    """The stem's 3x3 maximum at stride 2; pads with -inf, so that a border of negative values stays negative."""
    return lax.platform_dependent(x, cpu=_shifted_max_pool, default=_window_max_pool)


def _window_max_pool(x: jax.Array) -> jax.Array:
    # the constants are numpy's: reduce_window is only differentiable where it can see that they are -inf and 0
    return lax.reduce_window(
        x, np.asarray(-np.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )


def _shifted_max_pool(x: jax.Array) -> jax.Array:
    """The maximum of nine shifted maps: one loop, where XLA's reduce_window on a CPU is many."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    shifted = (x[:, dy : dy + height : 2, dx : dx + width : 2] for dy in range(3) for dx in range(3))
    return functools.reduce(jnp.maximum, shifted)


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
