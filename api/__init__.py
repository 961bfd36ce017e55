"""The HTTP service: routes, schemas, authentication, errors. It never opens torch."""
