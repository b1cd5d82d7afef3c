"""Redis Cluster, Sentinel and replicas: what the library does there that one server has no part in."""
