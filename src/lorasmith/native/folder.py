"""Where the cache lies."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return the cache folder: `LORASMITH_HOME`, else the platform's own."""
    chosen = os.environ.get("LORASMITH_HOME")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("lorasmith"))
