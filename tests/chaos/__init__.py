"""Judges of what a fleet did to its flows under faults: by what the calls answered, and by what is stored."""
