"""The HTTP face: OpenAI API, health, metrics, admin; it owns the clients' connections and the request journal."""
