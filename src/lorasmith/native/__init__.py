"""C functions compiled by the machine's own compiler, once, and kept in the cache folder.

For loops that torch would spread over many passes through memory. Everything here has a counterpart
in plain torch, which computes where there is no compiler or with `LORASMITH_NATIVE=0`.

May import: errors.
"""

from lorasmith.native.compile import is_enabled, load
from lorasmith.native.folder import home
from lorasmith.native.pages import forget_pages, is_mapped, mapped_files
from lorasmith.native.threads import release_threads

__all__ = ["forget_pages", "home", "is_enabled", "is_mapped", "load", "mapped_files", "release_threads"]
