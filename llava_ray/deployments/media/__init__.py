"""Images of requests: data URIs and addresses, fetched within limits."""
