"""What a person reads of sizes and times."""

from datetime import UTC, datetime, timedelta

from farfield.edge_client.readable import days_left
from farfield.protocols.terminal import size


def test_sizes() -> None:
    shown = [size(count) for count in (0, 999, 1000, 1_500_000, 50_000_000_000, 2e15)]
    assert shown == ["0 B", "999 B", "1.0 kB", "1.5 MB", "50.0 GB", "2000.0 TB"]


def test_days_left_until_it_is_over() -> None:
    now = datetime(2031, 5, 6, 12, tzinfo=UTC)
    assert [days_left(now + timedelta(hours=hours), now) for hours in (49, 1, -1)] == [
        "2 days left", "0 days left", "EXPIRED",
    ]  # fmt: skip
