"""One module a command: the story of a run in plain steps."""
