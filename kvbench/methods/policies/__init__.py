"""Methods that choose entries by computed keys, values or attention."""
