"""The brokers of scripts/brokers, each in the file of its name; kind.py says what one is."""
