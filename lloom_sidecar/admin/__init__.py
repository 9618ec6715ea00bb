"""The operator's side of a node: admin API, probes, metrics, health conditions."""
