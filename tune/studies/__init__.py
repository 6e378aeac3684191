"""Which trial comes next, in which cell, and which one stops."""
