"""Where trials and jobs run: the cluster, its workers, Ray Tune and Ray Train."""
