"""Where the settings that a run was started with differ from those that it is to go on with, by name."""

from typing import Any

from revelio.trust import parse_yaml, printable

# What only says how to run, not what to make, may change between a run and its continuation.
FREE = (
    "resume",
    "plan",
    "device",
    "workers",
    "pass_size",
    "sharing",
    "cache_gb",
    "changed_inputs",
    "check_pictures",
    "out",  # a folder may be moved
)


def difference(old: str, new: str) -> str | None:
    """What the run of one config was started with, and not with as in the other; None where they agree.

    Args:
        old: the YAML text in the run's folder.
        new: the YAML text of this call's settings.
    """
    if old == new:
        return None
    try:
        before, after = (parse_yaml(text, "config.yaml") for text in (old, new))
    except ValueError:
        before = after = None
    if not isinstance(before, dict) or not isinstance(after, dict):
        return "other settings"
    was, now = _by_name(before), _by_name(after)
    for name in dict.fromkeys((*now, *was)):
        if was.get(name) != now.get(name):
            one, other = (printable(f"{name}: {_shown(some.get(name))}") for some in (was, now))
            return f"`{one}`, not `{other}`"
    return None


def _by_name(value: Any, name: str = "") -> dict[str, Any]:
    """The values of a config by the names of their settings: `sae.k`, `model.towers.0.layer`."""
    if name.rpartition(".")[2] in FREE:
        return {}
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    inside = (_by_name(one, f"{name}.{key}" if name else str(key)) for key, one in value.items())
    return {key: one for part in inside for key, one in part.items()}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "none" if value is None else str(value)
