"""Secure aggregation: the coordinator learns the sum of its clients' vectors and nothing else.

The protocol is that of Bell, Bonawitz, Gascón, Lepoint and Raykova (CCS 2020), with a signed roster and with masks that
are bound to the session:

    step        the server tells all             …and one client     a client answers
    ADVERTISE   what the session is about (Open)                      two X25519 keys, signed by its identity
    REVEAL      the roster                                            its part in the randomness of the graph
    SHARE       the roster, or the reveals                            shares of its two secrets, boxed by holder
    SUBMIT      who shared                       the boxes for it     its vector, masked
    CONFIRM     who survived, who dropped out                         its signature on that
    UNMASK                                       the signatures of    a share for each neighbour: of its seed where it
                                                 its neighbours       survived, of its mask key where it dropped out

REVEAL is there when more are asked than mask with everybody (`parameters.SMALL`). A vector is hidden under a mask of
its own and one for each neighbour, which cancels against the neighbour's. Of a survivor the own mask is opened, of a
client that dropped out the masks that its neighbours put on for it; nobody opens both of the same client, because each
client answers once, and only when enough of its neighbours were told the same about who survived.

What this does not give:

- A masked vector is not authenticated here, because whatever a client submits counts as its vector. That it comes from
  the client, unaltered, is the envelope's to say, which signs and seals every reply.
- On a sparse graph a server that works together with clients may hold their reveals back, and so draw the graph again
  as often as it has such clients to leave out. It cannot choose the graph, but of many it can take the one it likes
  best: the bound of `parameters.choose` is for a server that draws once.
- A client can spoil a session, by shares that do not open or give another secret. The error names it.
"""

from .client import State, begin, dump, restore
from .messages import Open, Step, decode_open, encode_open
from .phases import Sum
from .server import Phase, open_session
from .states import Terms

__all__ = [
    "Open",
    "Phase",
    "State",
    "Step",
    "Sum",
    "Terms",
    "begin",
    "decode_open",
    "dump",
    "encode_open",
    "open_session",
    "restore",
]
