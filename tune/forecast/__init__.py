"""What a search will take."""
