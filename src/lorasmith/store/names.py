"""What an adapter may be called, and how a `model` text is taken apart."""

from __future__ import annotations

import re

from lorasmith.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def check_name(name: str) -> str:
    """Return `name` if it may name an adapter or an alias.

    Raises:
        ConfigError: it could be read as a path or a digest, or holds other characters.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise ConfigError(
            f'the name "{name[:140]}" cannot be used: 1 to 128 letters, digits, ".", "_" and "-", '
            'beginning with a letter or digit, without ".."'
        )
    if is_digest(name):
        raise ConfigError(f'the name "{name}" reads like a digest. Choose another one.')
    return name


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a content digest."""
    return _DIGEST.fullmatch(text) is not None


def split_model(model: str) -> tuple[str, int | None]:
    """`"name@3"` → `("name", 3)`, `"name"` → `("name", None)`.

    Raises:
        ConfigError: what follows the `@` is no version number.
    """
    name, at, version = model.partition("@")
    if at and not _VERSION.fullmatch(version):
        raise ConfigError(f'"{model[:160]}" has no version number after the @. Example: {name[:128]}@1')
    return name, int(version) if at else None
