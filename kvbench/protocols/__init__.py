"""How a number is taken: cuts, protocols, scoring."""
