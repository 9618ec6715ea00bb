"""One exchange over one stream, and the pool that keeps streams open between exchanges."""
