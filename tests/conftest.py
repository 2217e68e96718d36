"""What every test process starts with."""

import signal

from hypothesis import settings

# Started in the background of a shell, a test run ignores SIGINT, and so do its children: the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure.
settings.register_profile("signstep", deadline=None)
settings.load_profile("signstep")
