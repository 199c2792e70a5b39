"""Resolves the names of imitation tasks."""

import inspect
from functools import partial
from typing import Any, cast

from difftori.errors import ConfigError
from difftori.il import demos_task as without_env
from difftori.il import env_task as with_env
from difftori.il.demos_task import NONE, demos_task
from difftori.il.env_task import env_task
from difftori.il.pendulum_task import pendulum_task
from difftori.il.tasks import ImitationTask, TaskFactory
from difftori.registry import env_families, load, resolve_env, suggest

TASKS: dict[str, TaskFactory] = {
    "pendulum": partial(pendulum_task, False),
    "pendulum:damped": partial(pendulum_task, True),
}


def default_held_out(env: str) -> float:
    """Return the share of the demonstration episodes that is held out by default."""
    return without_env.HELD_OUT if env == NONE else with_env.HELD_OUT


def find_task(name: str, *, demos: bool = False) -> TaskFactory:
    """Return the factory of a task: one of `TASKS`, that of an environment or of `none` with `demos`, or the one that `my_pkg.my_task:make`
    refers to. Raises ConfigError if the name is unknown.
    """
    if demos and name == NONE:
        return demos_task
    if name == NONE:
        raise ConfigError([f"demos: missing; the environment is {NONE!r}. Fix: give demonstrations, --demos PATH"])
    if demos:
        env = resolve_env(name)
        return partial(env_task, env)
    if name in TASKS:
        return TASKS[name]
    family, colon, _ = name.partition(":")
    if family in env_families() and family not in {known.partition(":")[0] for known in TASKS}:
        raise ConfigError([f"demos: missing; {name!r} is an environment. Fix: give its demonstrations, --demos PATH"])
    if not colon or family in env_families():
        raise ConfigError([f"env: {name!r} is unknown{suggest(name, TASKS)} (or give my_pkg.my_task:make)"])
    factory = load(name)
    if not callable(factory):
        raise ConfigError(
            [
                f"env: {name!r} is a {type(factory).__name__}, not a function. Fix: name a function that returns an ImitationTask"
            ]
        )
    return cast(TaskFactory, factory)


def task_options(factory: TaskFactory) -> dict[str, bool]:
    """Return the keyword options of a factory, and whether each is required."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:
        raise ConfigError(
            [f"env: {factory} has no readable signature ({error}). Fix: name a function that returns an ImitationTask"]
        ) from error
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def make_task(name: str, factory: TaskFactory, **options: Any) -> ImitationTask:
    """Create a task. `name` is used in error messages. Options that are None use the factory's defaults.

    Raises ConfigError for an option that the factory does not have, or a required one that is missing.
    """
    known = task_options(factory)
    given = {option: value for option, value in options.items() if value is not None}
    faults = [f"{option}: unknown for {name!r}{suggest(option, known)}" for option in given.keys() - known.keys()]
    faults += [
        f"{option}: missing; {name!r} requires it. Fix: give a value"
        for option, required in known.items()
        if required and option not in given
    ]
    if faults:
        raise ConfigError(sorted(faults))
    task = factory(**given)
    if not isinstance(task, ImitationTask):
        raise ConfigError([f"env: {name!r} returned a {type(task).__name__}. Fix: return an ImitationTask"])
    return task
