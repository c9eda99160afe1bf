"""A node's certificate is renewed by the service that issued it, in time, and the node goes on with the new one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from processes import federation

from farfield.edge_client.home import Home
from farfield.edge_client.renewal import BEFORE, renew
from farfield.edge_client.resident import federation_channel


def test_a_certificate_is_renewed_when_it_ends_soon(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a record"}\n', encoding="utf-8")
    with federation(tmp_path) as running:
        running.serve()
        home = Home.open(running.enrol("ann", tmp_path / "data.jsonl"))
        address = f"localhost:{running.ports['federation']}"
        first = home.keys().node_certificate()
        with federation_channel(address, home.keys()) as channel:
            assert not renew(home, channel, datetime.now(UTC))
            assert home.keys().node_certificate() == first
            assert renew(home, channel, first.not_valid_after_utc - BEFORE + timedelta(days=1))
        second = home.keys().node_certificate()
        assert second.serial_number != first.serial_number
        assert second.public_key() == first.public_key()
        with running.store() as store:
            node = store.node("ann")
        assert node is not None
        assert int(node.certificate, 16) == second.serial_number
        running.rejoin("ann").end()
