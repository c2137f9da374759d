"""The service. ``app`` is API and page in one ingress, ``api`` and ``page`` are separate ones for clusters."""
