"""Both sides of a comparison with timm, on a CPU or a GPU: what is called, and how it is timed."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import dpn_jax
from convert.timm_import import create_timm_model
from dpn_jax.pretrained import get_config

Task = Literal["inference", "training"]
Dtype = Literal["float32", "bfloat16"]

CALLS = 3
"""Calls in a row that make a turn: a loop calls again and again, and the first call after another contender's turn is
slower (docs/performance.md, "A training step")."""


class Contender(NamedTuple):
    """One way to do a task."""

    call: Callable[[], object]
    """Does it once, and returns when it is done."""
    cost: Callable[[], dict[str, float]] = dict
    """Bytes that it moves and memory that it takes at most, after a call, where that is known."""


class Timing(NamedTuple):
    """How long a contender takes."""

    first_s: float
    """The first call, which compiles."""
    median_s: float
    """The median of the timed calls."""


def race(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Timing]:
    """Times every contender in turns of `CALLS`, so that whatever else the machine does meets all of them alike."""
    first, times = {}, {label: [] for label in contenders}
    for label, contender in contenders.items():
        first[label] = _timed(contender.call)
        _timed(contender.call)
    for _ in range(rounds):
        for label, contender in contenders.items():
            times[label] += [_timed(contender.call) for _ in range(CALLS)]
    return {label: Timing(first[label], float(np.median(times[label]))) for label in contenders}


def ours(
    name: str, task: Task, images: np.ndarray, *, dtype: Dtype = "float32", plain: bool = False
) -> dict[str, Contender]:
    """Our side: the fast formulation and, if asked for, the plain one beside it.

    A training step is forward, backward and plain SGD in training mode, in `dtype` with float32 parameters.
    """
    model = dpn_jax.create_model(name, dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.asarray(images, dtype)
    forms: dict[str, Callable[..., jax.Array]] = {"dpn_jax": dpn_jax.fast_apply}
    if task == "inference":
        model.eval()
        forward = dpn_jax.fast_forward(model)
        contenders = {"dpn_jax": _compiled(forward.jitted, forward.params, x)}
        if plain:
            structure, state = nnx.split(model)
            run = jax.jit(lambda state, x: nnx.merge(structure, state)(x))
            contenders["dpn_jax plain"] = _compiled(run, state, x)
        return contenders
    if plain:
        forms["dpn_jax plain"] = lambda model, x: model(x)
    return {label: _training_step(model, x, form) for label, form in forms.items()}


def timms(
    name: str,
    task: Task,
    images: np.ndarray,
    *,
    device: str = "cpu",
    dtype: Dtype = "float32",
    formats: Sequence[str] = ("eager", "channels_last"),
    compile_modes: Sequence[str] = (),
) -> dict[str, Contender]:
    """timm's side: eager in each memory format, and `torch.compile` in each mode (channels_last on a GPU)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
    contenders = {}
    for label in (*formats, *(f"compile {mode}" for mode in compile_modes)):
        compiled = label.startswith("compile")
        channels_last = label == "channels_last" or (compiled and device != "cpu")
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = create_timm_model(get_config(name)).to(device, memory_format=memory_format)
        model = model.eval().to(getattr(torch, dtype)) if task == "inference" else model.train()
        run = torch.compile(model, mode=label.removeprefix("compile ")) if compiled else model
        kept = x.to(getattr(torch, dtype)) if task == "inference" else x
        call = _torch_call(run, model, task, kept.contiguous(memory_format=memory_format), dtype)
        contenders[f"timm {label}"] = _on_device(call, device)
    return contenders


def _compiled(run: Callable[..., object], *arguments: object) -> Contender:
    def cost() -> dict[str, float]:
        compiled = run.lower(*arguments).compile()
        memory = compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return {"bytes": compiled.cost_analysis().get("bytes accessed", float("nan")), "peak": peak}

    return Contender(lambda: jax.block_until_ready(run(*arguments)), cost)


def _training_step(model: dpn_jax.DPN, x: jax.Array, form: Callable[..., jax.Array]) -> Contender:
    structure, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State, rest: nnx.State) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(structure, params, rest, copy=True)  # its statistics will change
        value = -jax.nn.log_softmax(form(model, x).astype(jnp.float32))[:, 0].mean()
        return value, nnx.state(model, nnx.Not(nnx.Param))

    @functools.partial(jax.jit, compiler_options=dpn_jax.compiler_options())
    def step(params: nnx.State, rest: nnx.State) -> tuple[nnx.State, nnx.State]:
        gradients, rest = jax.grad(loss, has_aux=True)(params, rest)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients), rest

    return _compiled(step, params, rest)


def _torch_call(
    run: Callable[..., torch.Tensor], model: torch.nn.Module, task: Task, x: torch.Tensor, dtype: Dtype
) -> Callable[[], object]:
    if task == "inference":

        def call() -> object:
            with torch.inference_mode():
                return run(x)

        return call
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(run(x), labels)
        loss.backward()
        return optimizer.step()

    return step


def _on_device(call: Callable[[], object], device: str) -> Contender:
    if device == "cpu":
        return Contender(call)

    def synchronized() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    def cost() -> dict[str, float]:
        torch.cuda.reset_peak_memory_stats()
        synchronized()
        return {"peak": torch.cuda.max_memory_allocated()}

    return Contender(synchronized, cost)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
