"""A page on localhost over a session: one thread that works on it, what came of that, and whoever looks at it."""
