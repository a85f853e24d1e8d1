"""What the layers agree on: column names, the shape of data, protocols and events. Standard library only."""
