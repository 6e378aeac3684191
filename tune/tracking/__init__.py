"""The only writers to MLflow."""
