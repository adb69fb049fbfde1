"""What accelerators have and can do at most, from their makers' public tables.

Per device: a GPU, or a TPU chip. GB of a TPU's memory are 2**30 bytes, all else is decimal. Rates
of matrix units are dense, without sparsity. Sources:

- TPUs: docs.cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e), "System architecture"; links are half
  of "bidirectional inter-chip interconnect bandwidth", those of v4 six of 50 GB/s (Jouppi et al.,
  "TPU v4", ISCA 2023), those of v6e 3584 Gbit/s, the faster of two numbers that its table has had.
  How many bfloat16 passes a float32 product takes: `jax.lax.Precision`.
- GPUs: NVIDIA's data sheets of A100 (80 GB SXM), H100 (SXM), H200 (SXM) and HGX B200 for rates
  and NVLink (half of the total, which is of both directions); its driver's nvidia-smi for memory;
  its white papers on Ampere, Hopper and Blackwell for multiprocessors, clock and L2 cache; the CUDA
  C++ Programming Guide, "Technical Specifications per Compute Capability", for the rest.
"""

import dataclasses

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A device's limits.

    Attributes:
        name: as its maker has it.
        backend: 'gpu' or 'tpu'.
        peaks: {format: operations a second} of the fastest unit for products of such numbers.
        memory: bytes.
        bandwidth: bytes a second between it and its memory.
        cache: bytes of a cache in between, beyond what a compiled program says of its arrays.
        links: bytes a second that it can send to others of its machine (GPUs) or slice (TPUs).
        switch_adds: whether sums over devices can be made on the way, so that each sends once.
    """

    name: str
    backend: str
    peaks: dict[str, float]
    memory: int
    bandwidth: float
    links: float
    cache: int = 0
    switch_adds: bool = False

    def peak(self, dtype: str, precision: str) -> float:
        """Operations a second in products of arrays of such a dtype ('f32', 'bf16', ...).

        `precision` is 'default', 'high' or 'highest'.
        """
        if dtype == 'f64':
            return self.peaks.get('f64', self.peaks['bf16'])  # TPUs have none; they take longer
        if dtype != 'f32':
            return self.peaks['bf16']
        if self.backend == 'tpu':
            return self.peaks['bf16'] / {'default': 1, 'high': 3, 'highest': 6}[precision]
        return self.peaks['f32' if precision == 'highest' else 'tf32']


@dataclasses.dataclass(frozen=True)
class Gpu(Accelerator):
    """A GPU as XLA's compiler must know it.

    Attributes:
        cores: multiprocessors.
        units: float32 units of each.
        clock: boost, GHz.
        capability: compute capability, (major, minor).
        shared_memory: bytes of each multiprocessor, and of them for one block.
    """

    cores: int = 0
    units: int = 128
    clock: float = 0.0
    capability: tuple[int, int] = (0, 0)
    shared_memory: tuple[int, int] = (233472, 232448)

    def description(self) -> str:
        """A GpuTargetConfigProto of XLA as text, which stands for the device in its compiler."""
        major, minor = self.capability
        # From Hopper on there are instructions of that one architecture ('sm_90a').
        features = 'ACCELERATED_FEATURES' if major >= 9 else 'NONE'
        per_core, per_block = self.shared_memory
        return f"""
gpu_device_info {{
  name: "{self.name}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {self.cores}
  fpus_per_core: {self.units}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  memory_bandwidth: {self.bandwidth:.0f}
  l2_cache_size: {self.cache}
  shared_memory_per_core: {per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


def _tpu(name: str, bf16: float, memory: int, bandwidth: float, links: float) -> Accelerator:
    return Accelerator(name, 'tpu', {'bf16': bf16}, memory * GIB, bandwidth, links)


TPUS = {
    'v4': _tpu('TPU v4', 275e12, 32, 1.2e12, 300e9),
    'v5e': _tpu('TPU v5e', 197e12, 16, 819e9, 200e9),
    'v5p': _tpu('TPU v5p', 459e12, 95, 2.765e12, 600e9),
    'v6e': _tpu('TPU v6e', 918e12, 32, 1.638e12, 448e9),
}

_HOPPER = {'f64': 67e12, 'f32': 67e12, 'tf32': 494.7e12, 'bf16': 989.4e12}

GPUS = {
    'a100': Gpu(
        name='NVIDIA A100-SXM4-80GB',
        backend='gpu',
        peaks={'f64': 19.5e12, 'f32': 19.5e12, 'tf32': 156e12, 'bf16': 312e12},
        memory=81920 * MIB,
        bandwidth=2.039e12,
        links=300e9,
        cache=40 * MIB,
        cores=108,
        units=64,
        clock=1.41,
        capability=(8, 0),
        shared_memory=(167936, 166912),
    ),
    'h100': Gpu(
        name='NVIDIA H100 80GB HBM3',
        backend='gpu',
        peaks=_HOPPER,
        memory=81559 * MIB,
        bandwidth=3.35e12,
        links=450e9,
        cache=50 * MIB,
        switch_adds=True,
        cores=132,
        clock=1.98,
        capability=(9, 0),
    ),
    'h200': Gpu(
        name='NVIDIA H200',
        backend='gpu',
        peaks=_HOPPER,
        memory=143771 * MIB,
        bandwidth=4.8e12,
        links=450e9,
        cache=50 * MIB,
        switch_adds=True,
        cores=132,
        clock=1.98,
        capability=(9, 0),
    ),
    'b200': Gpu(
        name='NVIDIA B200',
        backend='gpu',
        peaks={'f64': 40e12, 'f32': 80e12, 'tf32': 1.1e15, 'bf16': 2.25e15},
        memory=183359 * MIB,
        bandwidth=8e12,
        links=900e9,
        cache=126 * MIB,
        switch_adds=True,
        cores=148,
        clock=1.965,
        capability=(10, 0),
    ),
}
