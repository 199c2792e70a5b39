"""Every module can be imported without any extra."""

import subprocess
import sys

EXTRAS = "dm_control mujoco metaworld fpsample zarr numcodecs gym_pusht pymunk h5py pyarrow av ray submitit mpc theseus".split()

CODE = f"""
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import difftori
names = [module.name for module in pkgutil.walk_packages(difftori.__path__, "difftori.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_no_module_needs_an_extra():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100
