"""Renders the images of a raw robomimic file from its states, into a new file in robomimic's layout. An interrupted run can be resumed.

Finished episodes are kept in the folder OUT.parts until the file is complete.
"""

import hashlib
import importlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from difftori.collection.episode_log import UNREADABLE, is_intact, read_plan, refuse_other, writing
from difftori.data.formats.robomimic import RobomimicSource, open_robomimic
from difftori.envs.robomimic import RobomimicEnv
from difftori.envs.robomimic_demos import Layout, objects_before_1_5, read_layout, read_task
from difftori.envs.robomimic_simulation import TASKS, arm_parts, image_parts, import_robosuite
from difftori.errors import ConfigError, DataError
from difftori.runs.checkpoint import flush_directory, replace_file

RENDERED = "rendered"
"""Attribute of the new file's `data`: how it was rendered, as JSON."""
Show = Callable[[int, int], None]


@dataclass(frozen=True)
class RenderRequest:
    """A request to render the robomimic file `file` into `out` (default: FILE_image.hdf5). See `Camera` for `reflections`."""

    file: Path
    out: Path | None = None
    reflections: bool = True

    @property
    def target(self) -> Path:
        """The new file."""
        return self.file.with_name(f"{self.file.stem}_image.hdf5") if self.out is None else self.out


def render(request: RenderRequest, show: Show = lambda done, total: None) -> dict[str, Any]:
    """Render all demonstrations, or resume an interrupted run, and return a summary. A finished file is not changed.

    The new file is a copy of the old one with the images of the task's cameras (T H W 3), and with the low-dimensional
    observations if a demonstration lacks them. `show` is called with the numbers of rendered and of all demonstrations.

    Raises `ConfigError` (the file is not of a known task, or `out` is another file), `DataError` (a damaged or unwritable file,
    links), `MissingExtraError` (extra `robomimic`), and the errors of the environment.
    """
    out = request.target
    if not request.file.is_file():
        what = "is a directory, not a robomimic file (.hdf5)" if request.file.is_dir() else "does not exist"
        raise ConfigError(
            [
                f"file: {request.file} {what}. Fix: give a robomimic file; of our own demonstrations, collect again with --obs image"
            ]
        )
    if out.exists() and out.samefile(request.file):
        raise ConfigError([f"out: {out} is the file itself. Fix: choose another --out"])
    with open_robomimic(request.file, None) as source:
        task, plan = read_task(source.about), _plan(request)
        layout = read_layout(task, source.about)
        _check_source(source)
        if out.exists():
            refuse_other(_plan_of(out), plan, out)
            return {"task": task, "demonstrations": len(source.demos), "rendered_now": 0, "file": str(out)}
        parts = out.with_name(f"{out.name}.parts")
        _open_parts(parts, plan)
        missing = [demo.name for demo in source.demos if not is_intact(_part(parts, demo))]
        if missing:
            low_dim = ("object", *arm_parts(TASKS[task].arms))
            names = (*image_parts(task), *(name for name in low_dim if not _everywhere(source, f"obs/{name}")))
            with closing(
                RobomimicEnv(task, parts=names, actions="delta", reflections=request.reflections, max_steps=1)
            ) as env:
                _render_missing(source, missing, parts, env, layout, show)
        show(len(source.demos), len(source.demos))
        _write(source, parts, out, plan)
    shutil.rmtree(parts, ignore_errors=True)
    return {"task": task, "demonstrations": len(source.demos), "rendered_now": len(missing), "file": str(out)}


def _check_source(source: RobomimicSource) -> None:
    """Check all that would fail only after hours of rendering. Raises `ConfigError` and `DataError`."""
    if not _everywhere(source, "states"):
        raise ConfigError([f"file: {source.path} has no states to render. Fix: give a raw robomimic file"])
    source.check_copy()
    field = source.field("states")
    for demo, states in zip(source.demos, field.blocks, strict=True):
        if states.shape[1:] != field.shape or not np.isfinite(states).all():
            raise DataError(
                f"{source.path}: {demo.name}/states has another shape than those of the first demonstration, or is not finite. "
                "Fix: restore the file, or remove this demonstration"
            )


