"""Data: from what exists on disk to labelled images, label spaces, views and batches."""
