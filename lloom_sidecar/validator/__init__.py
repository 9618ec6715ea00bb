"""What only validators do, besides what every node does: the audit of executors."""
