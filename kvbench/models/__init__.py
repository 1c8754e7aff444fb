"""Loading models and adapters, and finding out what their layers do."""
