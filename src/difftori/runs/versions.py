"""The software, machine and source of a run, to explain differences between runs and to reproduce a run."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import difftori

_SIMULATORS = ("mujoco", "dm_control", "metaworld", "gym_pusht", "pymunk", "gymnasium")


def versions(device: str) -> dict[str, str | int | None]:
    """Return versions, machine and source of this process, for `versions.json`."""
    return {
        "difftori": difftori.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: version for name in _SIMULATORS if (version := _installed(name)) is not None},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "executable": sys.executable,
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the name of the processor, as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the git commit of the package's checkout, with `-dirty` if files differ, or None if it is installed."""
    folder = Path(difftori.__file__).parent
    git = shutil.which("git")
    if git is None or folder.parent.name in ("site-packages", "dist-packages"):
        return None
    try:
        answer = subprocess.run(
            [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
