"""What the name of an imitation task means."""

import inspect
from functools import partial
from typing import Any, cast

from difftori.errors import ConfigError
from difftori.il.env_task import env_task
from difftori.il.pendulum_task import pendulum_task
from difftori.il.tasks import ImitationTask, TaskFactory
from difftori.registry import env_families, load, resolve_env, suggest

TASKS: dict[str, TaskFactory] = {
    "pendulum": partial(pendulum_task, False),
    "pendulum:damped": partial(pendulum_task, True),
}


def find_task(name: str, *, demos: bool = False) -> TaskFactory:
    """The factory of that name in `TASKS`; with `demos`, that of the environment of that name; or the one that
    `my_pkg.my_task:make` refers to. ConfigError if there is none.
    """
    if demos:
        env = resolve_env(name)
        return partial(env_task, env)
    if name in TASKS:
        return TASKS[name]
    family, colon, _ = name.partition(":")
    if family in env_families() and family not in {known.partition(":")[0] for known in TASKS}:
        raise ConfigError([f"demos: {name!r} is imitated from demonstrations; name them by --demos PATH"])
    if not colon or family in env_families():
        raise ConfigError([f"env: {name!r} is unknown{suggest(name, TASKS)} (or give my_pkg.my_task:make)"])
    factory = load(name)
    if not callable(factory):
        raise ConfigError([f"env: {name!r} is a {type(factory).__name__}, not a function that makes a task"])
    return cast(TaskFactory, factory)


def task_options(factory: TaskFactory) -> dict[str, bool]:
    """The keyword options of a factory, and whether each must be given."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:
        raise ConfigError([f"env: {factory} is not a function that makes a task ({error})"]) from error
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def make_task(name: str, factory: TaskFactory, **options: Any) -> ImitationTask:
    """The task that a factory makes; `name` is for messages. An option that is None takes the factory's default.

    Raises ConfigError for an option that the factory does not have.
    """
    known = task_options(factory)
    given = {option: value for option, value in options.items() if value is not None}
    faults = [f"{option}: {name!r} takes none{suggest(option, known)}" for option in given.keys() - known.keys()]
    faults += [f"{option}: {name!r} needs one" for option, needed in known.items() if needed and option not in given]
    if faults:
        raise ConfigError(sorted(faults))
    task = factory(**given)
    if not isinstance(task, ImitationTask):
        raise ConfigError([f"env: {name!r} made a {type(task).__name__}, not an ImitationTask"])
    return task
