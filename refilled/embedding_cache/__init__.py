"""The teacher's embeddings of every (image, view), computed once and kept in files."""
