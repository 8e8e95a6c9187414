"""The policies of shipped configs, by MMPretrain's transforms."""

from typing import Any


def of_mmpretrain(config: Any) -> Any:
    """A config with the transforms of MMPretrain in place of our faster ones."""
    if isinstance(config, dict):
        config = {key: of_mmpretrain(value) for key, value in config.items()}
        if isinstance(config.get('type'), str):
            config['type'] = config['type'].removeprefix('Fast')
        return config
    return [of_mmpretrain(x) for x in config] if isinstance(config, list | tuple) else config
