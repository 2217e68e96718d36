"""What every test process starts with."""

import signal

# Started in the background of a shell, a test run ignores SIGINT, and so do its children: the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)
