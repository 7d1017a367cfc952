"""What client, server and worker agree on: the graph, the op registry, the card, the wire. No torch here."""

__version__ = "0.1.0"

#: Version of the HTTP contract and of the job record. A client and a server must share it.
PROTOCOL = 1
