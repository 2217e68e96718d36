"""Questions of our own: Byzantine workers, the vote by dither, and what the monitor shows."""
