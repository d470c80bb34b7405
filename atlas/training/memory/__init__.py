"""How much memory and disk a run needs, and how many sequences fit into a micro-batch."""
