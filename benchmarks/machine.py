"""What a result depends on beside the code: the machine and the versions of packages."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from llvmlite import binding

# LLVM's name and Linux's name of the instruction sets that matter here, the most capable first.
INSTRUCTION_SETS = {
    "amx-bf16": "amx_bf16",
    "avx512bf16": "avx512_bf16",
    "avx512vnni": "avx512_vnni",
    "avx512f": "avx512f",
    "avx2": "avx2",
    "sve": "sve",
    "neon": "neon",
}
PACKAGES = ("torch", "numba", "triton", "transformers", "scipy", "gated-state-spaces-pytorch")


@dataclass(frozen=True)
class Machine:
    """The device that a benchmark ran on; it has no host name.

    Args:
        processor: name of the processor, as the system gives it.
        family: LLVM's name of a processor's microarchitecture, such as `znver4`; a GPU's name in lower case.
        instruction_sets: those of `INSTRUCTION_SETS` that the processor has; a GPU's compute capability.
        cores: cores of the CPU that are in use; multiprocessors of a GPU.
        memory_gib: memory of the machine, or of the GPU.
    """

    processor: str
    family: str
    instruction_sets: list[str]
    cores: int
    memory_gib: float

    @property
    def folder(self) -> str:
        """The folder of its results: `<family>-<most capable instruction set>`.

        >>> Machine("AMD EPYC", "znver4", ["avx512_bf16", "avx2"], 2, 7.8).folder
        'znver4-avx512_bf16'
        """
        return "-".join([self.family, *self.instruction_sets[:1]])


def this_machine(device: str = "cpu") -> Machine:
    """The machine that runs this process; for a CUDA device, that device."""
    if not device.startswith("cuda"):
        features = binding.get_host_cpu_features()
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(
            processor=_processor(),
            family=binding.get_host_cpu_name() if device == "cpu" else device,
            instruction_sets=[name for flag, name in INSTRUCTION_SETS.items() if features.get(flag)],
            cores=torch.get_num_threads(),
            memory_gib=round(pages / 2**30, 1),
        )
    found = torch.cuda.get_device_properties(device)
    return Machine(
        processor=found.name,
        family=re.sub(r"\W+", "-", found.name.lower()),
        instruction_sets=[f"sm_{found.major}{found.minor}"],
        cores=found.multi_processor_count,
        memory_gib=round(found.total_memory / 2**30, 1),
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
