"""What a run needs on a machine or a card: memory, time, tables and advice over `atlas.model.cost`."""
