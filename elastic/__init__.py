"""The service: scheduler, engine, gateway, the roles as processes, and the command line."""
