"""What carries a command out, whatever the command: its story, session, work, ways to run, pool, caches."""
