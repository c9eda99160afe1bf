"""How a database that an older release made becomes one that this release uses. Never edited once released."""
