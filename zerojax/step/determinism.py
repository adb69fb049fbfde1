"""Determinism modes as XLA compiler options of one executable.

The options are attached to a jitted function, not to the process. They belong on the outermost jit
only.

CPU: both modes are deterministic. They switch off XLA's YNNPACK fusions: in jaxlib 0.10.2 to 0.11
these reduce a broadcast with a data race, so that the same executable returned different sums, and
give wrong results for some vmapped products (jax#39103). So whatever a number goes through is
compiled with `jit_in_mode`, never with `jax.jit` alone.
GPU: 'deterministic' has cuDNN and cuBLAS choose among plans that do not add by atomics, the first
and not the fastest of them, and makes scatters sequential (`xla_gpu_deterministic_ops`). Without
this option's own choice, at `xla_gpu_autotune_level=0` or, in some versions, under
`xla_gpu_exclude_nondeterministic_ops`, cuDNN's convolutions keep a default plan, which may add by
atomics: neither is set. Triton's products are off, since under the first option their code is left
without a configuration, and compilation fails (jaxlib 0.12).
Before the autotuner chooses, it looks up what it chose before for the same operation, in whatever
mode. On disk, in a folder that JAX's persistent compilation cache names to it: the mode takes it
away (and `zerojax.host.compilation_cache` in both modes, since JAX's own cache does not tell
programs apart by this option). In the process, where nothing keeps it out: so a process on a GPU
has programs of one mode only (`claim_process`).
TPU: executables are deterministic; no option is needed.
"""

from collections.abc import Callable
from typing import Any

import jax

MODES = ('deterministic', 'hardware')

CompilerOption = bool | int | str

_OPTIONS: dict[tuple[str, str], dict[str, CompilerOption]] = {
    ('cpu', 'deterministic'): {'xla_cpu_experimental_ynn_fusion_type': ''},
    ('cpu', 'hardware'): {'xla_cpu_experimental_ynn_fusion_type': ''},
    ('gpu', 'deterministic'): {
        'xla_gpu_deterministic_ops': True,
        'xla_gpu_enable_triton_gemm': False,
        'xla_gpu_per_fusion_autotune_cache_dir': '',
    },
    ('gpu', 'hardware'): {},
    ('tpu', 'deterministic'): {},
    ('tpu', 'hardware'): {},
}

_mode_on_gpu: str | None = None  # that of this process, once it has programs there


def compiler_options(mode: str, backend: str | None = None) -> dict[str, CompilerOption]:
    """XLA options that put `mode` into force, for `jax.jit(..., compiler_options=...)`.

    Args:
        mode: 'deterministic' or 'hardware'.
        backend: 'cpu', 'gpu' or 'tpu'; by default the one that JAX runs on.

    Raises:
        ValueError: an unknown mode, or a backend for which the mode is not known to hold.
    """
    backend = backend or jax.default_backend()
    if mode not in MODES:
        raise ValueError(f'mode={mode!r}: must be one of {", ".join(MODES)}')
    if (backend, mode) not in _OPTIONS:
        raise ValueError(f'mode={mode!r}: not known how to grant it on backend {backend!r}')
    return dict(_OPTIONS[backend, mode])


def check_supported(mode: str) -> None:
    """Compiles a trivial function under the mode's options on JAX's backend.

    Raises:
        ValueError: the installed jaxlib does not know an option, so the mode cannot be granted.
    """
    for option, value in compiler_options(mode).items():
        try:
            jax.jit(lambda x: x, compiler_options={option: value}).lower(0).compile()
        except Exception as error:
            if option not in str(error):
                raise
            raise ValueError(
                f'mode={mode!r}: jaxlib {jax.lib.__version__} does not take {option}={value!r}'
            ) from error


def check_process(mode: str) -> None:
    """Raises ValueError if this process has programs of another mode on a GPU."""
    if jax.default_backend() == 'gpu' and _mode_on_gpu not in (None, mode):
        raise ValueError(
            f'mode={mode!r}: this process has GPU programs of mode {_mode_on_gpu!r}, and XLA would '
            'take the kernels that it chose for them; it needs a process of its own, such as the '
            'same command started again'
        )


def claim_process(mode: str) -> None:
    """Makes the mode that of this process, on a GPU.

    Raises:
        ValueError: as `check_process`.
    """
    global _mode_on_gpu
    check_process(mode)
    if jax.default_backend() == 'gpu':
        _mode_on_gpu = mode


def jit_in_mode(
    function: Callable[..., Any], mode: str, *, backend: str | None = None, **kwargs: Any
) -> Any:
    """`jax.jit` with the mode's compiler options on a backend; other arguments are passed on.

    With a backend that is named, it is for a device that is not here, and claims no process.

    Raises:
        ValueError: as `compiler_options` and `claim_process`.
    """
    if backend is None:
        claim_process(mode)
    return jax.jit(function, compiler_options=compiler_options(mode, backend), **kwargs)


def jit_without_products(function: Callable[..., Any]) -> Any:
    """`jit_in_mode` for functions without products and convolutions, in a process of any mode.

    Nothing is chosen for them by time.
    """
    return jax.jit(function, compiler_options=compiler_options('deterministic'))
