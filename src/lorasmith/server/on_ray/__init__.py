"""The same ingress before replicas that Ray Serve starts, watches, scales and replaces; needs the extra `[ray]`.

Two deployments: `Front` is the fleet's `Ingress` (keys, quotas, alias → digest, whose turn it is, retries); `Replica`
is a `Gateway` that believes it. Which replica an adapter belongs to is chosen as among local workers; `Chosen` tells
Ray. Ray's own multiplexing is not used: it evicts what is in use, and keeps an adapter on one replica. Here each
replica's engine leases from the store.
Nothing outside this folder imports Ray.
"""

from lorasmith.server.on_ray.run import application, make, run_on_ray

__all__ = ["application", "make", "run_on_ray"]