def _everywhere(source: RobomimicSource, key: str) -> bool:
    return all(key in demo for demo in source.demos)


def _plan(request: RenderRequest) -> dict[str, Any]:
    import_robosuite(needs_images=False)  # refuses a missing extra
    digest = hashlib.sha256()
    with request.file.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    versions = {name: version(name) for name in ("difftori", "robosuite", "mujoco")}
    return {"sha256": digest.hexdigest(), "reflections": request.reflections, **versions}


def _plan_of(out: Path) -> Mapping[str, Any]:
    """Return how a file was rendered; nothing for any other file."""
    try:
        with open_robomimic(out, None) as source:
            plan = json.loads(source.about.get(RENDERED, "{}"))
    except (DataError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _open_parts(parts: Path, plan: Mapping[str, Any]) -> None:
    """Create the folder of finished episodes, or check that it is that of this plan. Raises `ConfigError`."""
    with writing(parts):
        before = read_plan(parts)
        if before is not None:
            refuse_other(before, plan, parts)
            return
        parts.mkdir(parents=True, exist_ok=True)
        for unknown in parts.glob("*.npz"):
            unknown.unlink()
        replace_file(parts / "plan.json", json.dumps(plan).encode())


def _part(parts: Path, demo: Any) -> Path:
    return parts / f"{demo.name.rpartition('/')[2]}.npz"


def _render_missing(
    source: RobomimicSource, missing: list[str], parts: Path, env: RobomimicEnv, layout: Layout, show: Show
) -> None:
    """Render these demonstrations, and write each to its part."""
    done = len(source.demos) - len(missing)
    # Read by the format's reader, which refuses links and data outside of the file.
    for demo, states in zip(source.demos, source.field("states").blocks, strict=True):
        if demo.name not in missing:
            continue
        show(done, len(source.demos))
        try:
            arrays = _rendered(env, states.astype(np.float64), demo.attrs.get("model_file"))
        except ConfigError as error:
            raise DataError(f"{source.path}: {demo.name}: {error}") from error
        if layout.before_1_5 and "object" in arrays:
            arrays["object"] = objects_before_1_5(read_task(source.about), arrays["object"])
        _write_part(_part(parts, demo), arrays)
        done += 1


def _rendered(env: RobomimicEnv, states: np.ndarray, model: Any) -> dict[str, np.ndarray]:
    """Return the observations of all states of an episode by name, images with channels last."""
    env.reset(seed=0, options={"reset_to_state": states[0], "model_file": model})
    rows: list[dict[str, np.ndarray]] = []
    for one in map(env.shown, states):
        assert isinstance(one, dict), "the environment has named parts"
        rows.append(one)
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {n: v.transpose(0, 2, 3, 1) if n.endswith("_image") else v.astype(np.float64) for n, v in columns.items()}


def _write_part(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    with writing(path):
        replace_file(path, buffer.getvalue())


def _write(source: RobomimicSource, parts: Path, out: Path, plan: Mapping[str, Any]) -> None:
    """Write the new file, completely or not at all."""
    h5py: Any = importlib.import_module("h5py")  # the file is open, so it is installed
    partial = out.with_name(f"{out.name}.tmp")
    with writing(out):
        shutil.copyfile(source.path, partial)
        with h5py.File(partial, "r+") as file:
            file["data"].attrs[RENDERED] = json.dumps(plan)
            for demo in source.demos:
                group = file[demo.name].require_group("obs")
                for name, values in _read_part(_part(parts, demo)):
                    if name in group:
                        del group[name]
                    group.create_dataset(name, data=values, compression="gzip", compression_opts=1)
        os.replace(partial, out)
        flush_directory(out.parent)


def _read_part(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                yield name, archive[name]
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Fix: run the command again; it is rendered again"
        ) from error
