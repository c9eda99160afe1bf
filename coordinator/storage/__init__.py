"""What the coordinator remembers: invitations, nodes, runs and their rounds, bundles, notices, and its own heartbeat.

SQLite by default, PostgreSQL by URL. Several processes have it open at the same time: the service, the ServerApp of a
run, and the commands, whose authority is that they may write the database.
"""

from .rows import BundleRow, Node, Run, RunState
from .store import ALIVE, Store

__all__ = ["ALIVE", "BundleRow", "Node", "Run", "RunState", "Store"]
