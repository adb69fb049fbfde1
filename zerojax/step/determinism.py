"""Determinism modes as XLA compiler options of one executable.

The options are attached to a jitted function, not to the process, so deterministic and ordinary
executables can live side by side. They belong on the outermost jit only.

CPU: both modes are deterministic. They switch off XLA's YNNPACK fusions: in jaxlib 0.10.2 to 0.11
these reduce a broadcast with a data race, so that the same executable returned different sums, and
give wrong results for some vmapped products (jax#39103). So whatever a number goes through is
compiled with `jit_in_mode`, never with `jax.jit` alone.
GPU: 'deterministic' has cuDNN and cuBLAS choose among plans that do not add by atomics, the first
and not the fastest of them, and makes scatters sequential (`xla_gpu_deterministic_ops`). But before
XLA's autotuner chooses, it looks up what it chose before for the same operation, by time and in
whatever mode: on disk, in the folder that JAX's persistent compilation cache names to it, which the
mode therefore empties; and in the process, where nothing keeps it out, so a process that has
programs of mode 'hardware' is refused deterministic ones (`check_process`). Without
this option's own choice, at `xla_gpu_autotune_level=0` or, in some versions, under
`xla_gpu_exclude_nondeterministic_ops`, cuDNN's convolutions keep a default plan, which may add by
atomics: neither is set. Triton's products are off, since under the first option their code is left
without a configuration, and compilation fails (jaxlib 0.12).
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

_hardware_on_gpu = False  # whether this process has such programs


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
        ValueError: the installed jaxlib does not know an option, or as `check_process`, so the mode
            cannot be granted.
    """
    check_process(mode)
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
    """Checks that this process can grant the mode.

    Raises:
        ValueError: `mode` is 'deterministic', and `jit_in_mode` was called for 'hardware' before,
            on a GPU, whose kernels, chosen by time, XLA would take again.
    """
    if mode == 'deterministic' and _hardware_on_gpu:
        raise ValueError(
            "mode='deterministic': this process has GPU programs of mode 'hardware', and XLA takes "
            'the kernels that it chose for them by time; use a process of its own (a command that '
            'is started again is one)'
        )


def jit_in_mode(
    function: Callable[..., Any], mode: str, *, backend: str | None = None, **kwargs: Any
) -> Any:
    """`jax.jit` with the mode's compiler options on a backend; other arguments are passed on."""
    global _hardware_on_gpu
    if mode == 'hardware' and backend is None and jax.default_backend() == 'gpu':
        _hardware_on_gpu = True
    return jax.jit(function, compiler_options=compiler_options(mode, backend), **kwargs)
