"""Stand-ins for what is outside a test's subject. Each passes the contract suite that the real thing passes."""
