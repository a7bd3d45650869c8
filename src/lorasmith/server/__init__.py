"""OpenAI-compatible HTTP over an engine and a store.

`Gateway` is everything but HTTP: who may ask what, which adapter that is, when it runs. `create_app` puts
routes around it; `run` gives it a socket and signals. `fleet/` puts several of them behind one address.

May import: engine, store, bases, native, errors
"""

from lorasmith.server.app import create_app
from lorasmith.server.config import ServerConfig
from lorasmith.server.fleet import WorkerSpec, run_fleet
from lorasmith.server.gateway import Gateway
from lorasmith.server.keys import Keys, hash_key, new_key, read_keys
from lorasmith.server.run import check_address, check_exposure, run
from lorasmith.server.status import STATUS

__all__ = [
    "STATUS", "Gateway", "Keys", "ServerConfig", "WorkerSpec", "check_address", "check_exposure", "create_app", "hash_key", "new_key", "read_keys", "run", "run_fleet",
]  # fmt: skip
