"""One setting for every test: a shared machine is no stopwatch, so hypothesis sets no deadline."""

from hypothesis import settings

settings.register_profile("farfield", deadline=None)
settings.load_profile("farfield")
