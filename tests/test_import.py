"""Every module, those of the benchmarks included, can be imported without any extra."""

import subprocess
import sys
from pathlib import Path

EXTRAS = "dm_control mujoco metaworld fpsample zarr numcodecs gym_pusht pymunk h5py pyarrow av ray submitit huggingface_hub mpc theseus casadi websockets msgpack onnx onnxscript onnxruntime".split()

CODE = f"""
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import benchmarks, difftori
packages = (benchmarks, difftori)
names = [module.name for p in packages for module in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_no_module_needs_an_extra():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100
