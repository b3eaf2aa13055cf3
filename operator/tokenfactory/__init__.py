"""A Kubernetes operator that turns a fixed number of megawatts into the most tokens."""
