"""What a saved benchmark says about where it ran; pytest-benchmark adds CPU and commit itself."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def installed_version(package: str) -> str | None:
    """Returns the version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """Adds library versions and, where a benchmark used one, the GPU."""
    packages = ("torch", "triton", "numpy", "megatron-core")
    machine_info["packages"] = {package: installed_version(package) for package in packages}
    # Only a benchmark that needs torch pays for importing it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["gpu_runtime"] = torch.version.hip or torch.version.cuda
