"""A search simulator: real searchers and schedulers on recorded learning curves of real trials (docs/simulator.md)."""
