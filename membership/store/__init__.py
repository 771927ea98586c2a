"""The store: its interface and two implementations (etcd, in memory), leases, elections, records and keys, the mirror.

Imports base. Start with `records.py` (what is stored), then `interface.py`.
"""

import os

# Before gRPC is imported: it writes to stderr what it also returns as an error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
