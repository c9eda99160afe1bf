"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("fleet_key", sa.LargeBinary, nullable=False),
        sa.Column("signing_key", sa.LargeBinary(32), nullable=False),
        sa.Column("sealing_key", sa.LargeBinary(32), nullable=False),
        sa.Column("certificate", sa.String(40), nullable=False),
        sa.Column("enrolled_at", MOMENT, nullable=False),
        sa.Column("revoked_at", MOMENT),
        sa.Column("revoked_because", sa.Text),
        sa.Column("fleet_id", sa.String(20)),
        sa.Column("instance", sa.Text),
        sa.Column("address", sa.Text),
        sa.Column("seen_at", MOMENT),
        sa.PrimaryKeyConstraint("name", name="pk_nodes"),
        sa.UniqueConstraint("fleet_key", name="uq_nodes_fleet_key"),
        sa.UniqueConstraint("signing_key", name="uq_nodes_signing_key"),
        sa.UniqueConstraint("certificate", name="uq_nodes_certificate"),
    )
    op.create_table(
        "invitations",
        sa.Column("secret_digest", sa.LargeBinary(32), nullable=False),
        sa.Column("invited_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT, nullable=False),
        sa.Column("used_at", MOMENT),
        sa.Column("used_by", sa.String(64)),
        sa.PrimaryKeyConstraint("secret_digest", name="pk_invitations"),
        sa.ForeignKeyConstraint(["used_by"], ["nodes.name"], name="fk_invitations_used_by"),
    )
    op.create_table(
        "runs",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("plan", sa.LargeBinary, nullable=False),
        sa.Column("plan_digest", sa.String(64), nullable=False),
        sa.Column("backbone", sa.String(64), nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("started_at", MOMENT),
        sa.Column("finished_at", MOMENT),
        sa.Column("flower_run", sa.String(20)),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_runs"),
    )
    op.create_table(
        "rounds",
        sa.Column("run", sa.String(200), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("record", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run", "number", name="pk_rounds"),
        sa.ForeignKeyConstraint(["run"], ["runs.name"], name="fk_rounds_run"),
    )
    op.create_table(
        "bundles",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_bundles"),
    )
    op.create_table(
        "notices",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("node", sa.String(64), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("noticed_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_notices"),
        sa.ForeignKeyConstraint(["node"], ["nodes.name"], name="fk_notices_node"),
    )
    op.create_index("ix_notices_node", "notices", ["node"])
    op.create_table(
        "service",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("since", MOMENT, nullable=False),
        sa.Column("beat_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_service"),
    )
