"""The edge client as an ordinary Flower `ClientApp`: messages in, messages out.

`app` serves an edge client that has joined: its home is named by the node's configuration (`home`). The resident
connection (`resident.py`) calls it; so can a stock SuperNode, which knows nothing of Farfield:

    flower-supernode --node-config 'home="/srv/edge-client"' …

`make_app` makes one for other surroundings, such as Flower's simulation engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from farfield.protocols.errors import FarfieldError
from farfield.protocols.flower import from_record, to_record
from farfield.protocols.parcel import Parcel


class Answering(Protocol):
    def answer(self, parcel: Parcel) -> Parcel: ...


def make_app(participant: Callable[[Context], Answering]) -> ClientApp:
    """A ClientApp whose messages are answered by `participant` of the context they come in."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            return Message(to_record(participant(context).answer(from_record(message.content))), reply_to=message)
        except FarfieldError as error:  # no task of this coordinator, so there is nobody to seal an answer to
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, error.what), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    return app


@cache
def _joined(home: str) -> Answering:
    from .resident import participant

    return participant(home)


app = make_app(lambda context: _joined(str(context.node_config["home"])))
