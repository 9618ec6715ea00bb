"""HTTP/1.1 on trio: server, pooled client, cutting of server-sent events, ASGI face. Knows nothing of Lloom."""
