"""The settings of a study's arms as flat text, and in what two arms differ."""

from __future__ import annotations

from typing import Any

from bitnet_ext.collapse.results.records import Study, arm_settings


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as one level, `optimizer.lr`: text. Lists are one value."""
    if isinstance(tree, dict):
        flat: dict[str, str] = {}
        for key, value in tree.items():
            flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    if isinstance(tree, int) and not isinstance(tree, bool):
        return {prefix: f"{tree:,}"}
    if isinstance(tree, float):
        return {prefix: f"{tree:g}"}
    if isinstance(tree, list):
        return {prefix: ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in tree)}
    return {prefix: "none" if tree is None else str(tree)}


def settings_of(study: Study, arm: str) -> dict[str, str]:
    """An arm's flat settings: its first run's config.json, else what study.json says about it. Without seed
    and paths.
    """
    run = next((run for run in study.runs if run.arm == arm and run.config), None)
    tree = run.config if run is not None else arm_settings(study.settings).get(arm, {})
    own = {"arm", "name", "seed", "out", "summary", "description", "directory", "path", "title"}
    return {key: value for key, value in flatten(tree).items() if key.rsplit(".", 1)[-1] not in own}


def setting_changes(study: Study, base: str, other: str) -> list[str]:
    """`key old → new` for each setting in which two arms differ."""
    a, b = (
        {key.rsplit(".", 1)[-1]: value for key, value in settings_of(study, arm).items()}
        for arm in (base, other)
    )
    keys = [key for key in a if a[key] != b.get(key, "none")] + [
        k for k in b if k not in a and b[k] != "none"
    ]
    return [f"{key} {a.get(key, 'none')} \N{RIGHTWARDS ARROW} {b.get(key, 'none')}" for key in keys]
