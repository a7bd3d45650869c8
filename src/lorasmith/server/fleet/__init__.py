"""Several engines behind one address.

`Ingress` decides once, for all of them: who asks, what the model means, whether the quota allows it, whose turn
it is, and on which replica. A replica is a `Gateway` that believes its ingress. Between them is a `Pool`: local
processes (`workers`), or Ray Serve (`on_ray`).
"""

from lorasmith.server.fleet.app import create_fleet_app
from lorasmith.server.fleet.ingress import Ingress
from lorasmith.server.fleet.run import run_fleet
from lorasmith.server.fleet.worker import WorkerSpec

__all__ = ["Ingress", "WorkerSpec", "create_fleet_app", "run_fleet"]
